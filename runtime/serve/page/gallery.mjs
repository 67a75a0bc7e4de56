// The last pictures, newest first; they are gone with the page.

const MOST = 24;

export class Gallery {
  #entries = [];

  constructor(list, section, show) {
    this.list = list;
    this.section = section;
    this.show = show;
  }

  // Add a picture: {file, request, image, control}. One that was drawn from the same settings is not added again.
  add(picture) {
    const same = JSON.stringify(picture.request) + (picture.image?.url ?? "") + (picture.control?.version ?? "");
    if (this.#entries[0]?.same === same) return;
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    button.setAttribute("aria-label", `Show again: ${picture.request.prompt || "no prompt"}, seed ${picture.request.seed}`);
    button.title = picture.request.prompt;
    image.src = URL.createObjectURL(picture.file);
    image.onload = () => URL.revokeObjectURL(image.src);
    image.alt = "";
    button.append(image);
    button.addEventListener("click", () => this.show(picture));
    item.append(button);
    this.list.prepend(item);
    this.#entries.unshift({ picture, same, item });
    for (const old of this.#entries.splice(MOST)) old.item.remove();
    this.section.hidden = false;
  }
}
