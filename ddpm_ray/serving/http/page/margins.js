// Margins of the picture: by the handles at its sides, or by numbers.

import { editor } from "./editor.js";

const OUTWARD = { left: -1, top: -1, right: 1, bottom: 1 }; // sign of a move that enlarges

/** Listen to the handles and the numbers. */
export function listenToMargins() {
  for (const handle of document.querySelectorAll(".handle")) listenToHandle(handle);
  for (const input of document.querySelectorAll("#margins input")) {
    input.addEventListener("input", () => setMargin(input.dataset.side, Number(input.value)));
  }
}

/** Have a handle move its side while it is dragged. */
function listenToHandle(handle) {
  const { side } = handle.dataset;
  const along = side === "left" || side === "right" ? "clientX" : "clientY";
  let start = null;
  handle.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    handle.setPointerCapture(event.pointerId);
    start = { at: event[along], margin: editor.picture.margins[side], zoom: editor.zoom };
    event.preventDefault();
  });
  handle.addEventListener("pointermove", (event) => {
    if (start === null) return;
    setMargin(side, start.margin + (OUTWARD[side] * (event[along] - start.at)) / start.zoom);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    handle.addEventListener(name, () => { start = null; });
  }
}

/** Set the margin of a side, and show it. */
function setMargin(side, value) {
  editor.picture.setMargin(side, value);
  editor.show();
}
