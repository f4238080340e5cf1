// Outputs of a bundle on a canvas and as files.

import { NDArray } from "./arrays.js";
import { writeNpy } from "./npy.js";

const SMALL = 256; // pixels: below, a picture is enlarged without blur
const FRAME_MS = 125;

/** [frames, height, width, channels] of an array that can be seen; null where it cannot. */
export function pictureShape({ shape, dtype }) {
  if (dtype !== "uint8") return null;
  if (shape.length === 2) return [1, ...shape, 1];
  if (![1, 3].includes(shape.at(-1))) return null;
  return shape.length === 3 ? [1, ...shape] : shape.length === 4 ? shape : null;
}

/** Draws one frame of grey levels; the canvas takes the size of the picture. */
export function paint(canvas, array, frameIndex = 0) {
  const [, height, width, channels] = pictureShape(array);
  const pixels = new Uint8ClampedArray(width * height * 4);
  const offset = frameIndex * height * width * channels;
  for (let i = 0; i < width * height; i++) {
    for (let colour = 0; colour < 3; colour++) {
      pixels[4 * i + colour] = array.data[offset + channels * i + (channels === 3 ? colour : 0)];
    }
    pixels[4 * i + 3] = 255;
  }
  Object.assign(canvas, { width, height });
  canvas.classList.toggle("small", Math.max(width, height) < SMALL);
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

/** Shows a picture, or a clip again and again; returns a function that stops it. */
export function play(canvas, array) {
  const [frames] = pictureShape(array);
  paint(canvas, array);
  if (frames === 1) return () => {};
  let index = 0;
  const timer = setInterval(() => paint(canvas, array, (index = (index + 1) % frames)), FRAME_MS);
  return () => clearInterval(timer);
}

/** Saves an output: a picture as PNG, a clip as a PNG of its frames side by side, other arrays as .npy. */
export async function save(array, name) {
  const shape = pictureShape(array);
  if (!shape) {
    offer(new Blob([writeNpy(array)], { type: "application/octet-stream" }), `${name}.npy`);
    return;
  }
  const [frames, height, width] = shape;
  const sheet = Object.assign(document.createElement("canvas"), { width: frames * width, height });
  const one = document.createElement("canvas");
  for (let i = 0; i < frames; i++) {
    paint(one, array, i);
    sheet.getContext("2d").drawImage(one, i * width, 0);
  }
  offer(await new Promise((resolve) => sheet.toBlob(resolve, "image/png")), `${name}.png`);
}

function offer(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = Object.assign(document.createElement("a"), { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** An array that came from the worker. */
export const received = ({ data, shape }) => new NDArray(data, shape);
