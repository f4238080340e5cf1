// Fields for what a bundle takes beside a prompt: pictures as files, other arrays as numbers.

import { InputError, NDArray, fromLists, sameShape, shapeOf, sizeOf, zeros } from "./arrays.js";

/** Adds a field for each input to `place`; returns `async read() -> {name: NDArray}`, which throws `InputError`. */
export function addFields(place, specs) {
  const readers = specs.map((spec) => [
    spec.name,
    isPicture(spec) ? pictureField(place, spec) : numberField(place, spec),
  ]);
  return async () => {
    const found = {};
    for (const [name, read] of readers) found[name] = await read();
    return found;
  };
}

function isPicture({ dtype, shape }) {
  return dtype === "uint8" && shape.length === 3 && [1, 3].includes(shape[2]);
}

function field(place, text, control) {
  const label = document.createElement("label");
  label.append(text, control);
  place.append(label);
  return control;
}

/** The middle of a picture file, at the size that the bundle takes. */
function pictureField(place, { name, shape: [height, width, channels] }) {
  const control = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", name });
  field(place, `${name}: a picture, which becomes ${width} × ${height} pixels`, control);
  return async () => {
    const [file] = control.files;
    if (!file) throw new InputError(`choose a picture for "${name}"`);
    const bitmap = await createImageBitmap(file).catch(() => {
      throw new InputError(`${file.name} is no picture that this browser reads`);
    });
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const context = canvas.getContext("2d");
    const scale = Math.max(width / bitmap.width, height / bitmap.height);
    const [w, h] = [bitmap.width * scale, bitmap.height * scale];
    context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
    const { data } = context.getImageData(0, 0, width, height);
    const out = zeros([height, width, channels], "uint8");
    for (let i = 0; i < width * height; i++) {
      for (let c = 0; c < channels; c++) out.data[channels * i + c] = data[4 * i + c];
    }
    return out;
  };
}

function numberField(place, { name, shape, dtype }) {
  const size = sizeOf(shape);
  const control = Object.assign(document.createElement("input"), { type: "text", name, spellcheck: false });
  control.value = JSON.stringify(size > 64 ? 0 : nested(shape));
  const wanted = shape.length ? `numbers [${shape}], or one for all` : "a number";
  field(place, `${name}: ${dtype === "float32" ? "" : "whole "}${wanted}`, control);
  return async () => {
    const refuse = () => {
      throw new InputError(`"${name}" is ${wanted}, such as ${JSON.stringify(size > 8 ? 0 : nested(shape))}`);
    };
    let value = null;
    try {
      value = JSON.parse(control.value);
    } catch {
      refuse();
    }
    const given = shapeOf(value);
    if (given === null || !(given.length === 0 || sameShape(given, shape))) refuse();
    if (dtype !== "float32" && ![value].flat(Infinity).every(Number.isInteger)) refuse();
    if (given.length) return fromLists(value, dtype);
    const out = zeros(shape, dtype);
    out.data.fill(value);
    return new NDArray(out.data, shape);
  };
}

function nested(shape) {
  return shape.length ? Array.from({ length: shape[0] }, () => nested(shape.slice(1))) : 0;
}
