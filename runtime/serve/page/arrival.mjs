// How a model comes to the browser: how much of it is here, and then by what it draws.

import { $ } from "./settings.mjs";

const PARTS = 4; // a screen reader hears of every fourth

export function showArrival(source) {
  let heard = 0; // parts of the download
  const say = (text) => ($("status").textContent = text);

  source.addEventListener("download", ({ detail }) => {
    const { loaded, total } = detail ?? {};
    if (detail) show(loaded < total ? { loaded, total } : {});
    else hide();
    const part = detail ? Math.floor((PARTS * loaded) / total) : 0;
    if (part > heard && part < PARTS) say(`Loading the model: ${(100 * part) / PARTS} percent`);
    heard = part;
  });

  source.addEventListener("offer", ({ detail: bytes }) => {
    $("arrival").hidden = $("arrival-button").hidden = false;
    $("arrival-bar").hidden = true;
    $("arrival-text").textContent = bytes ? "The model draws in this browser; nothing that you type leaves it." : "";
    $("arrival-button").textContent = bytes ? `Load the model (${amount(bytes)})` : "Try again";
  });
  $("arrival-button").addEventListener("click", () => {
    $("problem").textContent = "";
    show({});
    source.connect({ agreed: true });
  });

  source.addEventListener("backend", ({ detail: { name, missing } }) => {
    $("notice").textContent = missing;
    say(`The model is ready, in ${name}.`);
  });
}

// Show how many bytes are here; without a number, that the model is being prepared.
function show({ loaded, total }) {
  $("arrival").hidden = $("arrival-bar").hidden = false;
  $("arrival-button").hidden = true;
  const bar = $("arrival-bar");
  if (total === undefined) {
    bar.removeAttribute("value");
    $("arrival-text").textContent = "Preparing the model…";
    return;
  }
  Object.assign(bar, { max: total, value: loaded });
  $("arrival-text").textContent = `Loading the model: ${amount(loaded)} of ${amount(total)}`;
}

function hide() {
  $("arrival").hidden = true;
}

function amount(bytes) {
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}
