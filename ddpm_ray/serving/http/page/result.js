// The images of a job: empty frames, previews, then the images with their facts.
//
// A drawn image is {url, facts, index, count, settings, picture}: its data URL, the server's facts,
// its number of how many, the form's settings, and a copy of the picture it was made from, or null.

import { announce, element, find, form } from "./elements.js";
import { openDrawn } from "./image-files.js";
import { SAMPLERS, kindsOf, labelName, model, modelNamed } from "./models.js";

/** The number of previews of a job. */
export const PREVIEWS = 3;

const KINDS = { generation: "", edit: "Edit", variation: "Variation" }; // in titles

/** Show empty frames of images in place of earlier ones; return what brings these back. */
export function showFrames(count, { width, height }) {
  const earlier = [...find("#images").children];
  const wasHidden = find("#facts").hidden;
  const frames = Array.from({ length: count }, () => {
    const blank = element("div", { className: "blank" });
    blank.style.aspectRatio = `${width} / ${height}`;
    return element("figure", { className: "preview" }, blank);
  });
  find("#images").replaceChildren(...frames);
  find("#facts").hidden = true;
  return () => {
    find("#images").replaceChildren(...earlier);
    find("#facts").hidden = wasHidden;
  };
}

/** Show a preview, an event of the server, in its frame. */
export function showPreview(event) {
  const url = `data:image/png;base64,${event.b64_json}`;
  const text = `Preview ${event.partial_image_index + 1} of ${PREVIEWS}`;
  find("#images").children[event.index].replaceChildren(imageElement(url, text));
  if (event.index === 0) announce(text);
}

/** Show drawn images of one job; `seconds` it took, or null if that is not known. */
export function showImages(drawn, seconds = null) {
  find("#images").replaceChildren(...drawn.map(figureOf));
  showFacts(drawn[0], seconds);
}

/** An image, whose pixels are seen if it is small. */
export function imageElement(url, alt) {
  const image = element("img", { src: url, alt });
  image.addEventListener("load", () => {
    image.classList.toggle("pixels", image.naturalWidth < 256);
  }, { once: true });
  return image;
}

/** A drawn image with its buttons. */
function figureOf(drawn) {
  const number = drawn.count > 1 ? ` ${drawn.index + 1}` : "";
  const buttons = element("figcaption", { className: "row" }, downloadLink(drawn));
  for (const task of kindsOf(model()).filter((one) => one !== "generation")) {
    const [text, name] = task === "edit" ? ["Edit", `Edit image${number}`]
      : ["Variations", `Variations of image${number}`];
    const button = element("button", { type: "button", ariaLabel: name }, text);
    button.addEventListener("click", () => openDrawn(drawn.url, task));
    buttons.append(button);
  }
  const image = imageElement(drawn.url, `Image${number}: ${title(drawn)}`);
  return element("figure", {}, image, buttons);
}

/** A link that saves a drawn image. */
export function downloadLink(drawn) {
  const name = `${drawn.facts.model}-${seedOf(drawn)}-${drawn.index}.png`;
  const properties = { href: drawn.url, download: name, ariaLabel: `Download ${name}` };
  return element("a", { ...properties, className: "button" }, "Download");
}

/** The seed of a drawn image as a text: numbers of JavaScript have 53 bits. */
export function seedOf(drawn) {
  return drawn.settings.seed || String(drawn.facts.seed);
}

/** A short description of a drawn image. */
export function title(drawn) {
  const { kind, prompt } = drawn.settings;
  const words = [KINDS[kind], prompt, className(drawn)].filter(Boolean).join(" \u00b7 ");
  const place = drawn.count > 1 ? ` \u00b7 ${drawn.index + 1} of ${drawn.count}` : "";
  return `${words || "Image"} \u00b7 seed ${seedOf(drawn)}${place}`;
}

/** The name of the class of a drawn image; empty if its model has no classes. */
function className({ settings, index }) {
  const used = modelNamed(settings.model);
  if (!used?.num_classes) return "";
  const number = settings.labels === "" ? index % used.num_classes : Number(settings.labels);
  return labelName(used, number);
}

/** Show how a drawn image was made. */
function showFacts(drawn, seconds) {
  const { settings } = drawn;
  const seed = seedOf(drawn);
  const steps = settings.steps || (modelNamed(settings.model) ?? model()).steps;
  const parts = [`Seed ${seed}`, `${steps} steps`];
  if (settings.sampler) parts.push(SAMPLERS[settings.sampler]);
  if (settings.guidance_scale) parts.push(`guidance ${settings.guidance_scale}`);
  if (seconds !== null) parts.push(`${seconds.toFixed(1)}\u00a0s`);
  find("#facts p").textContent = parts.join(" \u00b7 ");
  find("#use-seed").onclick = () => {
    form.elements.seed.value = seed;
    form.elements.seed.focus();
  };
  find("#facts").hidden = false;
}
