// From latents to grey levels, for decoders that are no network.

import { NDArray, divide, map } from "./arrays.js";

const { fround } = Math;

/** Latents `[..., h, w, c]` to grey levels uint8 `[..., H, W, 3]`. */
export function decode(latents, codec) {
  return greyLevels(codec.kind === "identity" ? identity(latents, codec) : patch(latents, codec));
}

/** Pixels in [-1, 1] to the nearest of 0..255, those outside clipped; a half goes to the even one, as in numpy. */
export function greyLevels(pixels) {
  const out = Uint8Array.from(pixels.data, (pixel) => {
    const grey = Math.min(Math.max(fround(fround(pixel * 127.5) + 127.5), 0), 255);
    const below = Math.floor(grey);
    return grey - below === 0.5 ? below + (below % 2) : Math.round(grey);
  });
  return new NDArray(out, pixels.shape);
}

/** Latents are normalised pixels. */
function identity(latents, codec) {
  const [scale, shift] = [fround(codec.scale), fround(codec.shift)];
  return map((x, s) => x + s, divide(latents, scale), shift);
}

/** Latents are the orthonormal DCT-II of p x p patches; channel = (vertical * p + horizontal) * 3 + colour. */
function patch(latents, codec) {
  const p = codec.patch;
  const [h, w] = latents.shape.slice(-3);
  const lead = latents.shape.slice(0, -3);
  const dct = new Float32Array(p * p); // [frequency, position]
  for (let k = 0; k < p; k++) {
    for (let r = 0; r < p; r++) {
      dct[k * p + r] = (Math.sqrt(2 / p) * Math.cos((Math.PI * (r + 0.5) * k) / p)) / (k ? 1 : Math.SQRT2);
    }
  }
  const gain = Float32Array.from({ length: p * p }, (_, k) => codec.scale * codec.frequency_scale[k]);
  const shift = fround(codec.shift);
  const count = latents.data.length / (h * w * p * p * 3);
  const out = new Float32Array(latents.data.length);
  const [coefficients, half] = [new Float32Array(p * p * 3), new Float32Array(p * p * 3)];
  for (let n = 0; n < count * h; n++) {
    for (let column = 0; column < w; column++) {
      const from = (n * w + column) * p * p * 3;
      for (let i = 0; i < coefficients.length; i++)
        coefficients[i] = latents.data[from + i] / gain[Math.floor(i / 3)];
      transform(dct, coefficients, half, p, 1); // vertical: [k, l] -> [r, l]
      transform(dct, half, coefficients, 1, p); // horizontal: [r, l] -> [r, s]
      for (let r = 0; r < p; r++) {
        const to = ((n * p + r) * w + column) * p * 3;
        for (let i = 0; i < p * 3; i++) out[to + i] = coefficients[r * p * 3 + i] + shift;
      }
    }
  }
  return new NDArray(out, [...lead, h * p, w * p, 3]);
}

/** `into[r, other] = sum over k of dct[k, r] from[k, other]`, of each colour; the strides are those of the two axes. */
function transform(dct, from, into, stride, otherStride) {
  const p = Math.max(stride, otherStride);
  for (let r = 0; r < p; r++) {
    for (let i = 0; i < p * 3; i++) {
      const other = Math.floor(i / 3) * otherStride;
      const colour = i % 3;
      let sum = 0;
      for (let k = 0; k < p; k++) sum += dct[k * p + r] * from[(k * stride + other) * 3 + colour];
      into[(r * stride + other) * 3 + colour] = sum;
    }
  }
}
