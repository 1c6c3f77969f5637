// One job of the server, /v1/jobs/{id}, which outlives lost connections.

import { ApiError, ConnectionError, call, getJson, pause, serverEvents } from "./api.js";

const SILENT_S = 40; // the server writes every 15 s; a longer silence is a lost connection
const SUBMIT_S = 60;

export class Job {
  images = []; // {url, facts} by index
  isCancelled = false;
  #preview = -1; // number of the last preview
  #share = 0; // of the network calls that are known to be computed
  #ending = new AbortController(); // aborted when it is cancelled

  /** A job of `count` images. `watch` has functions that are called while it runs:
   *  onAccepted(), onLost() for a connection that is tried again,
   *  onProgress({place, share, seconds_left, lost_processes}), and onPreview(event). */
  constructor(body, count, watch) {
    Object.assign(this, { body, count, watch });
    const id = [...crypto.getRandomValues(new Uint8Array(16))]
      .map((byte) => byte.toString(16).padStart(2, "0")).join("");
    this.path = `v1/jobs/${id}`;
  }

  /** Whether all images are there. */
  get isDone() {
    return this.images.filter(Boolean).length === this.count;
  }

  /** Have the images drawn, whatever happens to the connection. Throws ApiError. */
  async run() {
    await this.#patiently(() => this.#submit());
    if (!this.isCancelled) this.watch.onAccepted();
    while (!this.isDone && !this.isCancelled) {
      try {
        await this.#patiently((onEvent) => this.#follow(onEvent));
      } catch (error) {
        if (error.status !== 404) throw error;
        await this.#patiently(() => this.#submit());
      }
    }
    if (this.isCancelled) await this.#remove();
  }

  /** Have `run` end the job on the server and return. */
  cancel() {
    this.isCancelled = true;
    this.#ending.abort();
  }

  /** End the job from a page that is closed, which waits for nothing. */
  abandon() {
    call("DELETE", this.path, { keepalive: true }).catch(() => {});
  }

  /** Do `act` until it succeeds, with pauses while the server cannot be reached; it gets a
   *  function that says that the connection works. */
  async #patiently(act) {
    for (let tries = 0; !this.isCancelled; tries += 1) {
      try {
        await act(() => { tries = 0; });
        return;
      } catch (error) {
        if (this.isCancelled) return;
        if (!error.isPassing) throw error;
        this.watch.onLost();
        await pause(tries, this.#ending.signal);
      }
    }
  }

  /** Begin the job on the server, or find it: its images are the same. */
  async #submit() {
    const signal = AbortSignal.timeout(SUBMIT_S * 1000);
    await call("PUT", this.path, { body: this.body, signal });
  }

  /** Read the events of the job until it has ended or the connection is lost. */
  async #follow(onEvent) {
    const silence = new AbortController();
    let timer = null;
    const heard = () => {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_S * 1000);
    };
    heard();
    const signal = AbortSignal.any([silence.signal, this.#ending.signal]);
    try {
      const response = await call("GET", `${this.path}/events`, { signal });
      for await (const event of serverEvents(response, heard)) {
        onEvent();
        await this.#take(event);
        if (this.isDone) return;
      }
    } finally {
      clearTimeout(timer);
    }
    throw new ConnectionError("The stream has ended before the job.");
  }

  /** Note an event of the server. Throws ApiError for a job that has failed. */
  async #take(event) {
    if (event.type === "error") {
      const { message, param, code } = event.error;
      // The server may have lost the job, and then takes it again: 404 if so.
      const state = await getJson(this.path);
      if (state.error) throw new ApiError(message, param, 500, code);
    } else if (event.type === "progress") {
      this.watch.onProgress({ ...event, share: this.#shareOf(event) });
    } else if (event.type.endsWith(".partial_image")) {
      // A connection that is made again begins with the first preview.
      if (event.partial_image_index >= this.#preview) this.watch.onPreview(event);
      this.#preview = Math.max(this.#preview, event.partial_image_index);
    } else if (event.type.endsWith(".completed")) {
      const url = `data:image/${event.output_format};base64,${event.b64_json}`;
      this.images[event.index] = { url, facts: event.ddpm_ray };
    }
  }

  /** The share of the work that is done; a job that another process begins again stays there. */
  #shareOf({ place, computed_rows: computed, rows }) {
    if (place === 0) this.#share = Math.min(1, Math.max(this.#share, computed / rows));
    return this.#share;
  }

  /** End the job on the server. Throws ApiError where it may still run. */
  async #remove() {
    try {
      await call("DELETE", this.path);
    } catch (error) {
      if (!(error instanceof ConnectionError)) return; // it is not there
      throw new ApiError("The server cannot be reached. The job may still run.");
    }
  }
}
