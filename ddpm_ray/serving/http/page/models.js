// The models of the server, and which of them draws for which task.

import { getJson, pause } from "./api.js";
import { element, find, form, notify } from "./elements.js";

/** Names of samplers by their values in requests. */
export const SAMPLERS = {
  ddim: "DDIM",
  ancestral: "Ancestral (DDPM)",
  dpm_solver_pp: "DPM-Solver++",
  dpm_solver_pp_sde: "DPM-Solver++ SDE",
  unipc: "UniPC",
  heun: "Heun",
  plms: "PLMS",
};

let models = []; // the facts of each, as /v1/models gives them

/** The facts of a model, or undefined. */
export const modelNamed = (id) => models.find((one) => one.id === id);

/** The facts of the chosen model; undefined until they are loaded. */
export const model = () => modelNamed(find("#model").value);

/** The chosen task: "generation", "edit" or "variation". */
export const kind = () => form.elements.kind.value;

/** The tasks of a model. */
export function kindsOf(one) {
  return ["generation", one.edits && "edit", one.variations && "variation"].filter(Boolean);
}

/** Width and height of the images that the chosen model draws. */
export const drawnSize = () => sides(model().size);

/** Width and height of the images that it varies, and of the smallest that it edits. */
export const editedSize = () => sides(model().edited_size);

const sides = (size) => size.split("x").map(Number);

/** The name of a class of a model. */
export const labelName = (one, number) => one.label_names?.[number] ?? `Class ${number}`;

/** Ask for the models until they are loaded; return whether they are. */
export async function loadModels() {
  for (let tries = 0; ; tries += 1) {
    try {
      models = (await getJson("v1/models")).data;
      if (models.length) break;
      notify("The models are being loaded\u2026");
    } catch (error) {
      if (!error.isPassing) {
        notify(error.message, error.status === 401);
        return false;
      }
      notify("The server cannot be reached. Trying again\u2026");
    }
    await pause(tries);
  }
  notify("");
  const options = models.map(({ id }) => element("option", { value: id }, id));
  find("#model").replaceChildren(...options);
  find("#model").disabled = models.length < 2;
  return true;
}
