// A canvas to draw on: white lines on black, as ControlNets for edges and scribbles expect them.

const MOST_UNDONE = 20;
const STEP = 1 / 64; // of the width: how far an arrow key moves the pen; with Shift four times as far

export class Sketch extends EventTarget {
  // Events: "change" (something was drawn), "pen" (the keyboard's pen was moved, put down or lifted).

  brush = 6; // pixels of the picture
  empty = true;
  isPhoto = false; // whether a picture was put under the lines
  #canvas;
  #context;
  #before = []; // what undo brings back: {canvas, empty, isPhoto}
  #last = null; // where the pointer's stroke has come to
  #pen = { x: 0.5, y: 0.5, down: false }; // the keyboard's, in shares of the sides

  constructor(canvas) {
    super();
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { willReadFrequently: true });
    this.#blank();
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#go(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => (this.#last = null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#lift());
  }

  get pen() {
    return this.#pen;
  }

  // Let the picture have [width, height]; what is drawn is scaled.
  resize([width, height]) {
    const { width: before, height: above } = this.#canvas;
    if (before === width && above === height) return;
    const old = this.#copy();
    Object.assign(this.#canvas, { width, height });
    this.#blank();
    this.#cover(old.canvas);
    this.#before = [];
    if (!this.empty) this.#tell("change");
  }

  // Put a picture, or a video's frame, in place of all, cut to the canvas's shape.
  put(source, { undoable = true } = {}) {
    if (undoable) this.#remember();
    this.#blank();
    this.#cover(source);
    this.empty = false;
    this.isPhoto = true;
    this.#tell("change");
  }

  clear() {
    if (this.empty) return;
    this.#remember();
    this.#blank();
    this.empty = true;
    this.isPhoto = false;
    this.#tell("change");
  }

  undo() {
    const before = this.#before.pop();
    if (!before) return;
    this.#context.drawImage(before.canvas, 0, 0);
    this.empty = before.empty;
    this.isPhoto = before.isPhoto;
    this.#tell("change");
  }

  get undoable() {
    return this.#before.length > 0;
  }

  // Return the picture's file as bytes: PNG of lines, JPEG of a photograph.
  async file() {
    const type = this.isPhoto ? "image/jpeg" : "image/png";
    const blob = await new Promise((done) => this.#canvas.toBlob(done, type, 0.95));
    return new Uint8Array(await blob.arrayBuffer());
  }

  #begin(event) {
    if (event.button !== 0) return;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#lift();
    this.#remember();
    this.#last = this.#at(event);
    this.#line(this.#last, this.#last);
  }

  #go(event) {
    if (!this.#last) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) {
      const next = this.#at(one);
      this.#line(this.#last, next);
      this.#last = next;
    }
  }

  #at({ clientX, clientY }) {
    const { left, top, width, height } = this.#canvas.getBoundingClientRect();
    return { x: (clientX - left) / width, y: (clientY - top) / height };
  }

  #key(event) {
    const step = STEP * (event.shiftKey ? 4 : 1);
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else if (event.key === " ") this.#pen.down ? this.#lift() : this.#put();
    else if (way) this.#move(way);
    else return;
    event.preventDefault();
  }

  #put() {
    this.#pen.down = true;
    this.#remember();
    this.#line(this.#pen, this.#pen);
    this.#tell("pen");
  }

  #lift() {
    if (!this.#pen.down) return;
    this.#pen.down = false;
    this.#tell("pen");
  }

  #move([x, y]) {
    const from = { ...this.#pen };
    const shape = this.#canvas.width / this.#canvas.height;
    this.#pen.x = Math.min(Math.max(from.x + x, 0), 1);
    this.#pen.y = Math.min(Math.max(from.y + y * shape, 0), 1);
    if (this.#pen.down) this.#line(from, this.#pen);
    this.#tell("pen");
  }

  #line(from, to) {
    const { width, height } = this.#canvas;
    Object.assign(this.#context, { lineWidth: this.brush, lineCap: "round", strokeStyle: "white" });
    this.#context.beginPath();
    this.#context.moveTo(from.x * width, from.y * height);
    this.#context.lineTo(to.x * width, to.y * height);
    this.#context.stroke();
    this.empty = false;
    this.#tell("change");
  }

  #blank() {
    this.#context.fillStyle = "black";
    this.#context.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  #cover(source) {
    const { width, height } = this.#canvas;
    const own = [source.videoWidth || source.width, source.videoHeight || source.height];
    const scale = Math.max(width / own[0], height / own[1]);
    const [wide, high] = own.map((side) => side * scale);
    this.#context.imageSmoothingQuality = "high";
    this.#context.drawImage(source, (width - wide) / 2, (height - high) / 2, wide, high);
  }

  #copy() {
    const canvas = new OffscreenCanvas(this.#canvas.width, this.#canvas.height);
    canvas.getContext("2d").drawImage(this.#canvas, 0, 0);
    return { canvas, empty: this.empty, isPhoto: this.isPhoto };
  }

  #remember() {
    this.#before.push(this.#copy());
    this.#before.splice(0, this.#before.length - MOST_UNDONE);
  }

  #tell(type) {
    this.dispatchEvent(new Event(type));
  }
}
