// What test_node.py asks of turbochain.mjs: a line of JSON in, a line of JSON out; values are base64.

import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";
import { Bundle, Generator, Pipeline, Tokenizer } from "./turbochain.mjs";

const pipes = new Map();

const ANSWERS = {
  // Successive draws of one generator; a seed is a number, or a string for a BigInt.
  noise({ seed, counts }) {
    const generator = new Generator(seedOf(seed));
    return counts.map((count) => base64(generator.randn(count)));
  },
  async ids({ file, entry, prompts }) {
    const tokenizer = await Tokenizer.read(await readFile(file), entry);
    return prompts.map((prompt) => base64(tokenizer.encode(prompt)));
  },
  async load({ pipe, url, tasks }) {
    const told = [];
    pipes.set(pipe, await Pipeline.load(url, { tasks, progress: (progress) => told.push(progress) }));
    return { tasks: pipes.get(pipe).tasks, backend: pipes.get(pipe).backend, told };
  },
  // A call; `end`: after how many graphs it is cancelled.
  async draw({ pipe, prompt, options, image, end }) {
    const stages = [];
    const ending = new AbortController();
    const observe = ({ stage }) => stages.push(stage) === end && ending.abort();
    const more = image ? { image: { ...image, data: Buffer.from(image.data, "base64") } } : {};
    if ("seed" in options) more.seed = seedOf(options.seed);
    const picture = await pipes.get(pipe)(prompt, { ...options, ...more, observe, signal: ending.signal });
    return { width: picture.width, height: picture.height, data: base64(picture.data), seed: `${picture.seed}`, stages };
  },
  // What odd calls of JavaScript are answered with, of an image of this size.
  async odd({ pipe, url, width, height }) {
    const draw = pipes.get(pipe);
    const data = new Uint8Array(3 * width * height).map((_, i) => i);
    const image = (more) => draw("a", { seed: 1, image: { data, width, height, ...more } });
    const calls = {
      "floats": () => image({ data: Float32Array.from(data) }),
      "16 bits": () => image({ data: Uint16Array.from(data) }),
      "signed": () => image({ data: Int8Array.from(data) }),
      "numbers": () => image({ data: [...data] }),
      "a text": () => image({ data: "x".repeat(data.length) }),
      "no data": () => image({ data: null }),
      "a row too few": () => image({ data: data.subarray(3 * width) }),
      "gray": () => image({ data: data.subarray(0, width * height) }),
      "a width of text": () => image({ width: `${width}` }),
      "half a pixel": () => image({ width: width + 0.5 }),
      "a file": () => draw("a", { image: new Blob([data]) }),
      "a buffer": () => draw("a", { image: data }),
      "a number for an image": () => draw("a", { image: 0 }),
      "a list of prompts": () => draw(["a", "b"]),
      "no prompt": () => draw(),
      "a text for options": () => draw("a", "seed"),
      "a number for options": () => draw("a", 5),
      "a seed of text": () => draw("a", { seed: "7" }),
      "a seed that is rounded": () => draw("a", { seed: 2 ** 53 }),
      "no signal": () => draw("a", { signal: new AbortController() }),
      "no observer": () => draw("a", { observe: {} }),
      "steps of text": () => draw("a", { numInferenceSteps: "1" }),
      "another option to load": () => Pipeline.load(url, { bakend: "cpu" }),
      "no progress": () => Pipeline.load(url, { progress: 5 }),
      "tasks of text": () => Pipeline.load(url, { tasks: "text-to-image" }),
      "a task that there is not": () => Pipeline.load(url, { tasks: ["inpainting"] }),
      "a browser's backend": () => Pipeline.load(url, { backend: "webgpu" }),
      "no address": () => Pipeline.load(undefined),
      "half an address": () => Pipeline.load("http://["),
      "text for an address": () => Pipeline.load("data:text/html,x"),
    };
    const answer = (call) => call().then(String, (error) => error.name);
    return Object.fromEntries(await Promise.all(Object.entries(calls).map(async ([n, call]) => [n, await answer(call)])));
  },
  async read({ url, file }) {
    const told = [];
    const bundle = await Bundle.open(url);
    await bundle.read(file, (loaded) => told.push(loaded));
    return told.at(-1);
  },
};

const seedOf = (seed) => (typeof seed === "string" ? BigInt(seed) : seed);
const base64 = ({ buffer, byteOffset, byteLength }) => Buffer.from(buffer, byteOffset, byteLength).toString("base64");

for await (const line of createInterface({ input: process.stdin })) {
  const { ask, ...what } = JSON.parse(line);
  const answer = await (async () => ANSWERS[ask](what))().then(
    (value) => ({ value }),
    (error) => ({ error: error.name, message: error.message }),
  );
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
