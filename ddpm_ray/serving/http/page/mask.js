// The mask over an image: the pixels to be painted anew, marked by strokes that can be undone.

import { element } from "./elements.js";

const COLOUR = "rgb(235 0 110 / 0.6)";
const MOST_UNDONE = 2 ** 23; // pixels of all strokes that can be undone

export class Mask {
  #strokes = []; // the numbers of the pixels that each has changed
  #overlay = null; // COLOUR where pixels are marked

  /** The mask of an image of this size; `pixels` has a 1 for each marked pixel, by rows. */
  constructor(width, height, pixels) {
    Object.assign(this, { width, height, pixels });
  }

  /** A copy, which later changes of this one do not change. */
  copy() {
    return new Mask(this.width, this.height, this.pixels.slice());
  }

  get isEmpty() {
    return !this.pixels.includes(1);
  }

  get canUndo() {
    return this.#strokes.some((stroke) => stroke.length > 0);
  }

  /** Begin a stroke: what is painted up to the next one is undone together. */
  begin() {
    this.#keep([]);
  }

  /** Take the last stroke back. */
  undo() {
    this.#strokes = this.#strokes.filter((stroke) => stroke.length > 0);
    for (const at of this.#strokes.pop() ?? []) this.pixels[at] = 1 - this.pixels[at];
    this.#overlay = null; // one drawing, however many pixels
  }

  /** Mark no pixel. */
  clear() {
    const marked = [];
    this.pixels.forEach((value, at) => { if (value) marked.push(at); });
    this.#keep(marked);
    this.pixels.fill(0);
    this.#overlay = null;
  }

  /** Set pixels to `value` along a line that is `width` pixels wide. */
  paint(from, to, width, value) {
    const spacing = Math.max(0.5, width / 8);
    const steps = Math.max(1, Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / spacing));
    for (let step = 0; step <= steps; step += 1) {
      const x = from.x + ((to.x - from.x) * step) / steps;
      const y = from.y + ((to.y - from.y) * step) / steps;
      for (const at of this.covered({ x, y }, width)) {
        if (this.pixels[at] !== value) this.#change(at, value);
      }
    }
  }

  /** The numbers, by rows, of the pixels in a circle of a diameter: at least that at its middle. */
  covered({ x, y }, diameter) {
    const { width, height } = this;
    const radius = diameter / 2;
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
  }

  /** The marked pixels as an image to lie over the picture. */
  get overlay() {
    this.#overlay ??= this.stencil(COLOUR);
    return this.#overlay;
  }

  /** A canvas with a colour where pixels are marked. */
  stencil(colour) {
    const { width, height } = this;
    const known = new ImageData(width, height);
    this.pixels.forEach((value, at) => { known.data[4 * at + 3] = value ? 0 : 255; });
    const made = element("canvas", { width, height });
    const context = made.getContext("2d");
    context.putImageData(known, 0, 0);
    context.globalCompositeOperation = "source-out";
    context.fillStyle = colour;
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "source-over"; // #mark goes on in this colour
    return made;
  }

  /** Add a stroke to those that can be undone; the oldest go where they are too many pixels. */
  #keep(stroke) {
    this.#strokes = [...this.#strokes.filter((one) => one.length > 0), stroke];
    const changed = () => this.#strokes.reduce((sum, one) => sum + one.length, 0);
    while (changed() > MOST_UNDONE) this.#strokes.shift();
  }

  /** Set a pixel as part of the last stroke. */
  #change(at, value) {
    this.#strokes.at(-1)?.push(at);
    this.#mark(at, value);
  }

  /** Set a pixel, also of the overlay, which is not drawn anew for every stroke. */
  #mark(at, value) {
    const { width } = this;
    const context = this.overlay.getContext("2d");
    const pixel = [at % width, Math.floor(at / width), 1, 1];
    this.pixels[at] = value;
    if (value) context.fillRect(...pixel);
    else context.clearRect(...pixel);
  }
}
