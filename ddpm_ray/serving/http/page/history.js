// The images that were drawn since the page was opened, and their settings.

import { editor } from "./editor.js";
import { announce, element, find, form } from "./elements.js";
import { clearErrors, fillForm, showModel } from "./form.js";
import { modelNamed } from "./models.js";
import { isRunning } from "./progress.js";
import { downloadLink, imageElement, seedOf, showImages, title } from "./result.js";

const MOST_ENTRIES = 100;

/** Put the drawn images of a job first. */
export function addHistory(drawn) {
  const list = find("#entries");
  list.prepend(...drawn.map(entryOf));
  while (list.children.length > MOST_ENTRIES) list.lastElementChild.remove();
  find("#history").hidden = false;
}

/** The entry of a drawn image. */
function entryOf(drawn) {
  const text = title(drawn);
  const button = element(
    "button",
    { type: "button", title: text, ariaLabel: `Use settings: ${text}` },
    imageElement(drawn.url, ""),
  );
  button.addEventListener("click", () => takeOver(drawn));
  // The name of the button says what the caption says.
  const caption = element("span", { className: "caption muted", ariaHidden: "true" }, text);
  return element("li", {}, button, caption, downloadLink(drawn));
}

/** Take over the settings of a drawn image, and show it unless a job runs. */
function takeOver(drawn) {
  const { settings, picture } = drawn;
  clearErrors();
  if (modelNamed(settings.model)) find("#model").value = settings.model;
  showModel();
  fillForm(settings);
  form.elements.seed.value = seedOf(drawn);
  if (picture !== null) editor.take(picture.copy());
  else editor.suitModel();
  if (!isRunning()) showImages([drawn]);
  announce("Settings taken over");
}
