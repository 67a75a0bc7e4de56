// The controls: what is typed and set becomes requests, and the answers are shown.

import { Gallery } from "./gallery.mjs";
import { Camera, jpeg } from "./images.mjs";
import { Live } from "./live.mjs";

const SILENCE = 400; // ms without a change after which the slider's step count is drawn
const SLOW = 250; // ms after which the page says that it waits
const USUAL_STEPS = 4; // the slider begins at the most steps up to this
const TEXT_TO_IMAGE = "text-to-image";
const IMAGE_TO_IMAGE = "image-to-image";

const $ = (id) => document.getElementById(id);
const live = new Live();
const camera = new Camera($("camera"));
const gallery = new Gallery($("gallery"), $("gallery-section"), showAgain);

let about = null;
let image = null; // {bitmap, bytes, url} to start from
let last = null; // the newest request: {id, request, image, quick, keep}, and when it is drawn its file
let shown = null; // one of them
const sent = new Map(); // those that may still be answered, by id
let turns = 0; // pictures that have come, or were chosen from the gallery
let shownTurn = 0;
let silence = 0;
let slow = 0;

// ---- what is set

const model = () => about.models.find(({ name }) => name === $("model").value) ?? about.models[0];
const starts = () => Boolean(image || camera.on);
const task = () => model().tasks[starts() ? IMAGE_TO_IMAGE : TEXT_TO_IMAGE] ?? Object.values(model().tasks)[0];
const size = () => task().sizes[$("size").selectedIndex] ?? task().sizes[0];

function strength() {
  const { strengths } = task();
  const value = Number($("strength").value);
  return strengths.length ? strengths[value] : value;
}

// Return the step counts that are built, and of which this strength leaves a step.
function counts() {
  const { steps, strengths } = task();
  const made = steps.filter((n) => !starts() || strengths.length || Math.floor(n * strength()) >= 1);
  return made.length ? made : steps;
}

const steps = () => counts()[Math.min($("steps").value, counts().length - 1)];

function seed() {
  const value = Math.floor(Number($("seed").value));
  return Math.min(Math.max(value || 0, 0), 2 ** 32 - 1);
}

function request(count) {
  const made = { prompt: $("prompt").value, seed: seed(), num_inference_steps: count };
  if (about.models.length > 1) made.model = model().name;
  if (task().sizes.length > 1) made.size = size().join("x");
  if (starts()) made.strength = strength();
  return made;
}

// ---- drawing

// Draw at once with the fewest steps, and after a silence with the slider's; if `settled`, with the slider's at once.
function changed({ settled = false } = {}) {
  if (!about) return;
  clearTimeout(silence);
  if (camera.on) return; // its next frame is drawn with what is set now
  if (starts() && !(IMAGE_TO_IMAGE in model().tasks)) return;
  const quick = !settled && steps() !== counts()[0];
  send(quick ? counts()[0] : steps(), { quick });
  silence = setTimeout(rest, settled ? 0 : SILENCE);
}

function send(count, more = {}, bytes = image?.bytes) {
  last = { request: request(count), image, ...more };
  last.id = live.send(last.request, bytes);
  sent.set(last.id, last);
  clearTimeout(slow);
  slow = setTimeout(() => live.waiting && waits(), SLOW);
}

// Nothing was changed for a while: what is set now is worth keeping.
function rest() {
  if (last.quick) send(steps());
  last.keep = true;
  if (shown === last) keep();
}

function waits() {
  $("frame").dataset.drawing = "";
  $("latency").textContent = "Drawing…";
}

function keep() {
  gallery.add(shown);
  $("status").textContent = `Picture ready: ${count(shown.request.num_inference_steps)}, seed ${shown.request.seed}`;
}

const count = (n) => (n === 1 ? "1 step" : `${n} steps`);

live.addEventListener("picture", async ({ detail: { id, ms, drawn, file } }) => {
  const made = sent.get(id);
  if (!made) return; // older than one that has come
  for (const other of sent.keys()) if (other <= id) sent.delete(other);
  made.file = new Blob([file], { type: "image/jpeg" });
  const turn = ++turns;
  const bitmap = await createImageBitmap(made.file); // quicker than an <img>, which would fetch it by a URL
  if (turn < shownTurn) return;
  show(made, bitmap, turn);
  if (!live.waiting) {
    clearTimeout(slow);
    delete $("frame").dataset.drawing;
    const took = ms === null ? "" : `${Math.round(ms)} ms · `;
    $("latency").textContent = `${took}${Math.round(drawn)} ms drawing · ${count(made.request.num_inference_steps)}`;
  }
  if (made.keep) keep();
});

function show(picture, bitmap, turn) {
  shown = picture;
  shownTurn = turn;
  const canvas = $("picture");
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
  canvas.getContext("bitmaprenderer").transferFromImageBitmap(bitmap);
  canvas.setAttribute("aria-label", picture.request.prompt || "A picture without a prompt");
  canvas.hidden = false;
  $("empty").hidden = true;
  $("save").disabled = false;
  $("problem").textContent = "";
}

async function showAgain(picture) {
  const { prompt, seed, strength: wanted, num_inference_steps: n, model: name } = picture.request;
  clearTimeout(silence);
  sent.clear();
  if (camera.on) stopCamera();
  image = picture.image;
  if (name) $("model").value = name;
  $("prompt").value = prompt;
  $("seed").value = seed;
  if (wanted !== undefined) $("strength").value = task().strengths.length ? task().strengths.indexOf(wanted) : wanted;
  arrange();
  $("steps").value = Math.max(counts().indexOf(n), 0);
  label();
  const turn = ++turns;
  show(picture, await createImageBitmap(picture.file), turn);
  delete $("frame").dataset.drawing;
  $("latency").textContent = `${count(n)} · seed ${seed}`;
  $("status").textContent = `Shown again: ${prompt}, seed ${seed}`;
}

live.addEventListener("error", ({ detail: { id, code, message } }) => {
  if (id !== last?.id) return;
  $("problem").textContent = code === "starting" ? "The server is loading its model…" : message;
  if (!live.waiting) {
    clearTimeout(slow);
    delete $("frame").dataset.drawing;
    $("latency").textContent = "\u00a0";
  }
});

// ---- the controls

// Show what the model has, keeping what is set where it can be.
function arrange() {
  const can = IMAGE_TO_IMAGE in model().tasks;
  $("image-field").hidden = !can;
  $("strength-field").hidden = !(can && starts());
  $("model-field").hidden = about.models.length < 2;
  options($("size"), task().sizes.map((of) => of.join(" × ")));
  $("size-field").hidden = task().sizes.length < 2;
  const { strengths } = task();
  if (strengths.length) Object.assign($("strength"), { min: 0, max: strengths.length - 1, step: 1 });
  $("steps").max = counts().length - 1;
  $("steps").disabled = counts().length < 2;
  $("frame").style.setProperty("--ratio", size()[0] / size()[1]);
  $("source").hidden = !image || camera.on;
  if (image) $("source").src = image.url;
  $("camera").hidden = !camera.on;
  $("clear").hidden = !image || camera.on;
  $("drop-hint").hidden = starts();
  $("camera-button").hidden = !Camera.exists;
  $("camera-button").textContent = camera.on ? "Stop" : "Camera";
  $("camera-button").setAttribute("aria-pressed", camera.on);
  label();
}

function label() {
  $("steps-value").value = steps();
  $("steps").setAttribute("aria-valuetext", count(steps()));
  $("strength-value").value = strength().toFixed(2);
}

function options(select, texts) {
  if ([...select.options].map((option) => option.text).join() === texts.join()) return;
  select.replaceChildren(...texts.map((text) => new Option(text)));
}

// Set a step count, as near as it is built.
function setSteps(n) {
  const of = counts();
  $("steps").max = of.length - 1;
  const at = of.findLastIndex((built) => built <= n);
  $("steps").value = Math.max(at, 0);
}

live.addEventListener("about", ({ detail }) => {
  const first = about === null;
  about = detail;
  options($("model"), about.models.map(({ name }) => name));
  if (first) setStrength();
  arrange();
  if (first) setSteps(USUAL_STEPS);
  label();
});

function setStrength() {
  const of = model().tasks[IMAGE_TO_IMAGE];
  if (of) $("strength").value = of.strengths.length ? of.strengths.indexOf(of.strength) : of.strength;
}

live.addEventListener("state", ({ detail }) => {
  $("connection").dataset.state = detail;
  $("connection-text").textContent = { connecting: "Connecting", open: "Connected", lost: "Reconnecting" }[detail];
});

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("input", () => changed());
$("seed").addEventListener("input", () => changed());
$("dice").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  changed({ settled: true });
});
$("steps").addEventListener("input", () => {
  label();
  changed({ settled: true });
});
$("strength").addEventListener("input", () => {
  const before = steps();
  arrange();
  setSteps(before);
  label();
  changed();
});
$("model").addEventListener("change", () => {
  setStrength();
  arrange();
  setSteps(USUAL_STEPS);
  recut();
});
$("size").addEventListener("change", recut);

$("save").addEventListener("click", () => {
  const { prompt, seed } = shown.request;
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(shown.file);
  link.download = `${words || "picture"}-${seed}.jpg`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});

// ---- a picture to start from

async function take(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    $("problem").textContent = "That file is no picture that this browser can read.";
    return;
  }
  const wanted = steps();
  if (camera.on) stopCamera();
  image = { bitmap, bytes: await jpeg(bitmap, sizeOfImages()), url: URL.createObjectURL(file) };
  arrange();
  setSteps(wanted);
  label();
  changed({ settled: true });
}

const sizeOfImages = () => model().tasks[IMAGE_TO_IMAGE].sizes[$("size").selectedIndex] ?? size();

async function recut() {
  arrange();
  if (image && IMAGE_TO_IMAGE in model().tasks) {
    image = { ...image, bytes: await jpeg(image.bitmap, sizeOfImages()) };
  }
  changed({ settled: true });
}

function takeFrom(transfer) {
  const file = [...(transfer?.files ?? [])].find(({ type }) => type.startsWith("image/"));
  if (file && about && IMAGE_TO_IMAGE in model().tasks) take(file);
  return Boolean(file);
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  takeFrom($("file"));
  $("file").value = "";
});
document.addEventListener("paste", (event) => takeFrom(event.clipboardData) && event.preventDefault());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").dataset.over = "";
});
document.addEventListener("dragleave", (event) => event.relatedTarget || delete $("drop").dataset.over);
document.addEventListener("drop", (event) => {
  event.preventDefault();
  delete $("drop").dataset.over;
  takeFrom(event.dataTransfer);
});
$("clear").addEventListener("click", () => {
  const wanted = steps();
  image = null;
  arrange();
  setSteps(wanted);
  label();
  changed({ settled: true });
});

// ---- the camera

$("camera-button").addEventListener("click", async () => {
  if (camera.on) {
    stopCamera();
    return;
  }
  try {
    await camera.start();
  } catch (error) {
    $("problem").textContent = `The camera cannot be used: ${error.message}`;
    return;
  }
  arrange();
  frame();
});

function stopCamera() {
  camera.stop();
  arrange();
}

// Send a frame whenever the one before is answered: never more than the server draws.
async function frame() {
  if (!camera.on) return;
  if (!live.waiting && camera.video.videoWidth) {
    const bytes = await jpeg(camera.video, size());
    if (camera.on) send(steps(), {}, bytes);
  }
  camera.video.requestVideoFrameCallback?.(frame) ?? setTimeout(frame, 30);
}

// ---- the key

live.addEventListener("key", ({ detail: refused }) => {
  $("key-problem").textContent = refused ? "That key was refused." : "";
  $("key").value = "";
  $("key-dialog").showModal();
});
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close();
  live.useKey($("key").value.trim());
});

live.connect();
