// The form of a request: the fields that apply to the model, their values, and errors at them.

import { ApiError } from "./api.js";
import { element, find, form } from "./elements.js";
import { SAMPLERS, drawnSize, kind, kindsOf, labelName, model } from "./models.js";

/** Names of the fields that requests have as well. */
const FIELDS = [
  "prompt", "negative_prompt", "labels", "strength", "n", "seed", "steps", "guidance_scale",
  "sampler",
];

/** The field of a name: its input with label and error. */
export const field = (name) => find(`.field[data-field="${name}"]`);

const isShown = (node) => node !== null && node.offsetParent !== null;

/** Show what the chosen model takes. */
export function showModel() {
  const chosen = model();
  const kinds = kindsOf(chosen);
  for (const input of form.elements.kind) input.parentElement.hidden = !kinds.includes(input.value);
  find("#kinds").hidden = kinds.length < 2;
  if (!kinds.includes(kind())) form.elements.kind.value = "generation";
  const colours = chosen.channels === 1 ? "grey" : "colour";
  find("#model-facts").textContent = `${drawnSize().join(" \u00d7 ")} pixels, ${colours}`;
  showChoices(chosen);
  form.elements.steps.placeholder = chosen.steps;
  form.elements.steps.max = chosen.num_steps;
  form.elements.guidance_scale.placeholder = chosen.guidance_scale;
  field("prompt").hidden = !chosen.takes_text;
  field("negative_prompt").hidden = !(chosen.takes_text && chosen.guidance);
  field("labels").hidden = chosen.num_classes === 0;
  field("guidance_scale").hidden = !chosen.guidance;
}

/** Show the classes of a model, and the samplers. */
function showChoices(chosen) {
  const option = (value, text) => element("option", { value }, text);
  const numbers = [...Array(chosen.num_classes).keys()];
  form.elements.labels.replaceChildren(
    option("", "All, in turn"),
    ...numbers.map((number) => option(number, labelName(chosen, number))),
  );
  form.elements.sampler.replaceChildren(
    option("", `Default (${SAMPLERS[chosen.sampler] ?? chosen.sampler})`),
    ...Object.entries(SAMPLERS).map(([value, name]) => option(value, name)),
  );
}

/** Show the value of the slider of strength. */
export function showStrength() {
  find("#strength").labels[0].querySelector("output").value = find("#strength").value;
}

/** The texts of all fields, by name; empty for those that do not apply. Throws ApiError. */
export function formSettings() {
  const settings = { kind: kind(), model: model().id };
  for (const name of FIELDS) {
    const input = form.elements[name];
    const applies = isShown(field(name));
    if (applies && input.validity.badInput) throw new ApiError("Give a number.", name);
    settings[name] = applies ? input.value.trim() : "";
  }
  return settings;
}

/** The body of a request with these settings. */
export function requestBody(settings) {
  const body = new FormData();
  body.set("kind", settings.kind);
  body.set("model", settings.model);
  for (const name of FIELDS) {
    const value = settings[name];
    if (value !== "") body.set(name, name === "labels" ? `[${value}]` : value);
  }
  return body;
}

/** Put earlier settings into the form, which shows their model. */
export function fillForm(settings) {
  form.elements.kind.value = settings.kind;
  for (const name of FIELDS) {
    const isKept = name === "strength" && settings[name] === ""; // a slider is never empty
    if (!isKept) form.elements[name].value = settings[name];
  }
  showStrength();
}

/** Show an error of the API at the field that it names, or else at the Generate button. */
export function showError(error) {
  const named = field(error.param ?? "other");
  const at = isShown(named) ? named : field("other");
  const input = at.querySelector("input, select, textarea");
  const text = element("p", { className: "error", id: `error-${at.dataset.field}` }, error.message);
  text.setAttribute("role", "alert");
  at.append(text);
  if (input !== null) {
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", text.id);
    input.focus();
  }
  text.scrollIntoView({ block: "nearest" });
}

/** Take all errors off the fields. */
export function clearErrors() {
  for (const text of document.querySelectorAll('.error[id^="error-"]')) text.remove();
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}
