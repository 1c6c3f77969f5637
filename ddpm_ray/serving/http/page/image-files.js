// Images for the editor: chosen files, files that are dropped on the page, and drawn images.

import { editor } from "./editor.js";
import { find, form } from "./elements.js";
import { kind, kindsOf, model } from "./models.js";

/** Listen to the chooser of files, and to files that are dragged over the page. */
export function listenToFiles() {
  const chooser = find("#image");
  chooser.addEventListener("change", async () => {
    await openFile(chooser.files[0]);
    chooser.value = "";
  });
  const mark = (isOver) => find("#editor").classList.toggle("dropping", isOver);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.dataTransfer.dropEffect = accepts(event) ? "copy" : "none";
    mark(accepts(event));
  });
  document.addEventListener("dragleave", () => mark(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(false);
    if (accepts(event)) openFile(event.dataTransfer.files[0]);
  });
}

/** Whether something that is dragged can be edited or varied. */
function accepts(event) {
  const hasFiles = event.dataTransfer.types.includes("Files");
  return hasFiles && model() !== undefined && kindsOf(model()).length > 1;
}

/** Open a file, if there is one, to edit or vary it. */
async function openFile(file) {
  if (!file) return;
  if (kind() === "generation") form.elements.kind.value = "edit";
  editor.show();
  await editor.open(file, file.name);
}

/** Open a drawn image, as a data URL, for a task. */
export async function openDrawn(url, task) {
  form.elements.kind.value = task;
  await editor.open(blobOf(url), "drawn image");
  find("#editor").scrollIntoView({ block: "nearest", behavior: "smooth" });
  find(task === "edit" ? "#canvas" : "#generate").focus({ preventScroll: true });
}

/** The file in a data URL; the page's policy lets `fetch` read none. */
function blobOf(url) {
  const text = atob(url.slice(url.indexOf(",") + 1));
  const type = url.slice(5, url.indexOf(";"));
  return new Blob([Uint8Array.from(text, (letter) => letter.charCodeAt(0))], { type });
}
