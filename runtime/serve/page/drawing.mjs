// The worker of local.mjs: it loads the pipeline and draws, so that the page waits for neither.

import { InputError, Pipeline, support } from "../turbochain.mjs";

const PAUSE = 100; // ms between two words on the download

let pipe = null;
let drawing = null; // the AbortController of what is being drawn

const tell = (type, detail) => postMessage([type, detail]);

onmessage = ({ data: [what, detail] }) => ({ load, draw, cancel: () => drawing?.abort() })[what](detail);

async function load({ bundle, packages, backend, most }) {
  try {
    pipe = await Pipeline.load(bundle, { backend, packages, progress: slowly(progress) });
    tell("loaded", { backend: pipe.backend, support: await support() });
  } catch (error) {
    tell("failed", { message: message("The model could not be loaded", error) });
  }
}
