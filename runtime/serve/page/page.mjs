// The page: what is typed and set becomes requests, and the answers are shown.

import { showArrival } from "./arrival.mjs";
import { Gallery } from "./gallery.mjs";
import { still } from "./images.mjs";
import { Live } from "./live.mjs";
import { Local } from "./local.mjs";
import { $, Settings, inWords } from "./settings.mjs";
import { takeTransfers } from "./transfers.mjs";

const SILENCE = 400; // ms without a change after which the slider's step count is drawn
const CONTROL = $("control-field");
const SLOW = 250; // ms after which the page says that it waits

// A page of its own names the bundle that it draws with; the server's page asks the server.
const bundle = document.querySelector('meta[name="pictures"]')?.content;
const live = bundle ? new Local(bundle) : new Live();
const settings = new Settings();
const gallery = new Gallery($("gallery"), $("gallery-section"), showAgain);

let last = null; // the newest request: {id, request, image, control, quick, keep}, and when it is drawn its file
let shown = null; // one of them
const sent = new Map(); // those that may still be answered, by id
let turns = 0; // pictures that have come, or were chosen from the gallery
let shownTurn = 0;
let silence = 0;
let slow = 0;
let stale = false; // whether the drawing to follow has changed since it was read
let reading = false;

// ---- drawing

// Draw at once with the fewest steps, and after a silence with the slider's; if `settled`, with the slider's at once.
function changed({ settled = false } = {}) {
  clearTimeout(silence);
  if (!settings.known || !settings.complete || settings.filming) return; // the camera's next frame has it all
  const quick = !settled && settings.steps !== settings.fewest;
  send(quick ? settings.fewest : settings.steps, { quick });
  silence = setTimeout(rest, settled ? 0 : SILENCE);
}

function send(steps, more = {}, bytes = settings.image?.bytes) {
  const control = settings.control.used ? settings.control.current : null;
  last = { request: settings.request(steps), image: settings.image, control, ...more };
  last.id = live.send(last.request, bytes, control?.bytes);
  sent.set(last.id, last);
  clearTimeout(slow);
  slow = setTimeout(showDrawing, SLOW);
}

// Nothing was changed for a while: what is set now is worth keeping.
function rest() {
  if (last.quick) send(settings.steps);
  last.keep = true;
  if (shown === last) keep();
}

live.addEventListener("picture", async ({ detail: { id, ms, drawn, file } }) => {
  const made = sent.get(id);
  if (stale) follow();
  if (!made) return; // older than one that has come
  for (const other of sent.keys()) if (other <= id) sent.delete(other);
  made.file = file;
  const turn = ++turns;
  const bitmap = await createImageBitmap(made.file); // quicker than an <img>, which would fetch it by a URL
  if (turn < shownTurn) return;
  show(made, bitmap, turn);
  if (!live.waiting) {
    const took = ms === null ? "" : `${lasting(ms)} · `;
    showWaiting(false, `${took}${lasting(drawn)} drawing · ${inWords(made.request.num_inference_steps)}`);
  }
  if (made.keep) keep();
});

live.addEventListener("row", ({ detail: { row, rows } }) => {
  if (rows > 1 && "drawing" in $("frame").dataset) showWaiting(true, `Drawing… ${row} of ${inWords(rows)}`);
});

live.addEventListener("error", ({ detail: { id, code, message } }) => {
  if (stale) follow();
  if (id !== null && id !== last?.id) return;
  $("problem").textContent = code === "starting" ? "The server is loading its model…" : message;
  if (!live.waiting) showWaiting(false);
});

function lasting(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function showDrawing() {
  if (live.waiting && $("connection").dataset.state === "open") showWaiting(true, "Drawing…");
}

function showWaiting(waiting, text = "\u00a0") {
  clearTimeout(slow);
  $("frame").toggleAttribute("data-drawing", waiting);
  $("latency").textContent = text;
}

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

function keep() {
  const { seed, num_inference_steps: steps } = shown.request;
  gallery.add(shown);
  $("status").textContent = `Picture ready: ${inWords(steps)}, seed ${seed}`;
}

async function showAgain(picture) {
  const { prompt, seed, num_inference_steps: steps } = picture.request;
  const turn = ++turns;
  clearTimeout(silence);
  sent.clear();
  stale = false;
  settings.camera.stop();
  await settings.restore(picture.request, picture.image, picture.control);
  show(picture, await createImageBitmap(picture.file), turn);
  showWaiting(false, `${inWords(steps)} · seed ${seed}`);
  $("status").textContent = `Shown again: ${prompt}, seed ${seed}`;
}

// ---- the controls

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("input", () => changed());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  changed({ settled: true });
});
$("seed").addEventListener("input", () => changed());
$("dice").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  changed({ settled: true });
});
$("steps").addEventListener("input", () => {
  settings.label();
  changed({ settled: true });
});
$("strength").addEventListener("input", () => {
  const { steps } = settings;
  settings.arrange();
  settings.steps = steps;
  changed();
});
settings.loras.addEventListener("change", () => changed());
$("model").addEventListener("change", () => {
  settings.useDefaults();
  cut();
});
$("size").addEventListener("change", cut);

$("save").addEventListener("click", () => {
  const { prompt, seed } = shown.request;
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60);
  const ending = shown.file.type === "image/png" ? "png" : "jpg";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(shown.file);
  link.download = `${words || "picture"}-${seed}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});

// ---- a picture to start from

// Use a picture, or none, with the step count that is set.
function startFrom(image) {
  const { steps } = settings;
  settings.camera.stop();
  settings.image = image;
  settings.arrange();
  settings.steps = steps;
}

// Take a picture for the place where it was let go, or for the one that there is.
async function take(file, target) {
  if (!settings.known) return;
  const follows = !CONTROL.hidden && (CONTROL.contains(target) || !settings.takesImages);
  if (!follows && !settings.takesImages) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    $("problem").textContent = "That file is no picture that this browser can read.";
    return;
  }
  if (follows) {
    settings.control.take(bitmap);
    return;
  }
  startFrom({ bitmap, url: URL.createObjectURL(file) });
  await cut();
}

// Cut the picture to the size that is drawn, and draw.
async function cut() {
  settings.arrange();
  const { image, size } = settings;
  if (image) settings.image = { ...image, bytes: await still(image.bitmap, size, live.format) };
  changed({ settled: true });
}

takeTransfers(take);
$("clear").addEventListener("click", () => {
  startFrom(null);
  $("choose").focus();
  changed({ settled: true });
});

$("camera-button").addEventListener("click", () => film(settings.camera, settings.control.camera));
$("control-camera-button").addEventListener("click", () => film(settings.control.camera, settings.camera));

// Begin to film, or end it. Of the two places of a camera's frames one is in use at a time.
async function film(camera, other) {
  const { steps } = settings;
  other.stop();
  try {
    if (camera.on) camera.stop();
    else await camera.start();
  } catch (error) {
    $("problem").textContent = `The camera cannot be used: ${error.message}`;
  }
  settings.arrange();
  settings.steps = steps;
  frame(camera);
}

// Send a frame whenever the one before is answered: never more than the server draws.
async function frame(camera) {
  if (!camera.on) return;
  if (!live.waiting) await (camera === settings.camera ? sendFrame(camera) : followFrame(camera));
  camera.next(() => frame(camera));
}

async function sendFrame(camera) {
  const bytes = await still(camera.video, settings.size, live.format);
  if (camera.on) send(settings.steps, {}, bytes);
}

// ---- a picture to follow

async function followFrame(camera) {
  const { control } = settings;
  control.sketch.put(camera.video, { undoable: false });
  await control.read();
  if (camera.on) send(settings.steps);
}

// Draw what the drawing says now; if a picture is on its way, when it has come: never more than the server draws.
async function follow() {
  stale = true;
  if (reading || live.waiting || settings.filming) return;
  reading = true;
  stale = false;
  await settings.control.read();
  reading = false;
  changed();
}

settings.control.addEventListener("change", follow);

// ---- the server, or the pipeline

showArrival(live);

live.addEventListener("about", ({ detail }) => {
  const first = !settings.known;
  settings.learn(detail);
  if (first && $("prompt").value) changed(); // typed before, or kept by the browser
});

live.addEventListener("state", ({ detail }) => {
  $("connection").dataset.state = detail.state;
  $("connection-text").textContent = detail.text;
  showDrawing();
});

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
