// Arrays of one dtype in C order, as numpy has them: a typed array and a shape. Every float32 result is rounded once an
// operation, by storing it in a Float32Array, so that a port of a numpy formula gives numpy's numbers.

/** The folder is not a bundle that this client can run. */
export class BundleError extends Error {}
/** What the caller gave does not fit the bundle. */
export class InputError extends Error {}

const TYPES = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

export const sizeOf = (shape) => shape.reduce((product, size) => product * size, 1);
export const sameShape = (a, b) => a.length === b.length && a.every((size, i) => size === b[i]);

export class NDArray {
  /** `data`: a typed array of as many elements as `shape` says. */
  constructor(data, shape) {
    if (data.length !== sizeOf(shape)) throw new Error(`${data.length} numbers do not fill [${shape}]`);
    this.data = data;
    this.shape = [...shape];
  }

  get dtype() {
    return Object.keys(TYPES).find((name) => this.data instanceof TYPES[name]);
  }

  reshape(shape) {
    return new NDArray(this.data, shape);
  }

  /** Row i of the first axis; shares the data. */
  at(i) {
    const shape = this.shape.slice(1);
    const size = sizeOf(shape);
    return new NDArray(this.data.subarray(i * size, (i + 1) * size), shape);
  }

  /** Rows from `begin` to `end` of the first axis; shares the data. */
  rows(begin, end) {
    const size = sizeOf(this.shape.slice(1));
    return new NDArray(this.data.subarray(begin * size, end * size), [end - begin, ...this.shape.slice(1)]);
  }
}

export function zeros(shape, dtype = "float32") {
  return new NDArray(new TYPES[dtype](sizeOf(shape)), shape);
}

/** The shape of nested lists of numbers; null where they are ragged or hold something else. */
export function shapeOf(value) {
  if (typeof value === "number" || typeof value === "boolean") return [];
  if (!Array.isArray(value)) return null;
  const inner = value.map(shapeOf);
  if (inner.some((shape) => shape === null || !sameShape(shape, inner[0]))) return null;
  return [value.length, ...(inner[0] ?? [])];
}

/** Nested lists of numbers as an array; null where `shapeOf` is. */
export function fromLists(value, dtype = "float32") {
  const shape = shapeOf(value);
  return shape && new NDArray(TYPES[dtype].from([value].flat(Infinity)), shape);
}

export function canBroadcast(from, to) {
  const added = to.length - from.length;
  return added >= 0 && from.every((size, i) => size === 1 || size === to[i + added]);
}

/** The array repeated to a shape that it broadcasts to, by numpy's rule. */
export function broadcastTo(array, shape) {
  if (sameShape(array.shape, shape)) return array;
  const out = zeros(shape, array.dtype);
  const own = [...shape.slice(0, shape.length - array.shape.length).fill(1), ...array.shape];
  for (let i = 0; i < out.data.length; i++) {
    let [left, place, stride] = [i, 0, 1];
    for (let axis = shape.length - 1; axis >= 0; axis--) {
      const index = left % shape[axis];
      left = (left - index) / shape[axis];
      if (own[axis] !== 1) place += index * stride;
      stride *= own[axis];
    }
    out.data[i] = array.data[place];
  }
  return out;
}

/** Elementwise `f(a, b, c)` in float32. The last two may be left out, be numbers, or broadcast to the first's shape. */
export function map(f, first, second = 0, third = 0) {
  const [p, q] = [second, third].map((one) => {
    if (typeof one === "number") return one;
    return one.data.length === 1 ? one.data[0] : broadcastTo(one, first.shape).data;
  });
  const out = new Float32Array(first.data.length);
  for (let i = 0; i < out.length; i++) {
    out[i] = f(first.data[i], typeof p === "number" ? p : p[i], typeof q === "number" ? q : q[i]);
  }
  return new NDArray(out, first.shape);
}

export const add = (a, b) => map((x, y) => x + y, a, b);
export const subtract = (a, b) => map((x, y) => x - y, a, b);
export const multiply = (a, b) => map((x, y) => x * y, a, b);
export const divide = (a, b) => map((x, y) => x / y, a, b);

/** Arrays joined along the first axis. */
export function concatenate(arrays) {
  const length = arrays.reduce((sum, array) => sum + array.shape[0], 0);
  const out = zeros([length, ...arrays[0].shape.slice(1)], arrays[0].dtype);
  let place = 0;
  for (const { data } of arrays) {
    out.data.set(data, place);
    place += data.length;
  }
  return out;
}

/** ||value - reference|| / ||reference||; infinite where either holds NaN or infinity, or only the reference is 0. */
export function relativeL2(value, reference) {
  if (value.data.length !== reference.data.length) return Infinity;
  let [difference, norm] = [0, 0];
  for (let i = 0; i < value.data.length; i++) {
    difference += (value.data[i] - reference.data[i]) ** 2;
    norm += reference.data[i] ** 2;
  }
  if (!Number.isFinite(difference) || !Number.isFinite(norm)) return Infinity;
  return norm ? Math.sqrt(difference / norm) : difference ? Infinity : 0;
}
