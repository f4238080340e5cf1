// Noise from a seed: the numbers that JAX and numpy make of it. noise.py in a bundle says how; this is a port of it.

import { InputError, NDArray, sizeOf } from "./arrays.js";

const PLACE = 0x6e6f6973; // "nois"
const PARITY = 0x1bd11bda;
const ROTATIONS = [
  [13, 15, 26, 6],
  [17, 29, 16, 24],
];
// sqrt(2) times erfinv(u) / u, highest power first: in w - 2.5 where w = -log((1 - u) (1 + u)) is below 5, else in
// sqrt(w) - 3.
const scaled = (coefficients) => Float32Array.from(coefficients, (c) => Math.SQRT2 * c);
const CENTRE = scaled([
  2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 0.00021858087, -0.00125372503, -0.00417768164,
  0.246640727, 1.50140941,
]);
const TAIL = scaled([
  -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
  1.00167406, 2.83297682,
]);
const { fround } = Math;

/** The first of the two words that a key makes of a counter in 20 rounds; all are uint32. */
export function threefry(key0, key1, counter0, counter1) {
  const keys = [key0, key1, key0 ^ key1 ^ PARITY];
  let x = (counter0 + keys[0]) | 0;
  let y = (counter1 + keys[1]) | 0;
  for (let four = 0; four < 5; four++) {
    for (const rotation of ROTATIONS[four % 2]) {
      x = (x + y) | 0;
      y = x ^ ((y << rotation) | (y >>> (32 - rotation)));
    }
    x = (x + keys[(four + 1) % 3]) | 0;
    y = (y + keys[(four + 2) % 3] + four + 1) | 0;
  }
  return x >>> 0;
}

/** A standard normal number of 32 random bits, each operation in float32. */
export function normal(bits) {
  const u = (2 * (bits >>> 8) + 1 - 2 ** 24) * 2 ** -24;
  const w = fround(-Math.log(fround(fround(1 - u) * fround(1 + u))));
  const [coefficients, variable] = w < 5 ? [CENTRE, fround(w - 2.5)] : [TAIL, fround(fround(Math.sqrt(w)) - 3)];
  let value = coefficients[0];
  for (let i = 1; i < coefficients.length; i++) {
    value = fround(fround(value * variable) + coefficients[i]);
  }
  return fround(u * value);
}

/** Noise float32 `shape` of the example (seed, index). */
export function drawNoise(seed, index, shape) {
  const [first, second] = [word("seed", seed), word("index", index)];
  const out = new Float32Array(sizeOf(shape));
  for (let i = 0; i < out.length; i++) out[i] = normal(threefry(first, second, PLACE, i));
  return new NDArray(out, shape);
}

/** A seed or an index. Throws `InputError` unless it is a whole number of 32 bits. */
export function word(name, value) {
  if (Number.isInteger(value) && value >= 0 && value < 2 ** 32) return value;
  throw new InputError(`the ${name} is ${value}; it must be a whole number from 0 to ${2 ** 32 - 1}`);
}
