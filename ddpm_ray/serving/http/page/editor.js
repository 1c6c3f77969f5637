// The editor: shows the picture that is edited or varied, with its mask, margins and sizes.

import { ApiError } from "./api.js";
import { element, find } from "./elements.js";
import { clearErrors, field, showError } from "./form.js";
import { editedSize, kind } from "./models.js";
import { Picture } from "./picture.js";

const HIGHEST = 420; // CSS pixels of the shown canvas
const HANDLES = 48; // CSS pixels of the handles at both sides of it
const BRUSH_COLOURS = { brush: "rgb(235 0 110 / 0.35)", eraser: "rgb(255 255 255 / 0.6)" };

const tool = () => find("input[name=tool]:checked").value;
const brushSize = () => Number(find("#brush-size").value);
const times = (width, height) => `${width} \u00d7 ${height}`;

export const editor = {
  picture: null, // the Picture, if there is one
  cursor: null, // {x, y} of the brush, in pixels of the image
  isPainting: false,

  /** Open an image file; an error is shown at the field. */
  async open(blob, name) {
    clearErrors();
    try {
      this.take(await Picture.open(blob, name, editedSize()));
    } catch (error) {
      showError(error);
    }
  },

  /** Take another picture. */
  take(picture) {
    this.picture = picture;
    this.begin();
  },

  /** Draw the picture at a scale, "whole" or "fit"; its mask is lost. */
  rescale(scale) {
    this.picture.render(scale, editedSize());
    this.begin();
  },

  /** Draw a picture that is scaled to the model anew where the chosen model has another size. */
  suitModel() {
    const { scale, canvas } = this.picture ?? {};
    const isOther = scale === "fit"
      && String(this.picture.fitSize(editedSize())) !== String([canvas.width, canvas.height]);
    if (isOther) this.rescale("fit");
    else this.show();
  },

  /** Begin to edit a picture of a new size: the brush suits it. */
  begin() {
    const { width, height } = this.picture.canvas;
    const side = Math.min(width, height);
    const brush = find("#brush-size");
    brush.max = Math.max(2, Math.round(side / 2));
    brush.value = Math.max(1, Math.round(side / 8));
    this.cursor = null;
    this.showBrush();
    this.show();
  },

  /** Whether the picture can be painted on. */
  get isEditing() {
    return kind() === "edit" && this.picture !== null;
  },

  /** The files of a request. Throws ApiError. */
  async files() {
    if (this.picture === null) throw new ApiError("Choose an image first.", "image");
    if (kind() === "variation") return { image: await this.picture.variationFile(editedSize()) };
    if (this.lacks().some(Boolean)) {
      throw new ApiError("The image is too small: extend it.", "image");
    }
    return this.picture.editFiles();
  },

  /** The pixels in width and height that an edit needs more. */
  lacks() {
    const { width, height } = this.picture.size();
    const [wide, high] = editedSize();
    return [Math.max(0, wide - width), Math.max(0, high - height)];
  },

  /** Show what belongs to the task and the picture, after any change of them. */
  show() {
    const isEdit = kind() === "edit";
    const has = this.picture !== null;
    document.body.dataset.kind = kind(); // the layout follows it
    find("#editor").hidden = kind() === "generation";
    field("strength").hidden = !this.isEditing || this.picture.isMarked;
    find("#editor-title").textContent = isEdit ? "Image to edit" : "Image to vary";
    find("#tools").hidden = !has;
    find("#editor").classList.toggle("has-picture", has);
    find("#image").labels[0].textContent = has ? "Choose another image" : "Choose an image";
    if (!has || kind() === "generation") return;
    for (const id of ["#mask-tools", "#margins", "#canvas-help"]) find(id).hidden = !isEdit;
    find("#undo").setAttribute("aria-disabled", !this.picture.mask.canUndo);
    find("#frame").classList.toggle("fixed", !isEdit);
    find("#canvas").tabIndex = isEdit ? 0 : -1;
    for (const input of document.querySelectorAll("#margins input")) {
      const value = this.picture.margins[input.dataset.side];
      if (Number(input.value) !== value) input.value = value; // leaves what is being typed
    }
    if (isEdit) this.showEditedSize();
    else this.showVariedSize();
    this.showScales(isEdit);
    this.draw();
  },

  /** Show the size of an edit, and what it lacks. */
  showEditedSize() {
    const { width, height } = this.picture.size();
    const [wider, higher] = this.lacks();
    const isSmall = wider > 0 || higher > 0;
    find("#canvas-size").textContent = `${times(width, height)} pixels`;
    find("#too-small").hidden = !isSmall;
    find("#too-small").textContent = !isSmall ? ""
      : `This model edits images of at least ${times(...editedSize())} pixels. `
      + `Extend this one by ${wider} in width and ${higher} in height.`;
  },

  /** Show which part of an image is varied. */
  showVariedSize() {
    const [wide, high] = editedSize();
    const { bitmap } = this.picture;
    find("#canvas-size").textContent = bitmap.width !== wide || bitmap.height !== high
      ? `Its middle is used, scaled to ${times(wide, high)} pixels`
      : `${times(wide, high)} pixels`;
    find("#too-small").hidden = true;
  },

  /** Offer the scales of an image that is larger than the model's. */
  showScales(isEdit) {
    const { bitmap, scale, allowsWhole } = this.picture;
    const [wide, high] = editedSize();
    find("#scaling").hidden = !(isEdit && bitmap.width > wide && bitmap.height > high);
    const option = (value, size, note) => element(
      "option", { value, selected: value === scale }, `${times(...size)} (${note})`,
    );
    const whole = option("whole", [bitmap.width, bitmap.height], "as it is");
    const fit = option("fit", this.picture.fitSize(editedSize()), "scaled to the model");
    find("#scale").replaceChildren(...(allowsWhole ? [whole, fit] : [fit]));
  },

  /** Show the size of the brush. */
  showBrush() {
    find("#brush-size + output").value = find("#brush-size").value;
  },

  /** Show the image, its mask, its margins and the brush. */
  draw() {
    const shown = find("#canvas");
    const { picture } = this;
    const { width, height } = picture.size();
    Object.assign(shown, { width, height }); // which empties it
    const scale = Math.min((find("#stage").clientWidth - HANDLES) / width, HIGHEST / height);
    shown.style.width = `${width * scale}px`;
    shown.style.height = `${height * scale}px`;
    shown.classList.toggle("pixels", scale > 1);
    const context = shown.getContext("2d");
    context.translate(picture.margins.left, picture.margins.top);
    context.drawImage(picture.canvas, 0, 0);
    if (kind() !== "edit") return;
    context.drawImage(picture.mask.overlay, 0, 0);
    if (this.cursor === null) return;
    context.fillStyle = BRUSH_COLOURS[tool()];
    const across = picture.canvas.width;
    for (const at of picture.mask.covered(this.cursor, brushSize())) {
      context.fillRect(at % across, Math.floor(at / across), 1, 1);
    }
  },

  /** Move the brush to a point; while it paints, it changes the mask on the way. */
  moveBrush(to) {
    const from = this.cursor ?? to;
    this.cursor = to;
    if (!this.isPainting) return;
    this.picture.mask.paint(from, to, brushSize(), tool() === "brush" ? 1 : 0);
  },

  /** CSS pixels for a pixel of the picture. */
  get zoom() {
    return find("#canvas").getBoundingClientRect().width / this.picture.size().width;
  },

  /** The point of the image under a pointer. */
  point(event) {
    const box = find("#canvas").getBoundingClientRect();
    const { margins } = this.picture;
    return {
      x: (event.clientX - box.left) / this.zoom - margins.left,
      y: (event.clientY - box.top) / this.zoom - margins.top,
    };
  },
};
