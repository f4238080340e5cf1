// What conformance.json does not hold: `node units.mjs APP BUNDLE`. Prints "ok".

import assert from "node:assert/strict";
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [app, bundle] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(path.join(app, name)).href);
const { BundleError, InputError, NDArray, broadcastTo, fromLists, relativeL2, shapeOf } = await load("arrays.js");
const { fit, heapWarning, waysOf } = await load("choice.js");
const { drawNoise } = await load("noise.js");
const { readNpy, writeNpy } = await load("npy.js");
const { parse } = await load("program.js");
const { Sampler, withOptions } = await load("sampler.js");
const { Tokenizer } = await load("tokenizer.js");

const bytes = (name) => new Uint8Array(fs.readFileSync(path.join(bundle, name)));
const read = (name) => JSON.parse(fs.readFileSync(path.join(bundle, name), "utf8"));
const refuses = (run, kind, text) =>
  assert.throws(run, (error) => error instanceof kind && error.message.includes(text), `${text} is not refused`);

// Arrays.
const column = fromLists([[1], [2]]);
assert.deepEqual([...broadcastTo(column, [3, 2, 2]).data], [1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2]);
assert.deepEqual([shapeOf([[1, 2], [3]]), shapeOf("x"), shapeOf([[1, 2]]), shapeOf(3)], [null, null, [1, 2], []]);
assert.equal(relativeL2(fromLists([1, NaN]), fromLists([1, 2])), Infinity);
assert.equal(relativeL2(fromLists([1, 2, 3]), fromLists([1, 2])), Infinity);

// .npy there and back, and what is none.
for (const name of ["golden/noise.npy", "golden/inputs/tokens.npy", "golden/outputs/image.npy"]) {
  const array = readNpy(bytes(name), name);
  assert.deepEqual(readNpy(writeNpy(array)), array);
  assert.equal(writeNpy(array).length % 64, bytes(name).length % 64);
}
refuses(() => readNpy(bytes("manifest.json"), "x.npy"), BundleError, "x.npy is no array");
refuses(() => readNpy(bytes("golden/noise.npy").subarray(0, 900), "x.npy"), BundleError, "bytes do not fill");

// Noise: what golden/noise.npy holds, and what is no seed.
const noise = readNpy(bytes("golden/noise.npy"), "noise");
const { seed } = read("golden/golden.json");
for (let i = 0; i < noise.shape[0]; i++) {
  const made = drawNoise(seed, i, noise.shape.slice(1));
  made.data.forEach((value, k) => assert.ok(Math.abs(value - noise.at(i).data[k]) <= 1e-6));
}
for (const bad of [-1, 2 ** 32, 0.5, NaN]) refuses(() => drawNoise(bad, 0, [2]), InputError, "whole number");

// Programs that are none, and options that this one does not have.
const program = read("program.json");
parse(program);
refuses(() => parse({ ...program, schema: 4 }), BundleError, "schema is 4");
refuses(() => parse({ ...program, hue: 1 }), BundleError, "has hue");
refuses(() => parse({ ...program, step: { ...program.step, rule: "leap" } }), BundleError, "euler, heun, renoise");
refuses(() => parse({ ...program, step: { ...program.step, context: "x" } }), BundleError, 'the context "x"');
refuses(() => parse({ ...program, times: [1] }), BundleError, "two entries");
const { guidance, ...without } = program.step;
refuses(() => parse({ ...program, step: without }), BundleError, "lacks guidance");
refuses(
  () => parse({ ...program, step: { ...program.step, guidance: [[1], 2] } }),
  BundleError,
  "numbers were expected",
);
const flow = parse(program);
refuses(() => withOptions(flow, { steps: 0 }), InputError, "at least one step");
refuses(() => withOptions(flow, { guidance: [1, 2] }), InputError, "guidance of this bundle");
refuses(() => withOptions(flow, { hue: 1 }), InputError, "no option hue");
refuses(() => withOptions(parse({ ...program, shift: undefined }), { steps: 3 }), InputError, "no other number");
const sampler = new Sampler(flow, null, {});
refuses(() => sampler.given({}), InputError, "got none");
refuses(
  () => sampler.given({ tokens: fromLists([1]), mask: fromLists([1]) }),
  InputError,
  'the input "tokens" is int32',
);

// Tokenizers of other kinds.
const tokenizer = read("tokenizer.json");
refuses(() => new Tokenizer({ ...tokenizer, model: { type: "Unigram" } }), BundleError, "a Unigram model");
refuses(
  () => new Tokenizer({ ...tokenizer, model: { ...tokenizer.model, byte_fallback: true } }),
  BundleError,
  "a BPE model",
);
refuses(() => new Tokenizer({ ...tokenizer, pre_tokenizer: { type: "Metaspace" } }), BundleError, "Metaspace");
refuses(() => new Tokenizer({ ...tokenizer, normalizer: { type: "Nmt" } }), BundleError, "Nmt");
refuses(() => new Tokenizer(tokenizer).encode("half \ud83d"), InputError, "half of a character");

// Where a unit runs: int8 for WebAssembly, float16 for WebGPU, else what there is.
const unit = { files: { f32: "a", f16: "b", int8: "c" }, gpu: { checked: false } };
const sizes = { a: { bytes: 400e6 }, b: { bytes: 200e6 }, c: { bytes: 100e6 } };
const gpu = { name: "a phone's", software: false, half: true };
const chosen = (wanted, adapter, of = unit) =>
  waysOf(of, sizes, wanted, adapter).map((way) =>
    [way.accelerator, way.precision, way.arithmetic].filter(Boolean).join(" "),
  );
assert.deepEqual(chosen({}, null), ["wasm int8", "wasm f32", "wasm f16"]);
assert.deepEqual(chosen({ accelerator: "webgpu" }, null), ["wasm int8", "wasm f32", "wasm f16"]);
assert.deepEqual(chosen({}, { ...gpu, software: true })[0], "wasm int8");
assert.deepEqual(chosen({}, gpu).slice(0, 3), ["webgpu f16 fp16", "webgpu f16 fp32", "webgpu f32 fp16"]);
assert.equal(chosen({}, gpu).at(-3), "wasm int8");
assert.deepEqual(chosen({ precision: "f32" }, { ...gpu, half: false }), ["webgpu f32 fp32", "wasm f32"]);
const left = {
  ...unit,
  gpu: { checked: true, fully_accelerated: { f32: true, f16: false } },
  accelerators_verified: { gpu: ["f32"] },
};
assert.deepEqual(chosen({}, gpu, left).slice(0, 3), ["webgpu f32 fp16", "webgpu f32 fp32", "wasm int8"]);
assert.deepEqual(chosen({}, null, { ...unit, files: { f16: "b" } }), ["wasm f16"]);

// What fits into 2 GiB: together, in turn, with a warning, or not at all.
Object.assign(sizes, { a2: sizes.a, c2: sizes.c });
const another = (files) => Object.fromEntries(Object.entries(files).map(([name, file]) => [name, `${file}2`]));
const of = (files, others = another(files)) => ({
  unet: waysOf({ ...unit, files }, sizes, {}, null),
  decoder: waysOf({ ...unit, files: others }, sizes, {}, null),
});
assert.equal(fit(of({ int8: "c" })).residency, "together");
assert.equal(fit(of({ f32: "a" })).residency, "in turn");
assert.equal(fit(of({ f32: "a" }, { f32: "a" })).residency, "together"); // signatures of one file, which is there once
sizes.a.bytes = 850e6;
assert.match(fit(of({ f32: "a" })).warning, /of the 2\.0 GiB/);
sizes.a.bytes = 1.5e9;
assert.match(fit(of({ f32: "a" })).error, /unet takes about 2\.9 GiB/);
assert.equal(fit(of({ f32: "a", int8: "c" })).ways.unet[0].precision, "int8");
assert.equal(
  fit({ unet: waysOf({ ...unit, files: { f32: "a", f16: "b" } }, sizes, {}, null) }).ways.unet[0].precision,
  "f16",
);
assert.deepEqual([heapWarning(1e9), heapWarning(2e9) !== ""], ["", true]);

console.log("ok");
