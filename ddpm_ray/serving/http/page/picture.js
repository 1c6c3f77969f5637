// An image that is edited: its pixels at a scale, the mask over them, and margins around them.

import { ApiError } from "./api.js";
import { element } from "./elements.js";
import { Mask } from "./mask.js";

const MOST_MARGIN = 2048; // pixels
const MOST_PIXELS = 2 ** 24; // of an image that is edited as it is
const LARGE = 4; // an image of more times the model's size is scaled down unless asked otherwise

export class Picture {
  canvas = null; // the image at its scale, on white
  mask = null; // the Mask over the canvas
  margins = { left: 0, top: 0, right: 0, bottom: 0 }; // to be painted as well
  scale = "whole"; // or "fit": the shorter side has the model's size
  #isWhole = true; // whether the file can be sent as it is

  constructor(blob, bitmap) {
    Object.assign(this, { blob, bitmap });
  }

  /** The picture of an image file, at the scale that suits a model of this size.
   *  Throws ApiError. */
  static async open(blob, name, modelSize) {
    const how = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    const bitmap = await createImageBitmap(blob, how).catch(() => null);
    if (bitmap === null) throw new ApiError(`${name} is not an image that can be read.`, "image");
    const made = new Picture(blob, bitmap);
    const [width, height] = modelSize;
    const isLarge = bitmap.width > LARGE * width || bitmap.height > LARGE * height;
    made.render(isLarge ? "fit" : "whole", modelSize);
    return made;
  }

  /** A copy, which later changes of this one do not change. */
  copy() {
    const { canvas, scale, mask, margins } = this;
    const made = new Picture(this.blob, this.bitmap);
    Object.assign(made, { canvas, scale, mask: mask.copy(), margins: { ...margins } });
    made.#isWhole = this.#isWhole;
    return made;
  }

  /** Draw the image at a scale; then the mask marks what is transparent in the file. */
  render(scale, modelSize) {
    const { bitmap } = this;
    const [width, height] = scale === "fit" ? this.fitSize(modelSize)
      : [bitmap.width, bitmap.height];
    const canvas = element("canvas", { width, height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    const marked = new Uint8Array(width * height);
    let isOpaque = true;
    for (let at = 0; at < marked.length; at += 1) {
      marked[at] = data[4 * at + 3] === 0 ? 1 : 0;
      isOpaque &&= data[4 * at + 3] === 255;
    }
    context.globalCompositeOperation = "destination-over"; // as the server does: on white
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    Object.assign(this, { canvas, scale, mask: new Mask(width, height, marked) });
    this.#isWhole = scale === "whole" && isOpaque;
  }

  /** Whether the file is small enough to be edited at its own size. */
  get allowsWhole() {
    return this.bitmap.width * this.bitmap.height <= MOST_PIXELS;
  }

  /** Width and height at which the shorter side has the model's. */
  fitSize([width, height]) {
    const { bitmap } = this;
    const scale = Math.max(width / bitmap.width, height / bitmap.height);
    return [Math.round(bitmap.width * scale), Math.round(bitmap.height * scale)];
  }

  /** The size of the image with its margins. */
  size() {
    const { canvas, margins } = this;
    return {
      width: margins.left + canvas.width + margins.right,
      height: margins.top + canvas.height + margins.bottom,
    };
  }

  /** Set the margin of a side, within what is possible. */
  setMargin(side, value) {
    this.margins[side] = Math.min(MOST_MARGIN, Math.max(0, Math.round(value) || 0));
  }

  get hasMargins() {
    return Object.values(this.margins).some((one) => one > 0);
  }

  /** Whether something is to be painted. */
  get isMarked() {
    return this.hasMargins || !this.mask.isEmpty;
  }

  /** The files of an edit: the image, and a mask where one is needed. Throws ApiError. */
  async editFiles() {
    if (this.hasMargins) return { image: await pngOf(this.#composed()) };
    const image = this.#isWhole ? this.blob : await pngOf(this.canvas);
    return this.isMarked ? { image, mask: await pngOf(this.#composed()) } : { image };
  }

  /** The image with its margins, transparent wherever it is to be painted. */
  #composed() {
    const { left, top } = this.margins;
    const made = element("canvas", this.size());
    const context = made.getContext("2d");
    context.drawImage(this.canvas, left, top);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.mask.stencil("#000"), left, top);
    return made;
  }

  /** The file of a variation: the middle of the image at the model's size. Throws ApiError. */
  async variationFile([width, height]) {
    const { blob, bitmap } = this;
    if (this.#isWhole && bitmap.width === width && bitmap.height === height) return blob;
    const made = element("canvas", { width, height });
    const context = made.getContext("2d");
    const [wide, high] = this.fitSize([width, height]);
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, (width - wide) / 2, (height - high) / 2, wide, high);
    return pngOf(made);
  }
}

/** A canvas as a PNG file. Throws ApiError. */
const pngOf = (canvas) => new Promise((resolve, reject) => {
  const failed = () => reject(new ApiError("The image is too large for this browser.", "image"));
  canvas.toBlob((blob) => (blob === null ? failed() : resolve(blob)), "image/png");
});
