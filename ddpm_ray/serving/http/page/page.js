// The web page of a server: draws and edits images by its jobs. Starts all, and wires it together.

import { abandon, cancel, generate } from "./drawing.js";
import { editor } from "./editor.js";
import { find, form, notify } from "./elements.js";
import { showModel, showStrength } from "./form.js";
import { listenToFiles } from "./image-files.js";
import { listenToMargins } from "./margins.js";
import { loadModels } from "./models.js";
import { listenToPainting } from "./painting.js";

/** Load the models, then show the page. */
async function start() {
  if (!await loadModels()) return;
  find("main").hidden = false;
  changeModel();
}

/** Show the chosen model. */
function changeModel() {
  showModel();
  editor.suitModel();
}

/** Listen to the form and the buttons. */
function listen() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.elements.strength.addEventListener("input", showStrength);
  for (const input of form.elements.kind) input.addEventListener("change", () => editor.show());
  find("#model").addEventListener("change", changeModel);
  find("#scale").addEventListener("change", (event) => editor.rescale(event.target.value));
  find("#cancel").addEventListener("click", () => {
    find("#cancel").disabled = true;
    cancel();
  });
  find("#notice button").addEventListener("click", () => {
    notify("");
    start();
  });
  new ResizeObserver(() => { if (editor.picture && !find("#editor").hidden) editor.draw(); })
    .observe(find("#stage"));
  window.addEventListener("pagehide", abandon); // leaves no job behind
}

listen();
listenToPainting();
listenToMargins();
listenToFiles();
showStrength();
start();
