// numpy's .npy files, without pickles: float32, int32 and uint8 in C order.

import { BundleError, NDArray, sizeOf } from "./arrays.js";

const TYPES = { "<f4": Float32Array, "<i4": Int32Array, "|u1": Uint8Array };
const MAGIC = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // \x93NUMPY

/** The array of a file's bytes (Uint8Array). Throws `BundleError` that names the file. */
export function readNpy(bytes, name = "array.npy") {
  const refuse = (why) => {
    throw new BundleError(`${name} is no array that this page reads: ${why}`);
  };
  if (bytes.length < 12 || MAGIC.some((byte, i) => bytes[i] !== byte)) refuse("it does not begin as .npy files do");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [start, length] = bytes[6] === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)];
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const descr = /'descr':\s*'([^']*)'/.exec(header)?.[1];
  const shape = /'shape':\s*\(([\d,\s]*)\)/
    .exec(header)?.[1]
    .split(",")
    .filter((part) => part.trim())
    .map(Number);
  if (!(descr in TYPES)) refuse(`its dtype is ${descr}; ${Object.keys(TYPES).join(", ")} are read`);
  if (!shape || !/'fortran_order':\s*False/.test(header)) refuse("it is not in C order");
  const Type = TYPES[descr];
  const data = bytes.slice(start + length); // aligned anew
  if (data.length !== sizeOf(shape) * Type.BYTES_PER_ELEMENT) refuse(`${data.length} bytes do not fill [${shape}]`);
  return new NDArray(new Type(data.buffer), shape);
}

/** The bytes of an array's file. */
export function writeNpy(array) {
  const descr = Object.keys(TYPES).find((name) => array.data instanceof TYPES[name]);
  const shape = array.shape.map((size) => `${size},`).join(" ");
  const header = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${shape}), }`;
  const length = Math.ceil((10 + header.length + 1) / 64) * 64 - 10;
  const text = new TextEncoder().encode(`${header.padEnd(length - 1)}\n`);
  const { buffer, byteOffset, byteLength } = array.data;
  const out = new Uint8Array(10 + length + byteLength);
  out.set([...MAGIC, 1, 0, length & 255, length >> 8]);
  out.set(text, 10);
  out.set(new Uint8Array(buffer, byteOffset, byteLength), 10 + length);
  return out;
}
