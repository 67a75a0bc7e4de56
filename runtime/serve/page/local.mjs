// The pipeline in this browser, in the place of the server: a worker draws, one picture at a time, the newest request's.

const MUCH = 200e6; // bytes; so large a model is downloaded when somebody has asked for it
const NAMES = { webgpu: "WebGPU", wasm: "WebAssembly" };
const PACKAGES = ["onnxruntime-web/webgpu", "onnxruntime-web/wasm", "@huggingface/tokenizers"];

export class Local extends EventTarget {
  // Events: those of live.mjs, without "key", and "download" ({loaded, total} in bytes; null when all is here), "offer"
  // (it goes on with `connect`; detail: the bytes that it would download, or null after a failure), "backend" ({name,
  // missing}; `missing`: a sentence, or empty) and "row" ({row, rows}: the steps that are made).

  format = "image/png"; // of the pictures that it is sent: nothing is lost, and nothing is sent far
  #address;
  #worker = null;
  #ready = false;
  #id = 0;
  #unanswered = null; // the newest request
  #drawn = null; // the one that the worker draws

  constructor(address) {
    super();
    this.#address = new URL(address, document.baseURI).href;
  }

  // Load the model; a large download begins if it was `agreed`.
  connect({ agreed = false } = {}) {
    this.#end();
    this.#tell("state", { state: "connecting", text: "Loading" });
    this.#worker = new Worker(new URL("drawing.mjs", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data: [type, detail] }) => this.#heard[type](detail);
    this.#worker.onerror = (event) => {
      event.preventDefault();
      this.#heard.failed("The model's worker has failed: it may have run out of memory. Load the page again.");
    };
    // The import map is the document's alone: the worker is told where the packages are.
    const addresses = Object.fromEntries(PACKAGES.map((name) => [name, import.meta.resolve(name)]));
    const backend = new URLSearchParams(location.search).get("backend") ?? undefined;
    const most = agreed ? Infinity : MUCH;
    this.#worker.postMessage(["load", { address: this.#address, addresses, backend, most }]);
  }

  // Draw a request, {prompt, seed, …}; `image`: the bytes of the file of a picture to start from. Returns its id, which
  // grows. It ends what is being drawn, unless that is the same picture in other steps.
  send(request, image = null) {
    this.#unanswered = { id: ++this.#id, request, image };
    if (this.#drawn && !alike(this.#unanswered, this.#drawn)) this.#worker.postMessage(["cancel"]);
    this.#next();
    return this.#id;
  }

  get waiting() {
    return this.#unanswered !== null;
  }

  #next() {
    if (!this.#ready || this.#drawn || !this.#unanswered) return;
    this.#drawn = this.#unanswered;
    this.#worker.postMessage(["draw", { ...this.#drawn, format: this.format }]);
  }

  // What the worker says.
  #heard = {
    about: (detail) => this.#tell("about", detail),
    download: (detail) => this.#tell("download", detail),
    row: (detail) => this.#tell("row", detail),
    offer: (bytes) => {
      this.#end();
      this.#tell("state", { state: "connecting", text: "Not loaded" });
      this.#tell("offer", bytes);
    },
    loaded: ({ backend, support }) => {
      this.#ready = true;
      this.#tell("download", null);
      this.#tell("backend", { name: NAMES[backend], missing: missing(backend, support) });
      this.#tell("state", { state: "open", text: NAMES[backend] });
      this.#next();
    },
    failed: (message) => {
      this.#end();
      this.#tell("state", { state: "lost", text: "Not loaded" });
      this.#tell("error", { id: null, code: "failed", message });
      this.#tell("offer", null);
    },
    picture: (detail) => this.#answered("picture", { ms: null, ...detail }),
    error: (detail) => this.#answered("error", detail),
    cancelled: () => this.#answered(null),
  };

  #answered(type, detail) {
    if (this.#unanswered?.id === detail?.id) this.#unanswered = null;
    this.#drawn = null;
    this.#tell("download", null);
    if (type) this.#tell(type, detail);
    this.#next();
  }

  #end() {
    this.#worker?.terminate();
    this.#worker = this.#drawn = null;
    this.#ready = false;
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

function alike(one, other) {
  const same = ({ request }) => JSON.stringify({ ...request, num_inference_steps: 0 });
  return one.image === other.image && same(one) === same(other);
}

// Say why the graphics card is not used, if it is not.
function missing(backend, { webgpu, f16 }) {
  if (backend === "webgpu" || (webgpu && f16)) return "";
  const lack = webgpu ? "The graphics card offers no 16-bit numbers (shader-f16)" : "This browser offers no WebGPU";
  return `${lack}: the processor draws, which takes longer.`;
}
