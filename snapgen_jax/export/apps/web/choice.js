// Where each unit runs and in which precision: what is tried, in which order, and how much memory it takes.

import { HEAP } from "./litert.js";

// A GPU computes in floats and reads float16 weights as they are. WebAssembly is fastest with int8, and slow with
// float16, which it turns into float32 at every call.
const ORDER = { webgpu: ["f16", "f32", "int8", "mixed"], wasm: ["int8", "mixed", "f32", "f16"] };
// Bytes of the heap for each byte of a file: the file itself, and the weights as the kernels want them (measured).
const GROWTH = { f32: 2.1, f16: 3.1, int8: 2.3, mixed: 3.5 };

/**
 * The ways to run a unit, best first: [{accelerator, precision, arithmetic, file, bytes, heap}].
 *
 * `unit`: its entry of the manifest. `sizes`: {file: {bytes}}. `wanted`: {accelerator, precision}, either "auto".
 * `adapter`: what `adapterOf` found.
 */
export function waysOf(unit, sizes, { accelerator = "auto", precision = "auto" }, adapter) {
  const ways = [];
  for (const place of placesFor(accelerator, adapter)) {
    const known = [...ORDER[place], ...Object.keys(unit.files)]; // last, what this page does not know
    const present = [...new Set(known)].filter((name) => name in unit.files);
    for (const name of precision in unit.files ? [precision] : present) {
      if (place === "webgpu" && !isForGPU(unit, name)) continue;
      const file = unit.files[name];
      const { bytes } = sizes[file];
      const way = { accelerator: place, precision: name, file, bytes, heap: bytes * (GROWTH[name] ?? 3.5) };
      // Half precision first: a phone's GPU is twice as fast in it. The self-test says whether it is good enough.
      const kinds = place === "wasm" ? [null] : adapter.half ? ["fp16", "fp32"] : ["fp32"];
      for (const arithmetic of kinds) ways.push({ ...way, arithmetic });
    }
  }
  return ways;
}

function placesFor(accelerator, adapter) {
  if (accelerator === "wasm" || !adapter) return ["wasm"];
  if (accelerator === "webgpu") return ["webgpu", "wasm"];
  return adapter.software ? ["wasm"] : ["webgpu", "wasm"]; // a GPU in software is slower than none
}

/** Whether nobody has seen it fail on a GPU where the bundle was made. */
function isForGPU(unit, precision) {
  const { gpu, accelerators_verified: verified } = unit;
  if (gpu?.checked && gpu.fully_accelerated?.[precision] === false) return false;
  return !gpu?.checked || !verified || verified.gpu.includes(precision);
}

/** Of the ways of all units, which fit: {ways, residency: "together" | "in turn", heap, warning}, or {error}. */
export function fit(waysOfUnits) {
  const fitting = {};
  for (const [name, ways] of Object.entries(waysOfUnits)) {
    fitting[name] = ways.filter((way) => way.heap < HEAP);
    if (!fitting[name].length) {
      const least = Math.min(...ways.map((way) => way.heap));
      return {
        error:
          `${name} takes about ${gigabytes(least)} of memory in a browser, which ends at ${gigabytes(HEAP)}; ` +
          "export a smaller precision (--precisions=int8), or run it as an app",
      };
    }
  }
  const each = [...new Map(Object.values(fitting).map(([best]) => [best.file, best.heap])).values()];
  const sum = each.reduce((total, heap) => total + heap, 0);
  const residency = sum < 0.75 * HEAP ? "together" : "in turn";
  const heap = residency === "together" ? sum : Math.max(...each);
  return { ways: fitting, residency, heap, warning: heapWarning(heap) };
}

/** What to say of a heap that is near its end; "" where it is not. */
export function heapWarning(heap) {
  if (heap < 0.75 * HEAP) return "";
  return `This bundle takes about ${gigabytes(heap)} of the ${gigabytes(HEAP)} that a browser gives it; it may fail.`;
}

/** For people: "1.2 GiB", "34 MB". */
export function gigabytes(bytes) {
  return bytes < 2 ** 29 ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`;
}
