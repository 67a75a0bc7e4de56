// Pictures that a person gives to the page: chosen, pasted, or dropped anywhere on it.

import { $ } from "./settings.mjs";

// Hand on each picture: `take(file, element)`, `element` being where it was let go.
export function takeTransfers(take) {
  const from = ({ files }, target) => {
    const file = [...files].find(({ type }) => type.startsWith("image/"));
    if (file) take(file, target);
    return Boolean(file);
  };
  for (const [button, input] of [["choose", "file"], ["control-choose", "control-file"]]) {
    $(button).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", () => {
      from($(input), $(input));
      $(input).value = "";
    });
  }
  document.addEventListener("paste", (event) => from(event.clipboardData, event.target) && event.preventDefault());
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("drop").dataset.over = "";
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || delete $("drop").dataset.over);
  document.addEventListener("drop", (event) => {
    delete $("drop").dataset.over;
    if (event.dataTransfer.types.includes("Files")) event.preventDefault(); // the browser would open it
    from(event.dataTransfer, event.target);
  });
}
