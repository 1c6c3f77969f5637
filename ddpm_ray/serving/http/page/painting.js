// Painting the mask: by mouse, pen or finger on the canvas, or by its keys.

import { editor } from "./editor.js";
import { find } from "./elements.js";

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Listen to pointers and keys on the canvas, and to the tools of the mask. */
export function listenToPainting() {
  const canvas = find("#canvas");
  listenToPointers(canvas);
  canvas.addEventListener("keydown", (event) => {
    if (editor.isEditing && (isUndo(event) ? undo() : useKey(event))) event.preventDefault();
  });
  canvas.addEventListener("keyup", (event) => {
    if (event.key === " ") editor.isPainting = false;
  });
  canvas.addEventListener("blur", () => {
    Object.assign(editor, { isPainting: false, cursor: null });
    if (editor.isEditing) editor.draw();
  });
  find("#brush-size").addEventListener("input", () => editor.showBrush());
  find("#undo").addEventListener("click", undo);
  find("#clear-mask").addEventListener("click", () => {
    editor.picture.mask.clear();
    editor.show();
  });
}

/** Whether a key is that of undoing. */
const isUndo = ({ key, ctrlKey, metaKey, shiftKey }) =>
  (ctrlKey || metaKey) && !shiftKey && key.toLowerCase() === "z";

/** Take the last stroke back; return true. */
function undo() {
  if (editor.isPainting) return true; // the stroke has not ended
  editor.picture.mask.undo();
  editor.show();
  return true;
}

/** Paint where a pointer is pressed and moved. */
function listenToPointers(canvas) {
  canvas.addEventListener("pointerdown", (event) => {
    if (!editor.isEditing || event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    Object.assign(editor, { isPainting: true, cursor: null });
    editor.picture.mask.begin();
    editor.moveBrush(editor.point(event));
    editor.show();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!editor.isEditing) return;
    editor.moveBrush(editor.point(event));
    editor.draw();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      editor.isPainting = false;
      if (!editor.isEditing) return;
      if (event.pointerType !== "mouse") editor.cursor = null; // a finger has left
      editor.show();
    });
  }
  canvas.addEventListener("pointerleave", () => {
    if (editor.isPainting || !editor.isEditing) return;
    editor.cursor = null;
    editor.draw();
  });
}

/** Move or use the brush by a key; return whether the key does so. */
function useKey({ key, repeat }) {
  if (key !== " " && !(key in MOVES)) return false;
  const { width, height } = editor.picture.canvas;
  const from = editor.cursor ?? { x: width / 2, y: height / 2 };
  const [right, down] = MOVES[key] ?? [0, 0];
  const inside = (at, side) => Math.min(side - 0.5, Math.max(0.5, Math.floor(at) + 0.5));
  if (key === " " && !repeat) {
    editor.isPainting = true;
    editor.picture.mask.begin();
  }
  editor.cursor = null; // each key paints where the brush arrives
  editor.moveBrush({ x: inside(from.x + right, width), y: inside(from.y + down, height) });
  editor.show();
  return true;
}
