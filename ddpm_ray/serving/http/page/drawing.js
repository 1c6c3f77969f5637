// Drawing what the form says: from the request to the images and the history.

import { editor } from "./editor.js";
import { announce } from "./elements.js";
import { clearErrors, formSettings, requestBody, showError } from "./form.js";
import { addHistory } from "./history.js";
import { Job } from "./job.js";
import { drawnSize } from "./models.js";
import { hideRunning, showProgress, showRunning, showState } from "./progress.js";
import { PREVIEWS, showFrames, showImages, showPreview } from "./result.js";

let isBusy = false; // from the request to its images
let running = null; // the job that has not ended

/** Draw what the form says, unless a job runs; an error is shown at its field. */
export async function generate() {
  if (isBusy) return;
  isBusy = true;
  clearErrors();
  try {
    await draw(await newRequest());
  } catch (error) {
    showError(error);
  } finally {
    isBusy = false;
  }
}

/** End the job that runs. */
export function cancel() {
  showState("Cancelling\u2026");
  running.cancel();
}

/** End the job that runs as the page is closed. */
export function abandon() {
  running?.abandon();
}

/** The request of the form: its settings, its body, a copy of the picture that it edits, or null,
 *  and the size of its images. Throws ApiError. */
async function newRequest() {
  const settings = formSettings();
  const body = requestBody(settings);
  body.set("partial_images", PREVIEWS);
  const [width, height] = drawnSize();
  if (settings.kind === "generation") {
    return { settings, body, picture: null, size: { width, height } };
  }
  const picture = editor.picture?.copy() ?? null;
  for (const [name, file] of Object.entries(await editor.files())) {
    body.set(name, file, `${name}.png`);
  }
  const size = settings.kind === "edit" ? picture.size() : { width, height };
  return { settings, body, picture, size };
}

/** Have a request drawn, and show it. Throws ApiError. */
async function draw({ settings, body, picture, size }) {
  const begun = performance.now();
  const count = Number(settings.n) || 1;
  let restore = () => {};
  const job = new Job(body, count, {
    onAccepted: () => { restore = showFrames(count, size); },
    onLost: () => showState("Connection lost. Trying again\u2026"),
    onProgress: showProgress,
    onPreview: showPreview,
  });
  running = job;
  showRunning();
  try {
    await job.run();
  } finally {
    running = null;
    hideRunning();
    if (!job.isDone) restore();
    if (job.isCancelled) announce("Cancelled");
  }
  if (!job.isDone) return;
  const drawn = job.images.map((image, index) => ({ ...image, index, count, settings, picture }));
  showImages(drawn, (performance.now() - begun) / 1000);
  addHistory(drawn);
  announce(count === 1 ? "Finished: 1 image" : `Finished: ${count} images`);
}
