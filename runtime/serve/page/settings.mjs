// What is set on the page: the controls, and what of it the chosen model can do.

import { Control } from "./control.mjs";
import { Camera } from "./images.mjs";
import { Loras } from "./loras.mjs";

const USUAL_STEPS = 4; // the slider begins at the most steps up to this
const MOST_SEED = 2 ** 32 - 1;
const TEXT_TO_IMAGE = "text-to-image";
const IMAGE_TO_IMAGE = "image-to-image";

export const $ = (id) => document.getElementById(id);
export const inWords = (steps) => (steps === 1 ? "1 step" : `${steps} steps`);

export class Settings {
  image = null; // {bitmap, bytes, url} to start from
  camera = new Camera($("camera"));
  control = new Control();
  loras = new Loras($("loras"));
  #models = null;

  get known() {
    return this.#models !== null;
  }

  // Take what the server says about its models; what is set already stays.
  learn({ models, loras }) {
    const first = !this.known;
    this.#models = models;
    options($("model"), models.map(({ name }) => name));
    this.loras.learn(loras);
    if (first) this.useDefaults();
    else this.arrange();
  }

  get #tasks() {
    return (this.#models.find(({ name }) => name === $("model").value) ?? this.#models[0]).tasks;
  }

  get filming() {
    return this.camera.on || this.control.camera.on;
  }

  get #starts() {
    return Boolean(this.image || this.camera.on);
  }

  get #task() {
    return this.#tasks[this.#starts ? IMAGE_TO_IMAGE : TEXT_TO_IMAGE];
  }

  get takesImages() {
    return IMAGE_TO_IMAGE in this.#tasks;
  }

  // Whether anything can be drawn: a model may need a picture to start from.
  get complete() {
    return this.#task !== undefined;
  }

  get size() {
    const { sizes } = this.#task ?? Object.values(this.#tasks)[0];
    return sizes[$("size").selectedIndex] ?? sizes[0];
  }

  get #strength() {
    const { strengths } = this.#tasks[IMAGE_TO_IMAGE];
    const value = Number($("strength").value);
    return strengths.length ? strengths[value] : value;
  }

  // The step counts that are built, and of which this strength leaves a step.
  get #counts() {
    const { steps, strengths } = this.#task ?? Object.values(this.#tasks)[0];
    if (!this.#starts || strengths.length) return steps;
    const made = steps.filter((n) => Math.floor(n * this.#strength) >= 1);
    return made.length ? made : steps.slice(-1);
  }

  get fewest() {
    return this.#counts[0];
  }

  get steps() {
    return this.#counts[Math.min($("steps").value, this.#counts.length - 1)];
  }

  // Set the largest step count that is built and not above this one.
  set steps(wanted) {
    $("steps").max = this.#counts.length - 1;
    $("steps").value = Math.max(this.#counts.findLastIndex((n) => n <= wanted), 0);
    this.label();
  }

  get #seed() {
    return Math.min(Math.max(Math.floor(Number($("seed").value)) || 0, 0), MOST_SEED);
  }

  // Return what is asked of the server, with this step count.
  request(steps) {
    const made = { prompt: $("prompt").value, seed: this.#seed, num_inference_steps: steps };
    if (this.#models.length > 1) made.model = $("model").value;
    if (this.#task.sizes.length > 1) made.size = this.size.join("x");
    if (this.#starts) made.strength = this.#strength;
    if (this.control.used) Object.assign(made, this.control.request());
    const loras = this.loras.request();
    if (loras.length) made.loras = loras;
    return made;
  }

  // Set everything as it was for a request.
  async restore(request, image, control) {
    const { prompt, seed, strength, num_inference_steps: steps, model, size, loras } = request;
    if (model) $("model").value = model;
    this.image = image;
    this.useDefaults();
    $("prompt").value = prompt;
    $("seed").value = seed;
    if (size) $("size").selectedIndex = this.#task.sizes.findIndex((built) => built.join("x") === size);
    if (strength !== undefined) this.#setStrength(strength);
    this.arrange();
    this.steps = steps;
    this.loras.restore(loras ?? []);
    await this.control.restore(request, control);
  }

  useDefaults() {
    if (this.takesImages) this.#setStrength(this.#tasks[IMAGE_TO_IMAGE].strength);
    this.arrange();
    this.steps = USUAL_STEPS;
  }

  #setStrength(value) {
    const { strengths } = this.#tasks[IMAGE_TO_IMAGE];
    const range = strengths.length ? { min: 0, max: strengths.length - 1, step: 1 } : { min: 0.05, max: 1, step: 0.05 };
    Object.assign($("strength"), range);
    $("strength").value = strengths.length ? strengths.indexOf(value) : value;
  }

  // Show the controls that the model has, keeping the step count where it can be.
  arrange() {
    const { image, camera } = this;
    $("model-field").hidden = this.#models.length < 2;
    $("image-field").hidden = !this.takesImages;
    $("strength-field").hidden = !(this.takesImages && this.#starts);
    const { sizes } = this.#task ?? Object.values(this.#tasks)[0];
    options($("size"), sizes.map((of) => of.join(" × ")));
    $("size-field").hidden = sizes.length < 2;
    $("steps").disabled = this.#counts.length < 2;
    this.control.arrange(this.#task?.controlnets ?? [], this.size);
    $("loras-field").hidden = !this.loras.known;
    $("frame").style.setProperty("--ratio", this.size[0] / this.size[1]);
    if (image) $("source").src = image.url;
    $("source").hidden = !image || camera.on;
    $("clear").hidden = !image || camera.on;
    $("camera").hidden = !camera.on;
    $("drop-hint").hidden = this.#starts;
    $("camera-button").hidden = !Camera.exists;
    $("camera-button").textContent = camera.on ? "Stop" : "Camera";
    $("camera-button").setAttribute("aria-pressed", camera.on);
    $("empty").textContent = this.complete ? "Your picture appears here." : "Choose a picture to start from.";
    this.label();
  }

  label() {
    $("steps-value").value = this.steps;
    $("steps").setAttribute("aria-valuetext", inWords(this.steps));
    if (this.takesImages) $("strength-value").value = this.#strength.toFixed(2);
  }
}

function options(select, texts) {
  if ([...select.options].map((option) => option.text).join() === texts.join()) return;
  const before = select.value;
  select.replaceChildren(...texts.map((text) => new Option(text)));
  if (texts.includes(before)) select.value = before;
}
