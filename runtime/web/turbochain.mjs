// Draw pictures from a bundle (see FORMAT.md), in a browser with ONNX Runtime Web or in Node with onnxruntime-node.
// One module without a build step; the packages that it needs are imported by name when they are needed.
//
//     const pipe = await Pipeline.load("bundle/");
//     const { data, width, height } = await pipe("a cat", { seed: 7 });

/**
 * @typedef {{ name: string, dtype: "float32" | "float16" | "int32" | "uint8", shape: number[] }} Tensor
 * @typedef {{ file: string, data: string[], precision: string, inputs: Tensor[], outputs: Tensor[] }} Graph
 * @typedef {{ graph: string, when: "prompt" | "image" | "step" | "end", wires?: Record<string, string>, if?: string[],
 *   unless?: string[] }} Stage
 * @typedef {{ is: string, when: "call" | "step" | "held", scale?: string, of?: string }} Feed
 * @typedef {{ steps: number, rows: number, begin?: number, guidance_scale?: number | null, strength?: number | null
 *   }} TableEntry
 * @typedef {{ task: string, size: number[], batch: number, stages: Stage[], feeds: Record<string, Feed>,
 *   draws: { name: string, discarded?: boolean }[], carry: Record<string, string>, tables_file: string,
 *   tables: Record<string, TableEntry>, output: string, modes?: string[], defaults?: Record<string, number> }} Chain
 * @typedef {{ file: string, max_length: number, pad_token: string, pad_id: number, expansions?: Record<string, number>
 *   }} TokenizerFile
 * @typedef {{ format_version: number, requires: Record<string, string>, tokenizers: Record<string, TokenizerFile>,
 *   graphs: Record<string, Graph>, chains: Record<string, Chain>,
 *   files: Record<string, FileRecord> }} Manifest
 * @typedef {{ size: number, sha256: string }} FileRecord
 *
 * @typedef {"webgpu" | "wasm" | "cpu"} Backend
 * @typedef {{ loaded: number, total: number, file: string, cached: boolean }} Progress in bytes, of all files to load
 * @typedef {{ width: number, height: number, data: Uint8Array | Uint8ClampedArray }} Pixels RGB or RGBA
 * @typedef {Pixels | Blob | ImageBitmap | HTMLImageElement | HTMLCanvasElement | OffscreenCanvas} Source
 * @typedef {{ stage: string, row: number | null, rows: number }} Observed a graph that has run; `row`: of the loop
 * @typedef {{ width: number, height: number, data: Uint8ClampedArray, seed: number | bigint, resized: boolean
 *   }} Picture an ImageData in browsers; `seed`: the one that was used; `resized`: whether the image had another size
 *
 * @typedef {object} LoadOptions
 * @property {Backend} [backend] left out: the best that there is here; "cpu" in Node
 * @property {string[]} [tasks] whose graphs are loaded now (left out: the first one's); others are when they are used
 * @property {(progress: Progress) => void} [progress]
 * @property {boolean} [cache] whether a browser keeps the files for the next visit; left out: true
 *
 * @typedef {object} CallOptions
 * @property {number | bigint} [seed] 0 to 2^64 - 1
 * @property {number} [numInferenceSteps] left out: the fewest that make a step
 * @property {Source | null} [image] to start from
 * @property {number} [strength] 0 to 1: how much of the image changes, by `floor(numInferenceSteps * strength)` steps
 * @property {number} [guidanceScale] above 1 the negative prompt is drawn too
 * @property {string} [negativePrompt]
 * @property {number} [height] in pixels
 * @property {number} [width] in pixels
 * @property {AbortSignal} [signal] ends the call between two graphs
 * @property {(observed: Observed) => void} [observe] is told of each graph
 */

/** A bad argument, a damaged bundle, or something that this machine lacks; one sentence that says what to do. */
export class InputError extends Error {
  name = "InputError";
}

/** @type {(message: string) => never} */
const fail = (message) => {
  throw new InputError(message);
};

/** Return a value as a message shows it. @param {unknown} value */
function shown(value) {
  if (typeof value === "string") return JSON.stringify(value.slice(0, 80));
  return Object(value) === value ? Object.prototype.toString.call(value) : String(value);
}

/** Return what was given of the options, without those that are null. Refuses names that there are not.
 *  @template T @param {string} of what takes them @param {T} options @param {string[]} names @returns {T} */
function optionsOf(of, options, names) {
  if (typeof options !== "object") fail(`${of} was given ${shown(options)}: an object of options was expected`);
  const given = Object.entries(options ?? {}).filter(([, value]) => value !== null);
  const unknown = given.find(([name]) => !names.includes(name));
  if (unknown) fail(`${unknown[0]} is no option of ${of}: choose from ${names.join(", ")}`);
  return /** @type {T} */ (Object.fromEntries(given));
}

/** Return a function that was given, or one that does nothing.
 *  @template {(told: any) => void} T @param {string} name @param {T} [given] @returns {T | (() => void)} */
function functionOf(name, given) {
  if (given !== undefined && typeof given !== "function") fail(`${name}=${shown(given)}: a function was expected`);
  return given ?? (() => {});
}

// ---- noise

/** The values of `torch.Generator("cpu").manual_seed(seed)`, each within 1e-6 of PyTorch's. */
export class Generator {
  #words = new Uint32Array(624);
  #used = 624;
  #waiting = NaN; // the second of a pair, for the next draw of fewer than 16

  /** @param {number | bigint} seed 0 to 2^64 - 1, of which the low 32 bits count, as in PyTorch */
  constructor(seed) {
    const isInteger = Number.isSafeInteger(seed) || typeof seed === "bigint";
    const expected = "an integer from 0 to 2^64 - 1 was expected; give one above 2^53 as a BigInt";
    if (!isInteger || seed < 0 || seed >= 2n ** 64n) fail(`seed=${shown(seed)}: ${expected}`);
    const words = this.#words;
    words[0] = Number(BigInt(seed) % 2n ** 32n);
    for (let i = 1; i < 624; i++) words[i] = Math.imul(1812433253, words[i - 1] ^ (words[i - 1] >>> 30)) + i;
  }

  /** Return the next standard normal values, as `torch.randn(count)` does. @param {number} count */
  randn(count) {
    const values = new Float32Array(count);
    if (count < 16) return values.map(() => this.#one());
    const uniform = () => (this.#next() & 0xffffff) * 2 ** -24;
    for (let i = 0; i < count; i++) values[i] = uniform();
    for (let i = 0; i + 16 <= count; i += 16) boxMuller(values.subarray(i, i + 16));
    if (count % 16) values.set(boxMuller(new Float32Array(16).map(uniform)), count - 16);
    return values;
  }

  /** Return a value of a draw of fewer than 16: these are made in pairs, in float64. */
  #one() {
    const value = this.#waiting;
    this.#waiting = NaN;
    if (!Number.isNaN(value)) return value;
    const uniform = () => ((this.#next() & 0x1fffff) * 2 ** 32 + this.#next()) * 2 ** -53; // the high word comes first
    const angle = 2 * Math.PI * uniform();
    const radius = Math.sqrt(-2 * Math.log1p(-uniform()));
    this.#waiting = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }

  /** Return the next 32 bits of the Mersenne Twister. */
  #next() {
    const words = this.#words;
    if (this.#used === 624) {
      for (let i = 0; i < 624; i++) {
        const x = (words[i] & 0x80000000) | (words[(i + 1) % 624] & 0x7fffffff);
        words[i] = words[(i + 397) % 624] ^ (x >>> 1) ^ (x & 1 ? 0x9908b0df : 0);
      }
      this.#used = 0;
    }
    let x = words[this.#used++];
    x ^= x >>> 11;
    x ^= (x << 7) & 0x9d2c5680;
    x ^= (x << 15) & 0xefc60000;
    return (x ^ (x >>> 18)) >>> 0;
  }
}

/** Make 16 uniform values normal ones, in place; every operation is rounded to float32. @param {Float32Array} block */
function boxMuller(block) {
  const { fround } = Math;
  for (let i = 0; i < 8; i++) {
    const radius = fround(Math.sqrt(-2 * fround(Math.log(1 - block[i]))));
    const angle = fround(fround(2 * Math.PI) * block[i + 8]);
    block[i] = radius * fround(Math.cos(angle));
    block[i + 8] = radius * fround(Math.sin(angle));
  }
  return block;
}

/** Return the noise of a call, feed → its values in each row; what is drawn, and in which order, the chain says.
 *  @param {Chain} chain @param {Table} table @param {Record<string, Tensor>} tensors @param {Generator} generator */
function noiseOf({ draws, feeds }, table, tensors, generator) {
  /** @type {Record<string, Float32Array[]>} */
  const noise = {};
  for (const { name, discarded } of draws) {
    const { when = "call", scale = "" } = feeds[name] ?? {};
    const size = sizeOf(tensors[name]);
    const isDrawn = (/** @type {number} */ row) => when !== "step" || table.draws(row);
    const rows = Array.from({ length: when === "step" ? table.rows : 1 }, (_, row) =>
      isDrawn(row) ? generator.randn(size) : new Float32Array(size),
    );
    if (!discarded) noise[name] = scale ? rows.map((values) => values.map((x) => x * table.sigma)) : rows;
  }
  return noise;
}

// ---- token ids

/** A tokenizer.json with one fixed length, whose ids are those of transformers' CLIPTokenizer. */
export class Tokenizer {
  #tokenizer;
  #entry;
  /** @type {Map<string, string>} */
  #expansions;

  /** @param {import("@huggingface/tokenizers").Tokenizer} tokenizer @param {TokenizerFile} entry */
  constructor(tokenizer, entry) {
    this.#tokenizer = tokenizer;
    this.#entry = entry;
    const parts = Object.entries(entry.expansions ?? {}).map(([token, count]) =>
      Array.from({ length: count }, (_, i) => (i ? `${token}_${i}` : token)),
    );
    const lower = parts.filter(([token]) => token === token.toLowerCase()); // Python finds no others in a prompt
    this.#expansions = new Map(lower.map((tokens) => [tokens[0], tokens.join(" ")]));
    const says = "and bundle.json says it does; build the bundle again with build-engine";
    const lacks = parts.flat().find((token) => tokenizer.token_to_id(token) === undefined);
    if (lacks !== undefined) fail(`${entry.file} has no token ${lacks}, ${says}`);
    const { pad_token, pad_id } = entry;
    if (tokenizer.token_to_id(pad_token) !== pad_id) fail(`${entry.file} does not pad with ${pad_token}, ${says}`);
  }

  /** Read a tokenizer.json, which has been hashed. @param {Uint8Array} bytes @param {TokenizerFile} entry */
  static async read(bytes, entry) {
    const library = await imported("@huggingface/tokenizers", () => import("@huggingface/tokenizers"));
    const file = asInRust(JSON.parse(new TextDecoder().decode(bytes)));
    return new Tokenizer(new library.Tokenizer(file, {}), entry);
  }

  /** Return the `max_length` ids of a prompt; of a long one the last ones, but for the marker, are dropped.
   *  @param {string} prompt */
  encode(prompt) {
    const { max_length, pad_id } = this.#entry;
    const { ids } = this.#tokenizer.encode(this.#expanded(prompt));
    const dropped = ids.splice(max_length - 1, Math.max(0, ids.length - max_length));
    if (dropped.length) console.warn(`the prompt has ${dropped.length} tokens too many: its end was dropped`);
    return Int32Array.from({ length: max_length }, (_, i) => ids[i] ?? pad_id);
  }

  /** Return a prompt with every token of several vectors written out. @param {string} prompt */
  #expanded(prompt) {
    if (!this.#expansions.size) return prompt;
    for (const token of new Set(this.#tokenizer.tokenize(prompt))) {
      prompt = prompt.replaceAll(token, () => this.#expansions.get(token) ?? token);
    }
    return prompt;
  }
}

/** Return a tokenizer.json of which the library makes what the Rust crate makes of `file`. @param {any} file */
function asInRust(file) {
  // JavaScript writes a sigma at a word's end as ς; the crate lower-cases each character alone.
  const sigma = { type: "Replace", pattern: { String: "Σ" }, content: "σ" };
  // A text that is only lower-cased to a marker is none; it is split here as the crate splits it.
  const marked = String.raw`(?<![^\s\p{L}\p{N}])<\|(start|end)oftext\|>`;
  const marker = { type: "Replace", pattern: { Regex: marked }, content: "<| $1oftext |> " };
  // ByteLevel's own expression would take U+FEFF for white space; in a Split the library rewrites it.
  const words = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;
  const split = { type: "Split", pattern: { Regex: words }, behavior: "Isolated", invert: false };
  const mend = (/** @type {any} */ step) => {
    const steps = step?.normalizers ?? step?.pretokenizers;
    if (steps) return [{ ...step, normalizers: steps.flatMap(mend), pretokenizers: steps.flatMap(mend) }];
    if (step?.type === "Lowercase") return [sigma, step, marker];
    return step?.type === "ByteLevel" && step.use_regex !== false ? [split, { ...step, use_regex: false }] : [step];
  };
  return { ...file, normalizer: mend(file.normalizer)[0], pre_tokenizer: mend(file.pre_tokenizer)[0] };
}

/** Return a prompt that can be written as UTF-8. @param {string} argument @param {unknown} prompt */
function checkPrompt(argument, prompt) {
  if (typeof prompt !== "string") fail(`${argument} is no string: a text was expected; give ""`);
  const wrong = /\0|\p{Surrogate}/u.exec(prompt);
  const code = wrong?.[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
  if (wrong) fail(`${argument} holds U+${code} at position ${[...prompt.slice(0, wrong.index)].length}; remove it`);
  const size = new TextEncoder().encode(prompt).length;
  if (size > 2 ** 15) fail(`${argument} has ${size} bytes: at most 32 KiB were expected; shorten it`);
  return prompt;
}

// ---- files

const CHUNK = 64 * 2 ** 20; // bytes that are hashed as one
const FEATURES = ["expansions", "modes", "multistep", "wires"];
const FEEDS = ["column", "history", "ids", "image", "noise", "zeros", "guidance_scale"]; // the last is the only number
const [FROM_TEXT, FROM_IMAGE] = ["text-to-image", "image-to-image"];
const node = typeof process !== "undefined" && process.versions?.node ? process : null;

/** A bundle at an address. No file is parsed before its hash is right. */
export class Bundle {
  #cache;

  /** @param {URL} base @param {Manifest} manifest @param {Cache | null} cache */
  constructor(base, manifest, cache = null) {
    this.base = base;
    this.manifest = manifest;
    this.#cache = cache;
    const unknown = Object.keys(manifest.requires ?? {}).filter((feature) => !FEATURES.includes(feature));
    if (manifest.format_version !== 2) unknown.unshift(`format_version ${manifest.format_version}`);
    /** The chains that can be drawn with. @type {Chain[]} */
    this.chains = Object.values(manifest.chains ?? {}).filter(isKnown);
    const mend = "make a site of it with turbochain export-web BUNDLE";
    if (unknown.length) fail(`${base} has ${unknown.join(", ")}, and cannot be read here; ${mend}`);
    if (!this.chains.length) fail(`${base} has no chain that makes one picture; ${mend}`);
    this.#filesOf(this.chains);
    this.tasks = [...new Set(this.chains.map(({ task }) => task))];
  }

  /** Open a bundle by its address, in Node also by its folder. @param {string | URL} url @param {boolean} cache */
  static async open(url, cache = true) {
    if (!globalThis.crypto?.subtle) fail("this page came by http://, where browsers check no files: open it by https://, or on localhost");
    const base = folderOf(url);
    const parts = [];
    for await (const part of arriving(new URL("bundle.json", base), "no-cache")) parts.push(part);
    const text = await new Blob(parts).text();
    try {
      const manifest = JSON.parse(text);
      return new Bundle(base, manifest, cache ? await keptIn(base, manifest) : null);
    } catch (error) {
      if (error instanceof InputError) throw error;
      const what = error instanceof SyntaxError ? "is no JSON" : "is not whole";
      return fail(`${base}bundle.json ${what} (${error}): check the address, or copy it again`);
    }
  }

  /** Return a file's bytes, from the cache if they are right there, else from where the bundle is.
   *  @param {string} file @param {(loaded: number, cached: boolean) => void} told */
  async read(file, told = () => {}) {
    const record = this.manifest.files[file];
    const url = new URL(file.split("/").map(encodeURIComponent).join("/"), this.base);
    if (!record || !url.href.startsWith(this.base.href)) fail(`bundle.json has no record of ${file}; copy it again`);
    const key = keyOf(this.base, record.sha256);
    const kept = await this.#cache?.match(key).catch(() => undefined); // a damaged cache is as good as an empty one
    if (kept?.body) {
      const bytes = await checked(file, record, chunks(kept.body), (loaded) => told(loaded, true)).catch(() => null);
      if (bytes) return bytes;
    }
    const bytes = await checked(file, record, arriving(url, "no-store"), (loaded) => told(loaded, false));
    await this.#cache?.put(key, new Response(streamed(bytes))).catch(() => {}); // without room: downloaded each time
    return bytes;
  }

  /** Return the chains that are loaded for tasks; left out: for the first one. @param {string[]} [tasks] */
  chainsOf(tasks = this.tasks.slice(0, 1)) {
    if (!Array.isArray(tasks)) fail(`tasks=${shown(tasks)}: a list was expected, of ${this.tasks.join(", ")}`);
    return tasks.map((task) => this.find(task));
  }

  /** Return how many bytes tasks (left out: the first one) still have to download. @param {string[]} [tasks] */
  async missing(tasks) {
    const kept = new Set((await this.#cache?.keys().catch(() => []))?.map(({ url }) => url));
    const files = this.#filesOf(this.chainsOf(tasks)).map((file) => this.manifest.files[file]);
    return sum(files.map(({ sha256, size }) => (kept.has(keyOf(this.base, sha256)) ? 0 : size)));
  }

  /** Return the files that chains read: each must be recorded. @param {Chain[]} chains */
  #filesOf(chains) {
    const { graphs, tokenizers, files } = this.manifest;
    const named = chains.flatMap(({ stages, tables_file, feeds }) => [
      tables_file,
      ...idsOf(feeds).map((name) => tokenizers[name].file),
      ...stages.flatMap(({ graph }) => [graphs[graph].file, ...graphs[graph].data]),
    ]);
    const lost = named.find((file) => !Number.isSafeInteger(files[file]?.size));
    if (lost !== undefined) fail(`${this.base}bundle.json has no record of ${lost}; copy it again`);
    return [...new Set(named)];
  }

  /** Return the chain of a task: of this height and width or, without any, of the image's, or the first one.
   *  @param {string} task @param {number} [height] @param {number} [width]
   *  @param {{ height: number, width: number } | null} image */
  find(task, height, width, image = null) {
    const built = this.chains.filter((chain) => chain.task === task);
    const mend = `build another with build-engine SOURCE --tasks ${task}`;
    if (!built.length) fail(`this bundle was built for ${this.tasks.join(", ")}, and not for ${task}; ${mend}`);
    const of = (/** @type {number} */ tall, /** @type {number} */ wide) =>
      built.find(({ size }) => size[0] === tall && size[1] === wide);
    if (height === undefined && width === undefined) {
      return (image && of(image.height & ~7, image.width & ~7)) || built[0];
    }
    const [tall, wide] = [height ?? built[0].size[0], width ?? built[0].size[1]];
    const sizes = built.map(({ size }) => `${size[1]}x${size[0]}`).join(", ");
    const asked = `height=${shown(tall)}, width=${shown(wide)}`;
    return of(tall, wide) ?? fail(`${asked}: this bundle is built for ${sizes}; choose one of these`);
  }

  /** Return what a task is built for, as the server's /about: sizes are [width, height], `strengths` all that there are
   *  (none: any number), and `strength` is the least that makes a step. @param {string} task */
  about(task) {
    const chain = this.find(task);
    const sizes = this.chains.filter((other) => other.task === task).map(({ size }) => [size[1], size[0]]);
    const [steps, strengths] = [stepsOf(chain), valuesOf(chain, "strength")];
    const usual = strengths[0] ?? leastStrength(steps.find((n) => n > 1) ?? steps[0]);
    return { sizes, steps, strengths, strength: task === FROM_TEXT ? null : usual };
  }
}

/** Return the address of a bundle's folder. @param {string | URL} url */
function folderOf(url) {
  const isPath = node && typeof url === "string" && !/^[a-z]{2,}:/i.test(url);
  const here = node ? undefined : (globalThis.document?.baseURI ?? location.href);
  const base = isPath ? node.getBuiltinModule("node:url").pathToFileURL(url || ".") : urlOf(url, here);
  if (!base || !["http:", "https:", "file:"].includes(base.protocol)) {
    return fail(`${shown(url)} is no address: that of a bundle's folder was expected, https:// or beside the page`);
  }
  base.search = base.hash = "";
  base.pathname = base.pathname.replace(/\/?$/, "/");
  return base;
}

/** @param {unknown} url @param {string} [here] */
function urlOf(url, here) {
  if (typeof url !== "string" && !(url instanceof URL)) return null;
  try {
    return new URL(url || ".", here);
  } catch {
    return null;
  }
}

/** @param {Record<string, Feed>} feeds */
const idsOf = (feeds) => Object.keys(feeds).filter((name) => feeds[name].is === "ids");

/** @param {number[]} numbers */
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

/** Return whether a chain makes one picture of what can be fed here. @param {Chain} chain */
function isKnown({ task, batch, feeds }) {
  const known = Object.entries(feeds).every(([name, { is }]) => FEEDS.includes(is === "number" ? name : is));
  return [FROM_TEXT, FROM_IMAGE].includes(task) && batch === 1 && known;
}

/** Return the ends of a stage's graph, by their names in the chain.
 *  @param {Stage} stage @param {Tensor[]} tensors @returns {[string, Tensor][]} */
const wired = (stage, tensors) => tensors.map((tensor) => [stage.wires?.[tensor.name] ?? tensor.name, tensor]);

/** @param {Tensor} tensor */
const sizeOf = ({ shape }) => shape.reduce((size, n) => size * n, 1);

const ARRAYS = { float32: Float32Array, float16: Uint16Array, int32: Int32Array, uint8: Uint8Array };

/** @param {Tensor} tensor */
const zerosOf = (tensor) => new ARRAYS[tensor.dtype](sizeOf(tensor));

/** Return where a browser keeps the files of a bundle, without those of an older bundle; null if it keeps none.
 *  @param {URL} base @param {Manifest} manifest */
async function keptIn(base, manifest) {
  try {
    const cache = await caches.open(`turbochain ${base}`);
    const wanted = new Set(Object.values(manifest.files).map(({ sha256 }) => keyOf(base, sha256)));
    for (const request of await cache.keys()) if (!wanted.has(request.url)) await cache.delete(request);
    return cache;
  } catch {
    return null; // in Node, or if the user lets pages keep nothing
  }
}

/** @param {URL} base @param {string} sha256 */
const keyOf = (base, sha256) => new URL(`?sha256=${sha256}`, base).href;

/** Yield the bytes of an address as they come: browsers fail to read above 2 GB at once.
 *  @param {URL} url @param {RequestCache} cache @returns {AsyncGenerator<Uint8Array<ArrayBuffer>>} */
async function* arriving(url, cache) {
  try {
    if (node && url.protocol === "file:") return yield* node.getBuiltinModule("node:fs").createReadStream(url);
    const answer = await fetch(url, { cache });
    if (!answer.ok || !answer.body) throw new Error(`${answer.status} ${answer.statusText}`);
    yield* chunks(answer.body);
  } catch (error) {
    fail(`${url} cannot be read (${error}): check the address and the connection, and try again`);
  }
}

/** @param {ReadableStream<Uint8Array<ArrayBuffer>>} body */
async function* chunks(body) {
  const reader = body.getReader(); // Safari's streams cannot be iterated
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {}); // nothing more is downloaded of a file that is refused
  }
}

/** Return bytes as a stream: a cache would copy an array as a whole. @param {Uint8Array} bytes */
function streamed(bytes) {
  let at = 0;
  return new ReadableStream({
    pull: (to) => (at < bytes.length ? to.enqueue(bytes.subarray(at, (at += 2 ** 20))) : to.close()),
  });
}

/** Return a file's bytes when all have come and their hash is right; 64 MiB are hashed while the next ones come.
 *  @param {string} file @param {FileRecord} record @param {AsyncIterable<Uint8Array>} parts
 *  @param {(loaded: number) => void} told */
async function checked(file, { size, sha256 }, parts, told) {
  const damaged = (/** @type {string} */ what) =>
    fail(`${file} ${what} of bundle.json; load the page again, or copy the bundle again`);
  const bytes = roomFor(file, size);
  /** @type {Promise<ArrayBuffer>[]} */
  const digests = [];
  const hash = (/** @type {number} */ end) =>
    digests.push(crypto.subtle.digest("SHA-256", bytes.subarray(digests.length * CHUNK, end)));
  let loaded = 0;
  for await (const part of parts) {
    if (loaded + part.length > size) damaged(`has more bytes than the ${size}`);
    bytes.set(part, loaded);
    loaded += part.length;
    while ((digests.length + 1) * CHUNK <= loaded) hash((digests.length + 1) * CHUNK);
    told(loaded);
  }
  if (loaded < size) damaged(`has ${loaded} bytes, and not the ${size}`);
  if (digests.length * CHUNK < size || !size) hash(size);
  const found = await wholeDigest(await Promise.all(digests));
  if (found !== sha256) damaged(`is damaged: it has the SHA-256 ${found}, and not the ${sha256}`);
  return bytes;
}

/** @param {string} file @param {number} size */
function roomFor(file, size) {
  try {
    return new Uint8Array(size);
  } catch (error) {
    return fail(`${file} has ${size} bytes, and there is no memory for them (${error}); use a smaller model`);
  }
}

/** Return the hash of a file by those of its chunks, as FORMAT.md has it. @param {ArrayBuffer[]} digests */
async function wholeDigest(digests) {
  const all = await new Blob(digests).arrayBuffer();
  const whole = digests.length > 1 ? await crypto.subtle.digest("SHA-256", all) : all;
  return Array.from(new Uint8Array(whole), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- tables

/** @typedef {{ shape: number[], data: Float32Array | Int32Array | Uint8Array }} Values */

/** Return the arrays of a safetensors file. @param {Uint8Array} bytes @returns {Map<string, Values>} */
function arraysOf(bytes) {
  const start = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  /** @type {Record<string, new (buffer: ArrayBuffer) => Values["data"]>} */
  const kinds = { F32: Float32Array, I32: Int32Array, BOOL: Uint8Array };
  const read = (/** @type {any} */ { dtype, shape, data_offsets: [from, to] }) =>
    ({ shape, data: new kinds[dtype](bytes.slice(start + from, start + to).buffer) });
  return new Map(Object.entries(header).map(([name, entry]) => [name, read(entry)]));
}

/** @typedef {ReturnType<typeof tableOf>} Table */

/** Return one table of a chain: what the sampler does in every row.
 *  @param {Chain} chain @param {string} name @param {Map<string, Values>} arrays */
function tableOf(chain, name, arrays) {
  const array = (/** @type {string} */ key) =>
    arrays.get(key) ?? fail(`${chain.tables_file} lacks ${key}, which the chain reads; build the bundle again`);
  const rowOf = (/** @type {string} */ key, /** @type {number} */ row) => {
    const { shape, data } = array(key);
    const size = data.length / shape[0];
    return data.subarray(row * size, (row + 1) * size);
  };
  return {
    rows: chain.tables[name].rows,
    sigma: array(`${name}/init_noise_sigma`).data[0],
    /** Return whether a row draws noise. @param {number} row */
    draws: (row) => array(`${name}/draws_noise`).data[row] !== 0,
    /** Return what a column feeds in a row. @param {string} column @param {number} row */
    column(column, row) {
      if (column === "p") return rowOf(`${name}/start`, 0).subarray(0, 1);
      if (column === "q") return rowOf(`${name}/start`, 0).subarray(1);
      if (["m", "v", "w", "input_scale"].includes(column)) return rowOf(`${name}/${column}`, row);
      if (chain.feeds[column].when === "call") return array(`constants/${column}`).data;
      return rowOf(`columns/${column}`, array(`${name}/index`).data[row]);
    },
  };
}

// ---- what a call asks for

/** Return how many steps are made, a product of floats as diffusers'. @param {number} steps @param {number} strength */
const madeOf = (steps, strength) => Math.min(Math.trunc(steps * strength), steps);

/** Return the least strength at which one of `steps` is made. @param {number} steps */
function leastStrength(steps) {
  const strength = 1 / steps;
  return madeOf(steps, strength) ? strength : strength + strength * 2 ** -53; // the next one: 49 · (1/49) is below 1
}

/** @param {Chain} chain */
const stepsOf = (chain) => [...new Set(Object.values(chain.tables).map(({ steps }) => steps))].sort((a, b) => a - b);

/** Return the values that a chain has tables for; none if its tables do not depend on it.
 *  @param {Chain} chain @param {"guidance_scale" | "strength"} argument */
function valuesOf(chain, argument) {
  const values = Object.values(chain.tables).flatMap((table) => table[argument] ?? []);
  return [...new Set(values)].sort((a, b) => a - b);
}

/** Return a value that there are tables for; null if they do not depend on it.
 *  @param {Chain} chain @param {"guidance_scale" | "strength"} argument @param {number} value */
function oneOf(chain, argument, value) {
  const known = valuesOf(chain, argument);
  if (!known.length) return null;
  if (known.includes(value)) return value;
  return fail(`${argument} is ${value}: there are tables for ${known.join(", ")}; choose one of these`);
}

/** Return the name of the table that a call follows.
 *  @param {Chain} chain @param {number | undefined} steps @param {number | undefined} strength @param {number} scale */
function chosenTable(chain, steps, strength, scale) {
  const [built, guidance, usual] = [stepsOf(chain), oneOf(chain, "guidance_scale", scale), chain.defaults?.strength];
  const find = (/** @type {number} */ count, begin = 0, /** @type {number | null} */ of = null) => {
    const [name] = Object.entries(chain.tables).find(
      ([, { steps, begin: skipped = 0, guidance_scale = null, strength = null }]) =>
        steps === count && skipped === begin && guidance_scale === guidance && strength === of,
    ) ?? [""];
    const mend = "choose one of these, or build another with build-engine SOURCE --steps";
    return name || fail(`numInferenceSteps=${shown(count)}: this bundle was built for ${built.join(", ")}; ${mend}`);
  };
  if (usual === undefined && strength !== undefined) fail("strength was given, and no image; leave it out");
  if (usual === undefined) return find(steps ?? built[0]);
  const wanted = strength ?? usual;
  const isShare = typeof wanted === "number" && wanted >= 0 && wanted <= 1;
  if (!isShare) fail(`strength=${shown(wanted)}: a number from 0 to 1 was expected; leave it out for the bundle's`);
  const fixed = oneOf(chain, "strength", wanted);
  if (fixed !== null) return find(steps ?? built[0], 0, fixed);
  const count = steps ?? built.find((n) => madeOf(n, wanted)) ?? built[0];
  const whole = find(count); // if the bundle lacks these steps, that is what has to be said
  const made = madeOf(count, wanted);
  if (made) return made === count ? whole : find(count, count - made);
  const least = leastStrength(count);
  return fail(`numInferenceSteps=${count} at strength=${wanted} makes no step: give more, or a strength of ${least}`);
}

/** Return the guidance scale of a call. @param {Chain} chain @param {number | undefined} given */
function scaleOf(chain, given) {
  const scale = given ?? chain.defaults?.guidance_scale ?? 0;
  const isFinite = typeof scale === "number" && Number.isFinite(Math.fround(scale));
  if (!isFinite) fail(`guidanceScale=${shown(given)}: a finite number was expected; leave it out for the bundle's`);
  const guides = chain.modes?.includes("guidance") || valuesOf(chain, "guidance_scale").length > 0;
  if (scale > 1 && !guides) fail(`guidanceScale=${given}: this bundle has no guidance; leave it out, or give 0`);
  return scale;
}

/** Return the modes of a call. @param {Chain} chain @param {number} scale @param {string | undefined} negativePrompt */
function modesOf({ modes = [] }, scale, negativePrompt) {
  const guided = scale > 1 && modes.includes("guidance");
  if (negativePrompt !== undefined && !guided) console.warn("negativePrompt has no effect without guidance");
  const on = { guidance: guided, negative_prompt: guided && negativePrompt !== undefined };
  return modes.filter((mode) => on[/** @type {keyof typeof on} */ (mode)]);
}

// ---- pictures

const EXPECTED = "pixels {data, width, height} were expected, or in a browser an image, a canvas or a file; give one";

/** Return whether an image is decoded already; if so, its pixels are checked.
 *  @param {Source} image @returns {image is Pixels} */
function isPixels(image) {
  if (typeof image !== "object" || !("data" in image && "width" in image && "height" in image)) return false;
  const { data, width, height } = image;
  const isOfBytes = /^Uint8(Clamped)?Array$/.test(/** @type {any} */ (data)?.[Symbol.toStringTag]); // of any frame
  if (!isOfBytes) fail(`image.data is ${shown(data)}: a Uint8Array or Uint8ClampedArray was expected, of 0 to 255`);
  const isSize = [width, height].every((side) => Number.isInteger(side) && side > 0);
  if (!isSize || ![3, 4].includes(data.length / (width * height))) {
    fail(`image.data has ${data.length} values: RGB or RGBA of ${shown(width)}x${shown(height)} was expected`);
  }
  return true;
}

/** Return a picture as a bitmap: turned as its file says, with the colours that are stored there, as PIL reads it.
 *  @param {Source} image @returns {Promise<ImageBitmap>} */
async function bitmapOf(image) {
  if (!globalThis.createImageBitmap) fail(`image is no decoded picture: ${EXPECTED}`);
  const source = /** @type {ImageBitmapSource} */ (image);
  return createImageBitmap(source, { premultiplyAlpha: "none", colorSpaceConversion: "none" }).catch((error) =>
    fail(`image is no picture that can be decoded (${error}): ${EXPECTED}`),
  );
}

/** Return the levels of a picture, RGB [height, width, 3]. Alpha is dropped; one of another size is drawn on a canvas.
 *  @param {Pixels | ImageBitmap} image @param {number} width @param {number} height */
async function levelsOf(image, width, height) {
  const fits = image.width === width && image.height === height;
  const { data } = fits && "data" in image ? image : await redrawn(image, width, height);
  return copied(data, data.length / (width * height), new Uint8Array(3 * width * height), 3);
}

/** Copy red, green and blue from one array of pixels to another, and return that.
 *  @template {Uint8Array | Uint8ClampedArray} T
 *  @param {Uint8Array | Uint8ClampedArray} from @param {number} step channels of `from`
 *  @param {T} to @param {number} other channels of `to` */
function copied(from, step, to, other) {
  for (let i = 0, j = 0; i < from.length; i += step, j += other) {
    for (let k = 0; k < 3; k++) to[j + k] = from[i + k];
  }
  return to;
}

/** Return pixels as an ImageData, and in Node as an object of the same keys. Those of RGB are opaque.
 *  @param {Uint8Array | Uint8ClampedArray} data @param {number} width @param {number} height */
function imageDataOf(data, width, height) {
  const channels = data.length / (width * height);
  const rgba = new Uint8ClampedArray(4 * width * height).fill(255);
  const all = channels === 4 ? Uint8ClampedArray.from(data) : copied(data, channels, rgba, 4);
  return globalThis.ImageData ? new ImageData(all, width, height) : { data: all, width, height };
}

/** @param {Pixels | ImageBitmap} image @param {number} width @param {number} height */
async function redrawn(image, width, height) {
  const expected = `${width}x${height} was expected; resize it, as there is no canvas in Node`;
  if (!globalThis.OffscreenCanvas) fail(`image is ${image.width}x${image.height}: ${expected}`);
  const canvas = new OffscreenCanvas(width, height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingQuality = "high";
  const pixels = "data" in image ? await bitmapOf(imageDataOf(image.data, image.width, image.height)) : image;
  context.drawImage(pixels, 0, 0, width, height);
  try {
    return context.getImageData(0, 0, width, height);
  } catch (error) {
    return fail(`image cannot be read (${error}): one of this site was expected, or one that is fetched with CORS`);
  }
}

/** Return levels as a picture; throws Error if all are equal. @param {Uint8Array} levels @param {number[]} size */
function pictureOf(levels, [height, width]) {
  if (levels.every((level) => level === levels[0])) throw new Error("the model made a picture of one single value");
  return imageDataOf(levels, width, height);
}

// ---- backends

/** @typedef {typeof import("onnxruntime-common")} Ort */

/** Return what this browser has for WebGPU; `f16`: 16-bit numbers, which a graph of that precision needs. */
export async function support() {
  const gpu = /** @type {any} */ (globalThis.navigator)?.gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  return { webgpu: Boolean(adapter), f16: Boolean(adapter?.features.has("shader-f16")) };
}

/** The GPU that graphs run on with WebGPU, if ONNX Runtime must not open it. @type {Promise<any> | undefined} */
let device;

/** Return how ONNX Runtime is told of a backend. Its MultiHeadAttention for WebGPU is wrong with subgroups of fewer
 *  than 8 (SwiftShader's have 4), and right on a GPU that is opened without any. @param {Backend} backend */
async function provider(backend) {
  if (backend !== "webgpu") return backend;
  device ??= (async () => {
    const adapter = await /** @type {any} */ (navigator).gpu.requestAdapter();
    if (!(adapter.info?.subgroupMinSize < 8)) return undefined;
    const requiredFeatures = [...adapter.features].filter((name) => !name.startsWith("subgroup"));
    /** @type {Record<string, number>} */
    const requiredLimits = {};
    for (const name in adapter.limits) requiredLimits[name] = adapter.limits[name]; // they are its prototype's
    return adapter.requestDevice({ requiredFeatures, requiredLimits });
  })();
  const opened = await device;
  return opened ? { name: /** @type {const} */ ("webgpu"), device: opened } : backend;
}

/** Return the backend to run a bundle on: the one that is asked for, or the best that there is.
 *  @param {Bundle} bundle @param {Backend} [asked] @returns {Promise<Backend>} */
async function chosen({ chains, manifest }, asked) {
  const known = node ? ["cpu"] : ["webgpu", "wasm"];
  if (asked && !known.includes(asked)) fail(`backend=${shown(asked)}: choose from ${known.join(", ")}`);
  if (node) return "cpu";
  const graphs = chains.flatMap(({ stages }) => stages.map(({ graph }) => manifest.graphs[graph]));
  const halves = graphs.filter(({ precision }) => precision === "fp16");
  const weights = [...new Set(graphs.flatMap(({ data }) => data)), ...new Set(halves.flatMap(({ data }) => data))];
  const bytes = sum(weights.map((file) => manifest.files[file].size)); // WASM has them in float32
  const has = asked === "wasm" ? { webgpu: false, f16: false } : await support(); // not asked, Chromium does not warn
  const lacks = has.webgpu ? (halves.length && !has.f16 ? "WebGPU with shader-f16" : "") : "WebGPU";
  if (!lacks) return "webgpu";
  if (asked !== "webgpu" && bytes < 2 ** 31) return "wasm";
  const large = `the model has ${(bytes / 2 ** 30).toFixed(1)} GiB of weights, and WASM has room for 2`;
  if (asked === "wasm") fail(`${large}: use WebGPU`);
  const mend = asked && bytes < 2 ** 31 ? "use WASM" : "use a browser and a GPU that have it";
  return fail(`this browser has no ${lacks}${asked ? "" : `, and ${large}`}: ${mend}`);
}

/** Where a package is, by its name, if that alone does not say it: no import map applies in a worker.
 *  @type {Record<string, string>} */
export const packages = {};

/** Return a package's module. @param {string} name @param {() => Promise<any>} usual as a bundler understands it */
async function imported(name, usual) {
  try {
    const address = packages[name];
    const found = await (address ? import(/* webpackIgnore: true */ /* @vite-ignore */ address) : usual());
    return found.default?.InferenceSession ? found.default : found; // onnxruntime-node is a CommonJS package
  } catch (error) {
    return fail(`${name} cannot be imported (${error}): install it with npm, or name it in the import map`);
  }
}

/** The package of each backend. @type {Record<Backend, [string, () => Promise<any>]>} */
const RUNTIMES = {
  webgpu: ["onnxruntime-web/webgpu", () => import("onnxruntime-web/webgpu")],
  wasm: ["onnxruntime-web/wasm", () => import("onnxruntime-web/wasm")],
  cpu: ["onnxruntime-node", () => import(/* webpackIgnore: true */ /* @vite-ignore */ "onnxruntime-node")],
};

// ---- the pipeline

/** @typedef {import("onnxruntime-common").Tensor} Value */
/** @typedef {import("onnxruntime-common").InferenceSession} Session */
/** @typedef {(prompt: string, options?: CallOptions) => Promise<Picture>} Call */
/** @typedef {Awaited<ReturnType<typeof askedOf>>} Asked */

const CALL_OPTIONS = [
  ...["seed", "numInferenceSteps", "image", "strength", "guidanceScale", "negativePrompt", "height", "width"],
  ...["signal", "observe"],
];

/** Return what a call asks for, checked, with its image decoded.
 *  @param {Bundle} bundle @param {string} prompt @param {CallOptions} options */
async function askedOf(bundle, prompt, options) {
  const given = optionsOf("a call", options, CALL_OPTIONS);
  const { seed = crypto.getRandomValues(new Uint32Array(1))[0], image: source, signal, negativePrompt } = given;
  const isSignal = signal === undefined || typeof signal?.throwIfAborted === "function";
  if (!isSignal) fail(`signal=${shown(signal)}: an AbortSignal was expected`);
  const image = source === undefined || source === null ? null : isPixels(source) ? source : await bitmapOf(source);
  const chain = bundle.find(image ? FROM_IMAGE : FROM_TEXT, given.height, given.width, image);
  const [height, width] = chain.size;
  const scale = scaleOf(chain, given.guidanceScale);
  return {
    chain,
    seed,
    scale,
    signal,
    table: chosenTable(chain, given.numInferenceSteps, given.strength, scale),
    modes: modesOf(chain, scale, negativePrompt),
    texts: new Map([
      ["prompt", checkPrompt("prompt", prompt)],
      ["negative_prompt", checkPrompt("negativePrompt", negativePrompt ?? "")],
    ]),
    generator: new Generator(seed),
    observe: functionOf("observe", given.observe),
    levels: image && (await levelsOf(image, width, height)),
    resized: image !== null && (image.width !== width || image.height !== height),
  };
}

/** A call under way: the stages that run in its modes, and what goes from one to the other. */
class Execution {
  /** @type {Map<string, Value>} */
  #values = new Map();
  /** @type {Value[]} */
  #results = [];
  #asked;
  #rows;
  #feed;
  /** @type {{ session: Session, stage: Stage, inputs: [string, Tensor][], outputs: [string, Tensor][] }[]} */
  #stages;

  /** @param {Asked} asked @param {Record<string, Graph>} graphs @param {Map<string, Session>} sessions
   *  @param {number} rows of the loop @param {(name: string, row: number) => Value} feed */
  constructor(asked, graphs, sessions, rows, feed) {
    const has = (/** @type {string} */ mode) => asked.modes.includes(mode);
    const stages = asked.chain.stages.filter((of) => (of.if ?? []).every(has) && !(of.unless ?? []).some(has));
    this.#asked = asked;
    this.#rows = rows;
    this.#feed = feed;
    this.#stages = stages.map((stage) => ({
      stage,
      session: /** @type {Session} */ (sessions.get(stage.graph)),
      inputs: wired(stage, graphs[stage.graph].inputs),
      outputs: wired(stage, graphs[stage.graph].outputs),
    }));
  }

  /** Return the picture. Throws Error if the latents or the picture are none. */
  async picture() {
    const { carry, output, size } = this.#asked.chain;
    try {
      this.#take(["call", "held"]);
      await this.#run(["prompt", "image"]);
      for (let row = 0; row < this.#rows; row++) {
        if (row) for (const [source, target] of Object.entries(carry)) this.#values.set(target, this.#value(source));
        this.#take(["step"], row);
        await this.#run(["step"], row);
      }
      await this.#run(["end"]);
      for (const name of Object.keys(carry)) {
        const state = /** @type {Float32Array} */ (await this.#value(name).getData());
        if (!state.every(Number.isFinite)) throw new Error("the model made NaN or infinite latents");
      }
      return pictureOf(/** @type {Uint8Array} */ (await this.#value(output).getData()), size);
    } finally {
      for (const result of this.#results) if (result.location === "gpu-buffer") result.dispose();
    }
  }

  /** @param {string} name */
  #value(name) {
    return /** @type {Value} */ (this.#values.get(name));
  }

  /** Take the feeds that are read; zeros stand for what a graph makes in other modes. @param {string[]} when */
  #take(when, row = 0) {
    const { feeds } = this.#asked.chain;
    const names = (/** @type {"inputs" | "outputs"} */ ends) =>
      new Set(this.#stages.flatMap((stage) => stage[ends].map(([name]) => name)));
    const [read, made] = [names("inputs"), names("outputs")];
    for (const [name, feed] of Object.entries(feeds)) {
      const isRead = read.has(name) && (feed.is !== "zeros" || !made.has(name));
      if (isRead && when.includes(feed.when)) this.#values.set(name, this.#feed(name, row));
    }
  }

  /** Run the stages of these places. @param {string[]} places @param {number | null} row */
  async #run(places, row = null) {
    const { signal, observe } = this.#asked;
    for (const { session, stage, inputs, outputs } of this.#stages) {
      if (!places.includes(stage.when)) continue;
      signal?.throwIfAborted();
      const given = inputs.map(([name, { name: own }]) => [own, this.#value(name)]);
      const found = await session.run(Object.fromEntries(given));
      for (const [name, { name: own }] of outputs) this.#values.set(name, found[own]);
      this.#results.push(...Object.values(found));
      observe({ stage: stage.graph, row, rows: this.#rows });
      if (!node) await new Promise((resolve) => setTimeout(resolve)); // else a worker hears of no abort
    }
  }
}

/** Reads files that several readers share, and tells how much of all has come. */
class Reader {
  #bundle;
  #progress;
  #total;
  #before = 0;
  /** @type {Map<string, Uint8Array>} */
  #bytes = new Map();
  /** @type {Map<string, number>} */
  #uses = new Map();

  /** @param {Bundle} bundle @param {string[]} files each as often as it will be read
   *  @param {(progress: Progress) => void} progress */
  constructor(bundle, files, progress) {
    this.#bundle = bundle;
    this.#progress = progress;
    for (const file of files) this.#uses.set(file, (this.#uses.get(file) ?? 0) + 1);
    this.#total = sum([...this.#uses.keys()].map((file) => bundle.manifest.files[file].size));
  }

  /** Return a file's bytes, which are kept until they are read for the last time. @param {string} file */
  async read(file) {
    const told = (/** @type {number} */ loaded, /** @type {boolean} */ cached) =>
      this.#progress({ loaded: this.#before + loaded, total: this.#total, file, cached });
    const known = this.#bytes.get(file);
    const bytes = known ?? (await this.#bundle.read(file, told));
    if (!known) this.#before += bytes.length;
    const uses = /** @type {number} */ (this.#uses.get(file)) - 1;
    this.#uses.set(file, uses);
    if (uses) this.#bytes.set(file, bytes);
    else this.#bytes.delete(file);
    return bytes;
  }
}

/** A function that has the methods of its class. */
class Callable {
  /** @param {Call} call */
  constructor(call) {
    return Object.setPrototypeOf(call, new.target.prototype);
  }
}

/** A loaded bundle, which is called with a prompt; `load` makes one. One call at a time is drawn, the others wait. */
export class Pipeline extends Callable {
  #bundle;
  #ort;
  #progress;
  /** @type {Map<string, Session>} */
  #sessions = new Map();
  /** @type {Map<string, Tokenizer>} */
  #tokenizers = new Map();
  /** @type {Map<string, Map<string, Values>>} */
  #tables = new Map();
  /** @type {Promise<unknown>} */
  #turn = Promise.resolve();
  #closed = false;

  /** @param {Bundle} bundle @param {Backend} backend @param {Ort} ort @param {(progress: Progress) => void} progress */
  constructor(bundle, backend, ort, progress = () => {}) {
    super((prompt, options) => this.#draw(prompt, options));
    this.#bundle = bundle;
    this.#ort = ort;
    this.#progress = progress;
    this.backend = backend;
  }

  /** Load a bundle from its address, in Node also its folder. Throws InputError if it is damaged or cannot run here.
   *  @param {string | URL | Bundle} source @param {LoadOptions} options @returns {Promise<Pipeline & Call>} */
  static async load(source, options = {}) {
    const given = optionsOf("Pipeline.load", options, ["backend", "tasks", "progress", "cache"]);
    const { backend, tasks, cache } = given;
    const progress = functionOf("progress", given.progress);
    const bundle = source instanceof Bundle ? source : await Bundle.open(source, cache);
    const found = await chosen(bundle, backend);
    bundle.chainsOf(tasks);
    const ort = await imported(...RUNTIMES[found]);
    const pipe = /** @type {Pipeline & Call} */ (new Pipeline(bundle, found, ort, progress));
    try {
      await pipe.prepare(tasks);
    } catch (error) {
      await pipe.close();
      throw error;
    }
    return pipe;
  }

  /** Load the graphs of tasks (left out: the first one's) now, and not when they are used. @param {string[]} [tasks] */
  prepare(tasks) {
    return this.#alone(() => this.#load(this.#bundle.chainsOf(tasks)));
  }

  /** What each task is built for; see `Bundle.about`. */
  get tasks() {
    return Object.fromEntries(this.#bundle.tasks.map((task) => [task, this.#bundle.about(task)]));
  }

  /** Give back the memory of the graphs, when the calls that wait have ended. */
  close() {
    return this.#alone(async () => {
      this.#closed = true;
      for (const session of this.#sessions.values()) await session.release();
      this.#sessions.clear();
    });
  }

  /** Do some work after all that was begun earlier. @template T @param {() => Promise<T>} work @returns {Promise<T>} */
  #alone(work) {
    const done = this.#turn.then(work);
    this.#turn = done.catch(() => {});
    return done;
  }

  /** @type {Call} */
  async #draw(prompt, options = {}) {
    const asked = await askedOf(this.#bundle, prompt, options);
    const { chain, table: name, signal, seed, resized } = asked;
    return this.#alone(async () => {
      signal?.throwIfAborted();
      await this.#load([chain]);
      const table = tableOf(chain, name, /** @type {Map<string, Values>} */ (this.#tables.get(chain.tables_file)));
      const feed = this.#feeds(asked, table);
      const execution = new Execution(asked, this.#bundle.manifest.graphs, this.#sessions, table.rows, feed);
      return Object.assign(await execution.picture(), { seed, resized });
    });
  }

  /** Return what feeds a call: a feed's value in a row. @param {Asked} asked @param {Table} table */
  #feeds({ chain, texts, scale, levels, generator }, table) {
    const { graphs, tokenizers } = this.#bundle.manifest;
    /** @type {Record<string, Tensor>} */
    const tensors = Object.fromEntries(
      chain.stages.flatMap((stage) => wired(stage, [...graphs[stage.graph].inputs, ...graphs[stage.graph].outputs])),
    );
    const noise = noiseOf(chain, table, tensors, generator);
    /** @type {Record<string, (feed: string, row: number) => Value["data"]>} */
    const kinds = {
      ids: (feed) => {
        const tokenizer = /** @type {Tokenizer} */ (this.#tokenizers.get(JSON.stringify(tokenizers[feed])));
        return tokenizer.encode(/** @type {string} */ (texts.get(chain.feeds[feed].of || "prompt")));
      },
      noise: (feed, row) => noise[feed][row],
      column: (feed, row) => table.column(feed, row),
      number: () => Float32Array.of(scale),
      image: () => /** @type {Uint8Array} */ (levels),
      history: (feed) => zerosOf(tensors[feed]),
      zeros: (feed) => zerosOf(tensors[feed]),
    };
    return (/** @type {string} */ name, /** @type {number} */ row) =>
      new this.#ort.Tensor(tensors[name].dtype, kinds[chain.feeds[name].is](name, row), tensors[name].shape);
  }

  /** Load what chains read and none before has read: tables, tokenizers, graphs. @param {Chain[]} chains */
  async #load(chains) {
    if (this.#closed) fail("the pipeline is closed; load it again");
    const { graphs, tokenizers } = this.#bundle.manifest;
    const lacking = (/** @type {string[]} */ names, /** @type {Map<string, unknown>} */ known) =>
      [...new Set(names)].filter((name) => !known.has(name));
    const tables = lacking(chains.map(({ tables_file }) => tables_file), this.#tables);
    const ids = chains.flatMap(({ feeds }) => idsOf(feeds));
    const entries = lacking(ids.map((feed) => JSON.stringify(tokenizers[feed])), this.#tokenizers);
    const names = lacking(chains.flatMap(({ stages }) => stages.map(({ graph }) => graph)), this.#sessions);
    const fileOf = (/** @type {string} */ entry) => JSON.parse(entry).file;
    const filesOf = (/** @type {string} */ name) => [graphs[name].file, ...graphs[name].data];
    const files = [...tables, ...entries.map(fileOf), ...names.flatMap(filesOf)];
    const reader = new Reader(this.#bundle, files, this.#progress);
    for (const file of tables) this.#tables.set(file, arraysOf(await reader.read(file)));
    for (const entry of entries) {
      this.#tokenizers.set(entry, await Tokenizer.read(await reader.read(fileOf(entry)), JSON.parse(entry)));
    }
    for (const name of names) this.#sessions.set(name, await this.#session(graphs[name], reader));
  }

  /** @param {Graph} graph @param {Reader} reader */
  async #session({ file, data, outputs }, reader) {
    const externalData = [];
    for (const part of data) {
      externalData.push({ path: part.slice(part.lastIndexOf("/") + 1), data: await reader.read(part) });
    }
    const places = outputs.map(({ name, dtype }) => [name, dtype === "uint8" ? "cpu" : "gpu-buffer"]);
    return this.#ort.InferenceSession.create(await reader.read(file), {
      executionProviders: [await provider(this.backend)],
      externalData,
      preferredOutputLocation: this.backend === "webgpu" ? Object.fromEntries(places) : "cpu",
      logSeverityLevel: 3,
    });
  }
}
