// Units on LiteRT.js. It is loaded into a classic worker: its loader needs `importScripts`.

import { NDArray } from "./arrays.js";

/** What the heap of LiteRT's WebAssembly can hold, in bytes. */
export const HEAP = 2 ** 31;

/** LiteRT.js, started. `folder`: URL of its files, with "/" at its end. */
export async function startLiteRT(folder, { threads = false } = {}) {
  const library = await import(`${folder}index.js`);
  const start = (withThreads) => {
    self.Module = {
      locateFile: (name) => folder + name,
      mainScriptUrlOrBlob: `${folder}litert_wasm_threaded_internal.js`, // what its own workers run
    };
    return library.loadLiteRt(folder, { threads: withThreads });
  };
  let litert = null;
  let note = "";
  try {
    litert = await start(threads);
  } catch (error) {
    if (!threads) throw error;
    note = `no threads: ${error.message}`;
    litert = await start(false);
  }
  return new LiteRT(library, litert, threads && !note, note, await adapterOf());
}

/** What the browser says of its GPU: {name, software, half: it computes in float16}; null where there is none. */
async function adapterOf() {
  const adapter = await globalThis.navigator?.gpu?.requestAdapter().catch(() => null);
  if (!adapter) return null;
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info ?? {};
  const name = description || [vendor, architecture].filter(Boolean).join(" ") || "GPU";
  const software = isFallbackAdapter ?? adapter.isFallbackAdapter ?? false;
  return {
    name,
    software: software || /swiftshader|llvmpipe/i.test(name),
    half: adapter.features.has("shader-f16"),
  };
}

class LiteRT {
  constructor(runtime, litert, threads, note, adapter) {
    Object.assign(this, { runtime, litert, threads, note });
    this.adapter = runtime.getWebGpuDevice() ? adapter : null;
  }

  /** The bytes that the heap has grown to. */
  get heap() {
    return this.litert.liteRtWasm.HEAPU8.byteLength;
  }

  /** A compiled unit. `way`: {accelerator: "wasm" | "webgpu", arithmetic: undefined | "fp16" | "fp32"}. */
  async compile(bytes, { accelerator, arithmetic }, signature) {
    const gpuOptions = arithmetic ? { precision: arithmetic } : {};
    const model = await this.runtime.loadAndCompile(bytes, { accelerator, gpuOptions });
    // Where some operator is not for the GPU, the library takes the CPU, or both; we want to be told.
    if (accelerator === "webgpu" && (model.options.accelerator !== "webgpu" || !model.isFullyAccelerated)) {
      model.delete();
      throw new Error("some of its operators are not for the GPU");
    }
    return new Unit(this.runtime, model, signature);
  }
}

class Unit {
  /** `users`: of the model, which is freed with the last of them. */
  constructor(runtime, model, signature, users = { count: 0 }) {
    Object.assign(this, { runtime, model, signature, users });
    users.count += 1;
  }

  /** Another signature of the same file, on the same model. */
  beside(signature) {
    return new Unit(this.runtime, this.model, signature, this.users);
  }

  /** {name: NDArray} in, {name: NDArray} out. The library's tensors have no garbage collector: each is deleted. */
  async run(inputs) {
    const tensors = {};
    let outputs = {};
    try {
      for (const [name, { data, shape }] of Object.entries(inputs))
        tensors[name] = new this.runtime.Tensor(data, shape);
      outputs = await this.model.run(this.signature, tensors);
      const found = {};
      for (const [name, tensor] of Object.entries(outputs)) {
        const data = await tensor.data();
        found[name] = new NDArray(data.slice(), Array.from(tensor.type.layout.dimensions));
      }
      return found;
    } finally {
      for (const tensor of [...Object.values(tensors), ...Object.values(outputs)]) tensor.delete();
    }
  }

  delete() {
    this.users.count -= 1;
    if (this.users.count === 0) this.model.delete();
  }
}
