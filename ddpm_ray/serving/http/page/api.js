// Calls of the server, with the token that it may need, which the storage of the tab keeps.

import { find } from "./elements.js";

const RETRY_S = [0.5, 1, 2, 4, 8]; // pauses before a lost connection is tried again

/** An error of a request; `param` names the field that is wrong. */
export class ApiError extends Error {
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
export class ConnectionError extends Error {
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
export async function call(method, path, { body, signal, keepalive = false } = {}) {
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

/** The JSON that a path of the server gives. Throws as `call` does. */
export async function getJson(path) {
  return connected((await call("GET", path)).json());
}

let asking = null; // the promise of a token while the dialog is open

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
export async function* serverEvents(response, onData) {
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

/** Wait before the next try after so many that failed, or until `signal` is aborted. */
export function pause(tries, signal = null) {
  return new Promise((resolve) => {
    const seconds = RETRY_S[Math.min(tries, RETRY_S.length - 1)];
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    }, { once: true });
  });
}
