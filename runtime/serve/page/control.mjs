// The picture that a ControlNet follows: drawn, chosen or filmed, as it is or its edges.

import { Camera } from "./images.mjs";
import { Sketch } from "./sketch.mjs";

const $ = (id) => document.getElementById(id);
const HINT = "Draw here. With keys: arrows move the pen, Space puts it down.";

export class Control extends EventTarget {
  // Event: "change" (the picture, or how it is followed, is another).

  sketch = new Sketch($("sketch"));
  camera = new Camera($("control-camera"));
  current = null; // the picture as it was read last: {bytes, isPhoto, version}
  #version = 0;
  #restoring = false;

  constructor() {
    super();
    const { sketch } = this;
    const changed = () => this.#restoring || this.dispatchEvent(new Event("change"));
    sketch.addEventListener("change", () => {
      this.label();
      changed();
    });
    sketch.addEventListener("pen", () => this.#showPen());
    $("sketch").addEventListener("focus", () => this.#showPen());
    $("sketch").addEventListener("blur", () => ($("pen").hidden = true));
    $("sketch").addEventListener("pointerdown", () => ($("pen").hidden = true));
    $("undo").addEventListener("click", () => sketch.undo());
    $("wipe").addEventListener("click", () => {
      $("edges").checked = false;
      sketch.clear();
    });
    for (const id of ["control-on", "control-net", "edges", "low", "high", "control-scale", "brush"]) {
      $(id).addEventListener("input", () => {
        this.label();
        if (id !== "brush") changed();
      });
    }
    this.label();
  }

  // Whether there is anything to follow.
  get used() {
    return !$("control-field").hidden && $("control-on").checked && !this.sketch.empty && this.current !== null;
  }

  // Read what is drawn: `current` is then what will be sent.
  async read() {
    const { isPhoto } = this.sketch;
    this.current = { bytes: await this.sketch.file(), isPhoto, version: ++this.#version };
  }

  // Take a picture to follow. What was not drawn by hand is more than lines, so its edges are wanted.
  take(bitmap) {
    this.camera.stop();
    $("control-on").checked = $("edges").checked = true;
    this.sketch.put(bitmap);
  }

  // Return what is asked of the server beside the picture.
  request() {
    const made = { controlnet_conditioning_scale: Number($("control-scale").value) };
    if ($("control-net").options.length > 1) made.controlnet = $("control-net").value;
    if ($("edges").checked) made.canny = [Number($("low").value), Number($("high").value)];
    return made;
  }

  // Set everything as it was for a request; `picture`: what `current` was, null if nothing was followed.
  async restore({ controlnet, controlnet_conditioning_scale: scale, canny }, picture) {
    this.camera.stop();
    $("control-on").checked = Boolean(picture);
    if (picture && picture.version !== this.current?.version) {
      const bitmap = await createImageBitmap(new Blob([picture.bytes]));
      this.#restoring = true; // it is shown, and not drawn again
      this.sketch.put(bitmap);
      this.#restoring = false;
      this.sketch.isPhoto = picture.isPhoto;
      this.current = picture;
    }
    if (picture) {
      if (controlnet) $("control-net").value = controlnet;
      $("control-scale").value = scale;
      $("edges").checked = Boolean(canny);
      if (canny) [$("low").value, $("high").value] = canny;
    }
    this.label();
  }

  // Show the controls that a task has: the names of its ControlNets, the size that is drawn.
  arrange(names, size) {
    $("control-field").hidden = !names.length;
    if ([...$("control-net").options].map(({ text }) => text).join() !== names.join()) {
      $("control-net").replaceChildren(...names.map((name) => new Option(name)));
    }
    $("control-net-field").hidden = names.length < 2;
    this.sketch.resize(size);
    this.label();
  }

  label() {
    const filming = this.camera.on;
    $("control").hidden = !$("control-on").checked;
    $("thresholds").hidden = !$("edges").checked;
    $("undo").disabled = filming || !this.sketch.undoable;
    $("wipe").disabled = filming || this.sketch.empty;
    $("control-camera-button").hidden = !Camera.exists;
    $("control-camera-button").textContent = filming ? "Stop" : "Camera";
    $("control-camera-button").setAttribute("aria-pressed", filming);
    this.sketch.brush = Number($("brush").value);
    $("brush-value").value = $("brush").value;
    $("low-value").value = $("low").value;
    $("high-value").value = $("high").value;
    $("control-scale-value").value = Number($("control-scale").value).toFixed(2);
  }

  #showPen() {
    const { x, y, down } = this.sketch.pen;
    const pen = $("pen");
    pen.hidden = !$("sketch").matches(":focus-visible");
    pen.toggleAttribute("data-down", down);
    pen.style.left = `${100 * x}%`;
    pen.style.top = `${100 * y}%`;
    $("sketch-hint").textContent = down ? "The pen is down. Space lifts it." : HINT;
  }
}
