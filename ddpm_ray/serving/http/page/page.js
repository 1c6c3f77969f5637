// The web page of a server: draws and edits images by its jobs, /v1/jobs/{id}.
// Nothing is stored but a token, in the storage of the tab.

const PREVIEWS = 3;
const SILENT_S = 40; // the server writes every 15 s; a longer silence is a lost connection
const RETRY_S = [0.5, 1, 2, 4, 8]; // pauses before a lost connection is tried again
const MOST_ENTRIES = 100; // of the history
const MOST_MARGIN = 2048; // pixels
const MOST_PIXELS = 2 ** 24; // of an image that is edited as it is
const LARGE = 4; // an image of more times the model's size is scaled down unless asked otherwise
const MASK_COLOUR = "rgb(235 0 110 / 0.6)";
const BRUSH_COLOURS = { brush: "rgb(235 0 110 / 0.35)", eraser: "rgb(255 255 255 / 0.6)" };
const SAMPLERS = {
  ddim: "DDIM",
  ancestral: "Ancestral (DDPM)",
  dpm_solver_pp: "DPM-Solver++",
  dpm_solver_pp_sde: "DPM-Solver++ SDE",
  unipc: "UniPC",
  heun: "Heun",
  plms: "PLMS",
};
const FIELDS = [
  "prompt", "negative_prompt", "labels", "strength", "n", "seed", "steps", "guidance_scale",
  "sampler",
];

const find = (selector) => document.querySelector(selector);
const form = find("#settings");
let models = [];

// ---------------------------------------------------------------------------------------- elements

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Have screen readers say a text. */
function announce(text) {
  find("#live").textContent = text;
}

/** Show a message above everything, or none; `offersToken`: with a button to enter a token. */
function notify(text, offersToken = false) {
  const notice = find("#notice");
  notice.hidden = !text;
  notice.firstElementChild.textContent = text;
  notice.lastElementChild.hidden = !offersToken;
}

const kind = () => form.elements.kind.value;
const tool = () => find("input[name=tool]:checked").value;
const model = () => models.find((one) => one.id === find("#model").value) ?? models[0];
const field = (name) => find(`.field[data-field="${name}"]`);
const isShown = (node) => node !== null && node.offsetParent !== null;

// ------------------------------------------------------------------------------------------ errors

/** Show an error of the API next to the field that it names, or else at the Generate button. */
function showError(error) {
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

function clearErrors() {
  for (const text of document.querySelectorAll('.error[id^="error-"]')) text.remove();
  for (const input of document.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}

// --------------------------------------------------------------------------------------------- API

class ApiError extends Error {
  constructor(message, param, status, code) {
    super(message);
    Object.assign(this, { param, status, code });
  }

  /** Whether the same request may succeed later. */
  get isPassing() {
    return [502, 503, 504].includes(this.status);
  }
}

/** The server could not be reached, or an answer was cut off. */
class ConnectionError extends Error {
  isPassing = true;
}

/** Return what a promise of the network gives. Throws ConnectionError where it fails. */
async function connected(promise) {
  try {
    return await promise;
  } catch (cause) {
    throw new ConnectionError("The server cannot be reached.", { cause });
  }
}

/** Fetch a path of the server; asks for a token where one is needed.
 *  Throws ApiError or ConnectionError. */
async function call(method, path, { body, signal, keepalive = false } = {}) {
  for (;;) {
    const token = sessionStorage.getItem("token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const response = await connected(fetch(path, {
      method, body, signal, keepalive, headers, cache: "no-store",
    }));
    if (response.ok) return response;
    if (response.status === 401) {
      await askToken(token);
      continue;
    }
    const found = await response.json().catch(() => ({}));
    const { message, param, code } = found.error ?? {};
    const text = message ?? `The server answers with status ${response.status}.`;
    throw new ApiError(text, param, response.status, code);
  }
}

let asking = null;

/** Wait until a token other than the refused one is entered. Throws ApiError if none is. */
function askToken(refused) {
  if ((sessionStorage.getItem("token") ?? "") !== (refused ?? "")) return Promise.resolve();
  asking ??= new Promise((resolve, reject) => {
    const dialog = find("#token-dialog");
    const input = find("#token");
    find("#token-error").hidden = !refused;
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      const token = dialog.returnValue === "ok" ? input.value.trim() : "";
      input.value = "";
      if (token) {
        sessionStorage.setItem("token", token);
        resolve();
      } else {
        reject(new ApiError("This server needs a token.", null, 401));
      }
    }, { once: true });
  });
  return asking;
}

/** Yield the JSON of server-sent events; `onData` is called whenever something comes. */
async function* serverEvents(response, onData) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await connected(reader.read());
    if (done) return;
    onData();
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

// -------------------------------------------------------------------------------------------- jobs

let isPreparing = false; // a request is being put together
let running = null; // the Job that has not ended

class Job {
  constructor(body, settings, source, count) {
    Object.assign(this, { body, settings, source, count });
    this.id = [...crypto.getRandomValues(new Uint8Array(16))]
      .map((byte) => byte.toString(16).padStart(2, "0")).join("");
    this.path = `v1/jobs/${this.id}`;
    this.begun = performance.now();
    this.images = []; // {url, facts} by index
    this.shown = -1; // the last preview
    this.rows = null; // of network calls
    this.share = 0; // of them that are known to be computed
    this.isCancelled = false;
    this.ending = new AbortController(); // aborted when it is cancelled
  }

  get isDone() {
    return this.images.filter(Boolean).length === this.count;
  }

  /** Do `act` until it succeeds, with pauses while the server cannot be reached. */
  async patiently(act) {
    for (let tries = 0; !this.isCancelled; tries += 1) {
      try {
        return await act(() => { tries = 0; });
      } catch (error) {
        if (this.isCancelled) return undefined;
        if (!error.isPassing) throw error;
        showProgress(this, "Connection lost. Trying again\u2026");
        await this.pause(RETRY_S[Math.min(tries, RETRY_S.length - 1)]);
      }
    }
    return undefined;
  }

  pause(seconds) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, seconds * 1000);
      this.ending.signal.addEventListener("abort", () => {
        clearTimeout(timer);
        resolve();
      });
    });
  }

  /** Begin the job on the server, or find it: its images are the same. */
  async submit() {
    const signal = AbortSignal.timeout(60_000);
    const response = await call("PUT", this.path, { body: this.body, signal });
    this.rows = (await connected(response.json())).rows;
  }

  /** Read the events of the job until it has ended or the connection is lost. */
  async follow(onEvent) {
    const silence = new AbortController();
    let timer = null;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_S * 1000);
    };
    heard();
    const signal = AbortSignal.any([silence.signal, this.ending.signal]);
    try {
      const response = await call("GET", `${this.path}/events`, { signal });
      for await (const event of serverEvents(response, heard)) {
        onEvent();
        await this.take(event);
        if (this.isDone) return;
      }
    } finally {
      clearTimeout(timer);
    }
    throw new ConnectionError("The stream has ended before the job.");
  }

  async take(event) {
    if (event.type === "error") {
      const { message, param, code } = event.error;
      // The server may have lost the job, and then takes it again: 404 if so.
      const state = await connected((await call("GET", this.path)).json());
      if (state.error) throw new ApiError(message, param, 500, code);
    } else if (event.type === "progress") {
      showProgress(this, null, event);
    } else if (event.type.endsWith(".partial_image")) {
      if (event.partial_image_index >= this.shown) showPreview(this, event);
      this.shown = event.partial_image_index;
    } else if (event.type.endsWith(".completed")) {
      const url = `data:image/${event.output_format};base64,${event.b64_json}`;
      this.images[event.index] = { url, facts: event.ddpm_ray };
    }
  }

  /** Have the images drawn, whatever happens to the connection. Throws ApiError. */
  async run(onAccepted) {
    await this.patiently(() => this.submit());
    if (!this.isCancelled) onAccepted();
    while (!this.isDone && !this.isCancelled) {
      try {
        await this.patiently((onEvent) => this.follow(onEvent));
      } catch (error) {
        if (error.status !== 404) throw error;
        await this.patiently(() => this.submit());
      }
    }
    if (this.isCancelled) await call("DELETE", this.path);
  }

  cancel() {
    this.isCancelled = true;
    this.ending.abort();
  }
}

/** Draw what the form says. */
async function generate() {
  if (isPreparing || running !== null) return;
  clearErrors();
  isPreparing = true;
  let job;
  try {
    job = await newJob();
  } catch (error) {
    showError(error);
    return;
  } finally {
    isPreparing = false;
  }
  running = job;
  showRunning(job);
  let restore = () => {};
  try {
    await job.run(() => { restore = showFrames(job); });
    if (job.isCancelled) restore();
    else finish(job);
  } catch (error) {
    restore();
    const isAway = job.isCancelled && error instanceof ConnectionError;
    const text = "The server cannot be reached. The job may still run.";
    if (isAway || !job.isCancelled) showError(isAway ? new ApiError(text) : error);
  } finally {
    running = null;
    showRunning(null);
    if (job.isCancelled) announce("Cancelled");
  }
}

/** The job of the form. Throws an error with the field that is wrong. */
async function newJob() {
  const settings = formSettings();
  const body = new FormData();
  body.set("kind", settings.kind);
  body.set("model", settings.model);
  body.set("partial_images", PREVIEWS);
  for (const name of FIELDS) {
    const value = settings[name];
    if (value !== "") body.set(name, name === "labels" ? `[${value}]` : value);
  }
  const source = settings.kind === "generation" ? null : editor.snapshot();
  if (settings.kind !== "generation") await editor.addFiles(body);
  return new Job(body, settings, source, Number(settings.n) || 1);
}

/** The texts of all fields, by name; empty for those that do not apply. */
function formSettings() {
  const settings = { kind: kind(), model: model().id };
  for (const name of FIELDS) {
    const input = form.elements[name];
    const applies = isShown(field(name));
    if (applies && input.validity.badInput) throw new ApiError("Give a number.", name);
    settings[name] = applies ? input.value.trim() : "";
  }
  return settings;
}

// ------------------------------------------------------------------------------------------ result

function showRunning(job) {
  const cancel = find("#cancel");
  if (job === null && document.activeElement === cancel) find("#generate").focus();
  find("#running").hidden = job === null;
  find("#generate").setAttribute("aria-disabled", job !== null);
  find("#result").setAttribute("aria-busy", job !== null);
  cancel.disabled = false;
  if (job === null) return;
  showProgress(job, "Sending\u2026");
  announce("Started");
  find("#result").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

/** Show empty frames of a job in place of earlier images; return what brings these back. */
function showFrames(job) {
  const earlier = [...find("#images").children];
  const wasHidden = find("#facts").hidden;
  find("#images").replaceChildren(...Array.from({ length: job.count }, () => figure(null, "")));
  find("#facts").hidden = true;
  return () => {
    find("#images").replaceChildren(...earlier);
    find("#facts").hidden = wasHidden;
  };
}

/** Show how far a job is: a text, or an event of the server. */
function showProgress(job, text, event = null) {
  const bar = find("#progress");
  if (event === null) {
    bar.removeAttribute("value");
    find("#running-text").textContent = text;
    return;
  }
  const left = event.seconds_left;
  const time = left === null ? "" : ` \u00b7 about ${duration(left)} left`;
  const isBegun = event.place === 0 || job.shown >= 0; // a place may be older than a preview
  if (isBegun && job.rows) {
    job.share = Math.min(1, Math.max(job.share, event.computed_rows / job.rows));
    bar.value = job.share;
    find("#running-text").textContent = `${Math.round(job.share * 100)} %${time}`;
  } else {
    bar.removeAttribute("value");
    const place = event.place > 1 ? `Place ${event.place} in the queue` : "Next in the queue";
    find("#running-text").textContent = place + time;
    if (find("#live").textContent !== place) announce(place);
  }
}

function duration(seconds) {
  const whole = Math.max(1, Math.ceil(seconds));
  return whole < 90 ? `${whole} s` : `${Math.round(whole / 60)} min`;
}

/** A figure of an image, with nothing in it yet if `url` is null. */
function figure(url, alt) {
  const made = element("figure", { className: url === null ? "preview" : "" });
  made.append(url === null ? element("div", { className: "blank" }) : picture(url, alt));
  if (url === null) made.firstElementChild.style.aspectRatio = ratio(pictureSize());
  return made;
}

const ratio = ({ width, height }) => `${width} / ${height}`;

/** The size of the images that are drawn. */
function pictureSize() {
  const [width, height] = model().size.split("x").map(Number);
  return kind() === "edit" && editor.source ? editor.size() : { width, height };
}

function picture(url, alt) {
  const image = element("img", { src: url, alt });
  image.addEventListener("load", () => {
    image.classList.toggle("pixels", image.naturalWidth < 256);
  }, { once: true });
  return image;
}

function showPreview(job, event) {
  const at = find("#images").children[event.index];
  if (!at) return;
  const url = `data:image/png;base64,${event.b64_json}`;
  const text = `Preview ${event.partial_image_index + 1} of ${PREVIEWS}`;
  at.replaceChildren(picture(url, text));
  if (event.index > 0) return;
  announce(text);
  const computed_rows = (job.rows * event.partial_image_index) / PREVIEWS;
  showProgress(job, null, { place: 0, seconds_left: null, computed_rows });
}

function finish(job) {
  const seconds = (performance.now() - job.begun) / 1000;
  const entries = job.images.map((image, index) => ({ ...image, index, job }));
  find("#images").replaceChildren(...entries.map(resultFigure));
  showFacts(job, seconds);
  addHistory(entries);
  announce(entries.length === 1 ? "Finished: 1 image" : `Finished: ${entries.length} images`);
}

function resultFigure(entry) {
  const number = entry.job.count > 1 ? ` ${entry.index + 1}` : "";
  const made = figure(entry.url, `Image${number}: ${title(entry)}`);
  const buttons = element("figcaption", { className: "row" }, downloadLink(entry));
  for (const [wanted, text] of [["edit", "Edit"], ["variation", "Variations"]]) {
    if (!kindsOf(model()).includes(wanted)) continue;
    const button = element("button", { type: "button" }, text);
    const name = wanted === "edit" ? `Edit image${number}` : `Variations of image${number}`;
    button.setAttribute("aria-label", name);
    button.addEventListener("click", () => editImage(entry, wanted));
    buttons.append(button);
  }
  made.append(buttons);
  return made;
}

function downloadLink(entry) {
  const name = `${entry.facts.model}-${seedOf(entry)}-${entry.index}.png`;
  const link = element("a", { href: entry.url, download: name, className: "button" }, "Download");
  link.setAttribute("aria-label", `Download ${name}`);
  return link;
}

/** The seed of an image as a text: numbers of JavaScript have 53 bits. */
function seedOf(entry) {
  return entry.job.settings.seed || String(entry.facts.seed);
}

/** A short description of an image. */
function title(entry) {
  const { prompt, labels, kind: made, model: id } = entry.job.settings;
  const classes = models.find((one) => one.id === id)?.num_classes ?? 0;
  const number = labels === "" ? entry.index % classes : Number(labels);
  const label = classes ? labelName(number, id) : "";
  const kinds = { generation: "", edit: "Edit", variation: "Variation" };
  const words = [kinds[made], prompt, label].filter(Boolean).join(" \u00b7 ");
  const place = entry.job.count > 1 ? ` \u00b7 ${entry.index + 1} of ${entry.job.count}` : "";
  return `${words || "Image"} \u00b7 seed ${seedOf(entry)}${place}`;
}

function showFacts(job, seconds) {
  const { settings, images } = job;
  const seed = seedOf({ ...images[0], job });
  const used = models.find((one) => one.id === settings.model) ?? model();
  const parts = [`Seed ${seed}`, `${settings.steps || used.steps} steps`];
  if (settings.sampler) parts.push(SAMPLERS[settings.sampler] ?? settings.sampler);
  if (settings.guidance_scale) parts.push(`guidance ${settings.guidance_scale}`);
  if (seconds !== null) parts.push(`${seconds.toFixed(1)}\u00a0s`);
  find("#facts p").textContent = parts.join(" \u00b7 ");
  find("#use-seed").onclick = () => {
    form.elements.seed.value = seed;
    form.elements.seed.focus();
  };
  find("#facts").hidden = false;
}

/** Edit a drawn image. */
async function editImage(entry, wanted) {
  form.elements.kind.value = wanted;
  showFields();
  await editor.open(await imageBlob(entry.url), "drawn image");
  find("#editor").scrollIntoView({ block: "nearest", behavior: "smooth" });
  find(wanted === "edit" ? "#canvas" : "#generate").focus({ preventScroll: true });
}

async function imageBlob(url) {
  const text = atob(url.slice(url.indexOf(",") + 1));
  const type = url.slice(5, url.indexOf(";"));
  return new Blob([Uint8Array.from(text, (letter) => letter.charCodeAt(0))], { type });
}

// ----------------------------------------------------------------------------------------- history

function addHistory(entries) {
  const list = find("#entries");
  for (const entry of entries.toReversed()) {
    const text = title(entry);
    const image = picture(entry.url, "");
    const button = element("button", { type: "button", title: text }, image);
    button.setAttribute("aria-label", `Use settings: ${text}`);
    button.addEventListener("click", () => takeOver(entry));
    const caption = element("span", { className: "caption muted" }, text);
    caption.setAttribute("aria-hidden", "true"); // the button says it
    list.prepend(element("li", {}, button, caption, downloadLink(entry)));
  }
  while (list.children.length > MOST_ENTRIES) list.lastElementChild.remove();
  find("#history").hidden = false;
}

/** Take over the settings of an image of the history, and show it. */
function takeOver(entry) {
  const { settings, source } = entry.job;
  clearErrors();
  if (models.some((one) => one.id === settings.model)) find("#model").value = settings.model;
  showModel();
  form.elements.kind.value = settings.kind;
  for (const name of FIELDS) {
    const isKept = name === "strength" && settings[name] === ""; // a slider is never empty
    if (!isKept) form.elements[name].value = settings[name];
  }
  form.elements.seed.value = seedOf(entry);
  if (source !== null) editor.restore(source);
  showFields();
  if (running === null) {
    find("#images").replaceChildren(resultFigure(entry));
    showFacts(entry.job, null);
  }
  announce("Settings taken over");
}

// ------------------------------------------------------------------------------------------ editor

/** The image that is edited: its mask and its margins. */
const editor = {
  source: null, // {blob, bitmap, canvas, isWhole, mask, margins, scale}
  overlay: null, // canvas of the size of the image, with MASK_COLOUR where the mask is 1
  cursor: null, // {x, y} in pixels of the image
  isPainting: false,

  /** Open an image file. */
  async open(blob, name) {
    clearErrors();
    const how = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    const bitmap = await createImageBitmap(blob, how).catch(() => null);
    if (bitmap === null) {
      showError(new ApiError(`${name} is not an image that can be read.`, "image"));
      return;
    }
    this.source = { blob, bitmap, margins: { left: 0, top: 0, right: 0, bottom: 0 } };
    const [width, height] = this.modelSize();
    const isLarge = bitmap.width > LARGE * width || bitmap.height > LARGE * height;
    this.render(isLarge ? "fit" : "whole");
    showFields();
  },

  modelSize() {
    return model().size.split("x").map(Number);
  },

  /** Draw the image at a scale: "whole", or "fit" for the model's size; the mask is emptied. */
  render(scale) {
    const { bitmap } = this.source;
    const [width, height] = scale === "fit" ? this.fitSize() : [bitmap.width, bitmap.height];
    const canvas = element("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    const mask = new Uint8Array(width * height);
    let isOpaque = true;
    for (let at = 0; at < mask.length; at += 1) {
      mask[at] = data[4 * at + 3] === 0 ? 1 : 0;
      isOpaque &&= data[4 * at + 3] === 255;
    }
    context.globalCompositeOperation = "destination-over"; // as the server does: on white
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    Object.assign(this.source, { canvas, scale, isWhole: scale === "whole" && isOpaque });
    this.setMask(mask);
    const side = Math.min(width, height);
    const brush = find("#brush-size");
    brush.max = Math.max(2, Math.round(side / 2));
    brush.value = Math.max(1, Math.round(side / 8));
    this.showBrush();
    this.cursor = null;
  },

  /** The size at which the shorter side has the model's. */
  fitSize() {
    const { bitmap } = this.source;
    const [width, height] = this.modelSize();
    const scale = Math.max(width / bitmap.width, height / bitmap.height);
    return [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  },

  /** The size of the canvas with its margins. */
  size() {
    const { canvas, margins } = this.source;
    return {
      width: margins.left + canvas.width + margins.right,
      height: margins.top + canvas.height + margins.bottom,
    };
  },

  get hasMargins() {
    return Object.values(this.source.margins).some((one) => one > 0);
  },

  get isMarked() {
    return this.source !== null && (this.hasMargins || this.source.mask.includes(1));
  },

  snapshot() {
    if (this.source === null) return null;
    const { mask, margins } = this.source;
    return { ...this.source, mask: mask.slice(), margins: { ...margins } };
  },

  restore(source) {
    this.source = { ...source, margins: { ...source.margins } };
    this.setMask(source.mask);
    this.cursor = null;
  },

  /** Add the files of the image and its mask to the body of a request. */
  async addFiles(body) {
    if (this.source === null) throw new ApiError("Choose an image first.", "image");
    if (kind() === "variation") {
      body.set("image", await this.cropped(), "image.png");
      return;
    }
    if (!find("#too-small").hidden) {
      throw new ApiError("The image is too small: extend it.", "image");
    }
    const { blob, canvas, isWhole } = this.source;
    if (this.hasMargins) { // transparent wherever it is to be painted
      body.set("image", await pngOf(this.composed()), "image.png");
      return;
    }
    body.set("image", isWhole ? blob : await pngOf(canvas), "image.png");
    if (this.isMarked) body.set("mask", await pngOf(this.composed()), "mask.png");
  },

  /** The image with its margins, which are transparent as the painted part is. */
  composed() {
    const { canvas, margins, mask } = this.source;
    const made = element("canvas", this.size());
    const context = made.getContext("2d");
    context.drawImage(canvas, margins.left, margins.top);
    const { width, height } = canvas;
    const known = new ImageData(width, height);
    for (let at = 0; at < mask.length; at += 1) known.data[4 * at + 3] = mask[at] ? 0 : 255;
    const cut = element("canvas", { width, height });
    cut.getContext("2d").putImageData(known, 0, 0);
    context.globalCompositeOperation = "destination-in";
    context.drawImage(cut, margins.left, margins.top);
    return made;
  },

  /** The middle of the image at the model's size, as variations need it. */
  async cropped() {
    const [width, height] = this.modelSize();
    const { blob, bitmap, isWhole } = this.source;
    if (isWhole && bitmap.width === width && bitmap.height === height) return blob;
    const made = element("canvas", { width, height });
    const context = made.getContext("2d");
    const [wide, high] = this.fitSize();
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, (width - wide) / 2, (height - high) / 2, wide, high);
    return pngOf(made);
  },

  /** Paint, or erase, along a line of the image. */
  paint(from, to) {
    const { canvas, mask } = this.source;
    const value = tool() === "brush" ? 1 : 0;
    const spacing = Math.max(0.5, Number(find("#brush-size").value) / 8);
    const steps = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / spacing));
    for (let step = 0; step <= steps; step += 1) {
      const x = from.x + ((to.x - from.x) * step) / steps;
      const y = from.y + ((to.y - from.y) * step) / steps;
      for (const at of this.covered(x, y, canvas)) {
        if (mask[at] !== value) this.mark(at, value);
      }
    }
  },

  /** Set a pixel of the mask. */
  mark(at, value) {
    const { mask, canvas } = this.source;
    const context = this.overlay.getContext("2d");
    mask[at] = value;
    context.fillStyle = MASK_COLOUR;
    const pixel = [at % canvas.width, Math.floor(at / canvas.width), 1, 1];
    if (value) context.fillRect(...pixel);
    else context.clearRect(...pixel);
  },

  /** Take another mask: 1 where the image is to be painted. */
  setMask(mask) {
    const { width, height } = this.source.canvas;
    this.overlay = element("canvas", { width, height });
    this.source.mask = new Uint8Array(mask.length);
    for (let at = 0; at < mask.length; at += 1) if (mask[at]) this.mark(at, 1);
  },

  /** The pixels that the brush covers at a point. */
  covered(x, y, { width, height }) {
    const radius = Number(find("#brush-size").value) / 2;
    const inside = (i, j) => Math.hypot(i + 0.5 - x, j + 0.5 - y) <= radius
      || (i === Math.floor(x) && j === Math.floor(y));
    const first = (at) => Math.max(0, Math.floor(at - radius));
    const found = [];
    for (let j = first(y); j < Math.min(height, y + radius + 1); j += 1) {
      for (let i = first(x); i < Math.min(width, x + radius + 1); i += 1) {
        if (inside(i, j)) found.push(j * width + i);
      }
    }
    return found;
  },

  /** Show the image, its mask, its margins and the brush. */
  draw() {
    const shown = find("#canvas");
    const { canvas, margins } = this.source;
    const { width, height } = this.size();
    Object.assign(shown, { width, height }); // which empties it
    const room = find("#stage").clientWidth - 48; // handles on both sides
    const scale = Math.min(room / width, 420 / height);
    shown.style.width = `${width * scale}px`;
    shown.style.height = `${height * scale}px`;
    shown.classList.toggle("pixels", scale > 1);
    const context = shown.getContext("2d");
    context.translate(margins.left, margins.top);
    context.drawImage(canvas, 0, 0);
    if (kind() !== "edit") return;
    context.drawImage(this.overlay, 0, 0);
    if (this.cursor === null) return;
    context.fillStyle = BRUSH_COLOURS[tool()];
    for (const at of this.covered(this.cursor.x, this.cursor.y, canvas)) {
      context.fillRect(at % canvas.width, Math.floor(at / canvas.width), 1, 1);
    }
  },

  /** Show what belongs to the image, after any change of it. */
  show() {
    const has = this.source !== null;
    find("#tools").hidden = !has;
    find("#editor").classList.toggle("has-picture", has);
    find("#image").labels[0].textContent = has ? "Choose another image" : "Choose an image";
    const isEdit = kind() === "edit";
    find("#editor-title").textContent = isEdit ? "Image to edit" : "Image to vary";
    if (!has) return;
    for (const id of ["#mask-tools", "#margins", "#canvas-help"]) find(id).hidden = !isEdit;
    find("#frame").classList.toggle("fixed", !isEdit);
    find("#canvas").tabIndex = isEdit ? 0 : -1;
    for (const input of document.querySelectorAll("#margins input")) {
      const value = this.source.margins[input.dataset.side];
      if (Number(input.value) !== value) input.value = value; // leaves what is being typed
    }
    this.showSizes(isEdit);
    this.draw();
  },

  showSizes(isEdit) {
    const { width, height } = this.size();
    const [wide, high] = this.modelSize();
    const { bitmap, scale } = this.source;
    const lacks = isEdit && (width < wide || height < high);
    const isCropped = !isEdit && (bitmap.width !== wide || bitmap.height !== high);
    find("#canvas-size").textContent = isCropped
      ? `Its middle is used, scaled to ${wide} \u00d7 ${high} pixels`
      : `${width} \u00d7 ${height} pixels`;
    find("#too-small").hidden = !lacks;
    find("#too-small").textContent = !lacks ? "" : `This model edits images of at least ${wide} `
      + `\u00d7 ${high} pixels. Extend this one by ${Math.max(0, wide - width)} in width and `
      + `${Math.max(0, high - height)} in height.`;
    const isScalable = bitmap.width > wide && bitmap.height > high;
    find("#scaling").hidden = !(isEdit && isScalable);
    const option = (value, size, note) => element(
      "option", { value, selected: value === scale }, `${size.join(" \u00d7 ")} (${note})`,
    );
    const options = [option("fit", this.fitSize(), "scaled to the model")];
    if (bitmap.width * bitmap.height <= MOST_PIXELS) {
      options.unshift(option("whole", [bitmap.width, bitmap.height], "as it is"));
    }
    find("#scale").replaceChildren(...options);
  },

  showBrush() {
    find("#brush-size + output").value = find("#brush-size").value;
  },

  /** The point of the image under a pointer. */
  point(event) {
    const box = find("#canvas").getBoundingClientRect();
    const { width, height } = this.size();
    const { margins } = this.source;
    return {
      x: ((event.clientX - box.left) * width) / box.width - margins.left,
      y: ((event.clientY - box.top) * height) / box.height - margins.top,
    };
  },
};

const pngOf = (canvas) => new Promise((resolve, reject) => {
  const failed = () => reject(new ApiError("The image is too large for this browser.", "image"));
  canvas.toBlob((blob) => (blob === null ? failed() : resolve(blob)), "image/png");
});

function listenToCanvas() {
  const canvas = find("#canvas");
  const isEdit = () => kind() === "edit" && editor.source !== null;
  canvas.addEventListener("pointerdown", (event) => {
    if (!isEdit() || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    editor.isPainting = true;
    editor.cursor = editor.point(event);
    editor.paint(editor.cursor, editor.cursor);
    showFields();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!isEdit()) return;
    const from = editor.cursor;
    editor.cursor = editor.point(event);
    if (editor.isPainting && from !== null) editor.paint(from, editor.cursor);
    editor.draw();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      editor.isPainting = false;
      if (!isEdit()) return;
      if (event.pointerType !== "mouse") editor.cursor = null; // a finger has left
      showFields();
    });
  }
  canvas.addEventListener("pointerleave", () => {
    if (editor.isPainting || !isEdit()) return;
    editor.cursor = null;
    editor.draw();
  });
  canvas.addEventListener("keydown", (event) => {
    if (isEdit() && moveBrush(event)) event.preventDefault();
  });
  canvas.addEventListener("keyup", (event) => {
    if (event.key === " ") editor.isPainting = false;
  });
  canvas.addEventListener("blur", () => {
    Object.assign(editor, { isPainting: false, cursor: null });
    if (isEdit()) editor.draw();
  });
}

/** Move or use the brush by a key; return whether the key does so. */
function moveBrush(event) {
  const { width, height } = editor.source.canvas;
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key !== " " && !(event.key in moves)) return false;
  const from = editor.cursor ?? { x: Math.floor(width / 2) + 0.5, y: Math.floor(height / 2) + 0.5 };
  const [right, down] = moves[event.key] ?? [0, 0];
  const inside = (at, side) => Math.min(side - 0.5, Math.max(0.5, Math.floor(at) + 0.5));
  editor.cursor = { x: inside(from.x + right, width), y: inside(from.y + down, height) };
  if (event.key === " ") editor.isPainting = true;
  if (editor.isPainting) editor.paint(editor.cursor, editor.cursor);
  showFields();
  return true;
}

function listenToHandles() {
  const signs = { left: -1, top: -1, right: 1, bottom: 1 };
  for (const handle of document.querySelectorAll(".handle")) {
    const { side } = handle.dataset;
    const along = side === "left" || side === "right" ? "clientX" : "clientY";
    let start = null;
    handle.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      handle.setPointerCapture(event.pointerId);
      const scale = find("#canvas").getBoundingClientRect().width / editor.size().width;
      start = { at: event[along], margin: editor.source.margins[side], scale };
      event.preventDefault();
    });
    handle.addEventListener("pointermove", (event) => {
      if (start === null) return;
      const moved = (signs[side] * (event[along] - start.at)) / start.scale;
      setMargin(side, start.margin + moved);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      handle.addEventListener(name, () => { start = null; });
    }
  }
  for (const input of document.querySelectorAll("#margins input")) {
    input.addEventListener("input", () => setMargin(input.dataset.side, Number(input.value)));
  }
}

function setMargin(side, value) {
  editor.source.margins[side] = Math.min(MOST_MARGIN, Math.max(0, Math.round(value) || 0));
  showFields();
}

function listenToFiles() {
  const chooser = find("#image");
  const open = async (file) => {
    if (!file) return;
    if (kind() === "generation") form.elements.kind.value = "edit";
    showFields();
    await editor.open(file, file.name);
  };
  chooser.addEventListener("change", async () => {
    await open(chooser.files[0]);
    chooser.value = "";
  });
  const accepts = (event) => [...event.dataTransfer.types].includes("Files") && models.length
    && kindsOf(model()).length > 1;
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.dataTransfer.dropEffect = accepts(event) ? "copy" : "none";
    find("#editor").classList.toggle("dropping", Boolean(accepts(event)));
  });
  document.addEventListener("dragleave", () => find("#editor").classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    find("#editor").classList.remove("dropping");
    if (accepts(event)) open(event.dataTransfer.files[0]);
  });
}

// ------------------------------------------------------------------------------- models and fields

/** The kinds of requests that a model takes. */
function kindsOf(one) {
  return ["generation", one.edits && "edit", one.variations && "variation"].filter(Boolean);
}

function labelName(number, id = model().id) {
  const names = models.find((one) => one.id === id)?.label_names;
  return names?.[number] ?? `Class ${number}`;
}

/** Show what the chosen model takes. */
function showModel() {
  const chosen = model();
  const kinds = kindsOf(chosen);
  for (const input of form.elements.kind) input.parentElement.hidden = !kinds.includes(input.value);
  find("#kinds").hidden = kinds.length < 2;
  if (!kinds.includes(kind())) form.elements.kind.value = "generation";
  const labels = [element("option", { value: "" }, "All, in turn")];
  for (let number = 0; number < chosen.num_classes; number += 1) {
    labels.push(element("option", { value: number }, labelName(number)));
  }
  form.elements.labels.replaceChildren(...labels);
  const own = SAMPLERS[chosen.sampler] ?? chosen.sampler;
  const samplers = [element("option", { value: "" }, `Default (${own})`)];
  for (const [value, name] of Object.entries(SAMPLERS)) {
    samplers.push(element("option", { value }, name));
  }
  form.elements.sampler.replaceChildren(...samplers);
  form.elements.steps.placeholder = chosen.steps;
  form.elements.steps.max = chosen.num_steps;
  form.elements.guidance_scale.placeholder = chosen.guidance_scale;
  const colours = chosen.channels === 1 ? "grey" : "colour";
  if (editor.source?.scale === "fit") editor.render("fit");
  find("#model-facts").textContent = `${chosen.size.replace("x", " \u00d7 ")} pixels, ${colours}`;
  showFields();
}

/** Show the fields that apply to the model and the task. */
function showFields() {
  const chosen = model();
  document.body.dataset.kind = kind();
  const applies = {
    prompt: chosen.takes_text,
    negative_prompt: chosen.takes_text && chosen.guidance,
    labels: chosen.num_classes > 0,
    guidance_scale: chosen.guidance,
    strength: kind() === "edit" && editor.source !== null && !editor.isMarked,
  };
  for (const [name, does] of Object.entries(applies)) field(name).hidden = !does;
  find("#editor").hidden = kind() === "generation";
  showStrength();
  if (kind() !== "generation") editor.show();
}

/** Ask for the models until they are loaded. */
async function loadModels() {
  for (let tries = 0; !models.length; tries += 1) {
    try {
      models = (await connected((await call("GET", "v1/models")).json())).data;
      notify(models.length ? "" : "The models are being loaded\u2026");
    } catch (error) {
      if (!error.isPassing) {
        notify(error.message, error.status === 401);
        return;
      }
      notify("The server cannot be reached. Trying again\u2026");
    }
    const pause_s = RETRY_S[Math.min(tries, RETRY_S.length - 1)];
    if (!models.length) await new Promise((resolve) => { setTimeout(resolve, pause_s * 1000); });
  }
  find("#model").replaceChildren(
    ...models.map(({ id }) => element("option", { value: id }, id)),
  );
  find("#model").disabled = models.length < 2;
  find("main").hidden = false;
  showModel();
}

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
  for (const input of form.elements.kind) input.addEventListener("change", showFields);
  find("#model").addEventListener("change", showModel);
  find("#cancel").addEventListener("click", () => {
    find("#cancel").disabled = true;
    showProgress(running, "Cancelling\u2026");
    running.cancel();
  });
  find("#brush-size").addEventListener("input", () => editor.showBrush());
  find("#clear-mask").addEventListener("click", () => {
    editor.setMask(new Uint8Array(editor.source.mask.length));
    showFields();
  });
  find("#scale").addEventListener("change", (event) => {
    editor.render(event.target.value);
    showFields();
  });
  find("#notice button").addEventListener("click", () => {
    notify("");
    loadModels();
  });
  listenToCanvas();
  listenToHandles();
  listenToFiles();
  new ResizeObserver(() => { if (editor.source && kind() !== "generation") editor.draw(); })
    .observe(find("#stage"));
  // A page that is closed does not leave its job behind.
  window.addEventListener("pagehide", () => {
    if (running) call("DELETE", running.path, { keepalive: true }).catch(() => {});
  });
}

function showStrength() {
  find("#strength").labels[0].querySelector("output").value = find("#strength").value;
}

listen();
loadModels();
