// The worker of local.mjs: it loads the pipeline and draws, so that the page waits for neither.

import { Bundle, InputError, Pipeline, packages, support } from "../turbochain.mjs";

const PAUSE = 100; // ms between two words about the download

let pipe = null;
let drawing = null; // ends what is being drawn
let word = 0; // when the next one may be said

const tell = (type, detail) => postMessage([type, detail]);
const what = { load, draw, cancel: () => drawing?.abort() };

onmessage = ({ data: [type, detail] }) => what[type](detail);

// Load a bundle, unless there are more than `most` bytes to download.
async function load({ address, addresses, backend, most }) {
  Object.assign(packages, addresses);
  try {
    const bundle = await Bundle.open(address);
    pipe = await Pipeline.load(bundle, { backend, progress, tasks: [] });
    tell("about", { models: [{ name: "", tasks: pipe.tasks }], loras: [] });
    const missing = await bundle.missing();
    if (missing > most) {
      tell("offer", missing);
      return;
    }
    await pipe.prepare();
    tell("loaded", { backend: pipe.backend, support: await support() });
  } catch (error) {
    tell("failed", sentence(error));
  }
}

function progress({ loaded, total }) {
  const now = performance.now();
  if (loaded < total && now < word) return;
  word = now + PAUSE;
  tell("download", { loaded, total });
}

// Draw a request of the page, {prompt, seed, …}; `image`: a file's bytes.
async function draw({ id, request, image, format }) {
  const { prompt, seed, num_inference_steps: numInferenceSteps, strength, size } = request;
  const [width, height] = size?.split("x").map(Number) ?? [];
  drawing = new AbortController();
  const { signal } = drawing;
  const observe = ({ row, rows }) => row === null || tell("row", { row: row + 1, rows });
  const start = performance.now();
  try {
    const from = image && new Blob([image], { type: format });
    const call = { seed, numInferenceSteps, strength, width, height, signal, observe };
    const picture = await pipe(prompt, { ...call, image: from });
    const drawn = performance.now() - start;
    tell("picture", { id, drawn, file: await png(picture) });
  } catch (error) {
    if (signal.aborted) tell("cancelled");
    else tell("error", { id, code: "failed", message: sentence(error) });
  }
}

function png(picture) {
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

// Return what went wrong; only an InputError was foreseen.
function sentence(error) {
  return error instanceof InputError ? error.message : `The model has failed: ${error.message}. Load the page again.`;
}
