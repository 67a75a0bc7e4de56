// The LoRAs that a picture is drawn with: each has a slider for its weight, which begins at 0, where it is off.

const MOST = 2; // the weights go from −MOST to MOST
const STEP = 0.05;

export class Loras extends EventTarget {
  // Event: "change" (a weight is another).

  #sliders = new Map(); // by name

  constructor(list) {
    super();
    this.list = list;
  }

  get known() {
    return this.#sliders.size > 0;
  }

  // Take the names that the server has; weights that are set already stay.
  learn(names) {
    const before = this.request();
    this.#sliders = new Map(names.map((name) => [name, document.createElement("input")]));
    this.list.replaceChildren(...[...this.#sliders].map(([name, slider], i) => this.#item(name, slider, `lora-${i}`)));
    this.restore(before);
  }

  // Return what is asked of the server: those that are on.
  request() {
    return [...this.#sliders]
      .map(([name, slider]) => ({ name, scale: Number(slider.value) }))
      .filter(({ scale }) => scale);
  }

  // Set the weights as they were for a request; all others are off.
  restore(loras) {
    const scales = new Map(loras.map(({ name, scale }) => [name, scale]));
    for (const [name, slider] of this.#sliders) {
      slider.value = scales.get(name) ?? 0;
      label(slider);
    }
  }

  #item(name, slider, id) {
    const item = document.createElement("li");
    const text = document.createElement("label");
    const told = document.createElement("output");
    Object.assign(slider, { id, type: "range", min: -MOST, max: MOST, step: STEP, value: 0 });
    text.htmlFor = id;
    told.htmlFor = id;
    text.append(name, told);
    item.append(text, slider);
    slider.addEventListener("input", () => {
      label(slider);
      this.dispatchEvent(new Event("change"));
    });
    return item;
  }
}

function label(slider) {
  const weight = Number(slider.value);
  const text = weight ? weight.toFixed(2) : "off";
  slider.labels[0].querySelector("output").value = text;
  slider.setAttribute("aria-valuetext", text);
  slider.toggleAttribute("data-off", !weight);
}
