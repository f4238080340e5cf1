// A bundle, opened: its program, its tokenizers, and its units on LiteRT.js.

import { BundleError, InputError, relativeL2 } from "./arrays.js";
import { fit, heapWarning, waysOf } from "./choice.js";
import { Files } from "./files.js";
import { drawNoise } from "./noise.js";
import { Flow, parse } from "./program.js";
import { Sampler, withOptions } from "./sampler.js";
import { Tokenizer, frame } from "./tokenizer.js";

const MANIFEST_SCHEMAS = [4];
const PACKED_SCHEMA = 5; // as 4, with packed networks
const LONGEST_PROMPT = 10_000; // characters; far more than any encoder reads

export class Client {
  #units = {}; // {name: the compiled unit}
  #ways = {}; // {name: the ways that are left, the first of them in use}
  #tested = new Set();
  #residency = "together";

  /** Reads what a bundle is. `base`: URL of its folder. `litert`: of `startLiteRT`. */
  static async open(base, litert) {
    const client = new Client();
    const files = new Files(base);
    const manifest = await files.json("manifest.json");
    for (const name of ["schema", "precisions", "units", "files"]) {
      if (!(name in manifest)) throw new BundleError(`manifest.json lacks ${name}; this folder is no bundle`);
    }
    if (manifest.schema === PACKED_SCHEMA) {
      throw new BundleError(
        "this bundle has packed networks, which this page does not unpack. Make the page by " +
          "`snapgen export --bundle=BUNDLE --app=web`, which unpacks them",
      );
    }
    if (!MANIFEST_SCHEMAS.includes(manifest.schema)) {
      const age = manifest.schema > Math.max(...MANIFEST_SCHEMAS) ? "newer" : "older";
      throw new BundleError(
        `this bundle is ${age} than its page: manifest.json has schema ${manifest.schema}, and this page knows ` +
          `${MANIFEST_SCHEMAS.join(" and ")}. Export it, or its page, again`,
      );
    }
    files.hold(manifest.files);
    const program = parse(await files.json("program.json"));
    const missing = program.units().find((name) => !(name in manifest.units));
    if (missing) throw new BundleError(`program.json calls the unit "${missing}", which the manifest lacks`);
    const shapes = {};
    for (const [name, unit] of Object.entries(manifest.units)) {
      shapes[name] = Object.fromEntries(Object.entries(unit.inputs).map(([tensor, { shape }]) => [tensor, shape]));
    }
    const facts = await files.json("golden/golden.json");
    const tokenizers = {};
    for (const { file } of program.tokenizers) tokenizers[file] ??= new Tokenizer(await files.json(file), file);
    Object.assign(client, { files, litert, manifest, program, facts, tokenizers });
    client.sampler = new Sampler(program, client, shapes);
    await files.forgetOthers();
    return client;
  }

  /** For the page: what may be asked of this bundle, as plain data. */
  describe() {
    const { program, manifest, facts, litert } = this;
    const made = new Set(program.tokenizers.flatMap((entry) => [entry.tokens, entry.mask]));
    const plain = ({ name, shape, dtype }) => ({ name, shape, dtype });
    const isFlow = program instanceof Flow;
    const scale = isFlow ? (program.steps.find((step) => step.guided) ?? program.steps[0]).guidance : null;
    return {
      model: manifest.model ?? "",
      licence: manifest.licence ?? "",
      precisions: manifest.precisions,
      prompt: program.tokenizers.length > 0,
      prompts: facts.prompts ?? [],
      inputs: Object.values(program.inputs)
        .filter(({ name }) => !made.has(name))
        .map(plain),
      outputs: Object.values(program.outputs).map(plain),
      isFlow,
      steps: isFlow ? program.times.length - 1 : null,
      freeSteps: isFlow && program.shift !== null,
      guidance: scale && scale.shape.length === 0 && this.#canGuide() ? scale.data[0] : null,
      adapter: litert.adapter,
      threads: litert.threads,
    };
  }

  /** Whether every input that guidance replaces has something to replace it. */
  #canGuide() {
    try {
      withOptions(this.program, { guidance: 2 });
      return true;
    } catch {
      return false;
    }
  }

  /**
   * Loads every unit where it passes its self-test. `wanted`: see `waysOf`. `report({loaded, total})` counts bytes.
   * Returns {units: {name: {accelerator, precision, arithmetic}}, notes: [text], warning, residency, heap}.
   */
  async load(wanted, report = () => {}) {
    this.free();
    const { manifest, litert, program } = this;
    const names = program.units();
    const ways = {};
    for (const name of names) ways[name] = waysOf(manifest.units[name], manifest.files, wanted, litert.adapter);
    const plan = fit(ways);
    if (plan.error) throw new BundleError(plan.error);
    [this.#ways, this.#residency] = [plan.ways, plan.residency];
    const notes = litert.note ? [litert.note] : [];
    if (wanted.accelerator === "webgpu" && !litert.adapter) notes.push("this browser offers no GPU to the page");
    const sizes = new Map(names.map((name) => [this.#ways[name][0].file, this.#ways[name][0].bytes]));
    const total = [...sizes.values()].reduce((sum, bytes) => sum + bytes, 0);
    let loaded = 0;
    const count = (bytes) => report({ loaded: Math.min((loaded += bytes), total), total });
    for (const name of names) await this.#load(name, notes, count);
    const units = {};
    for (const name of names) {
      const { accelerator, precision, arithmetic } = this.#ways[name][0];
      units[name] = { accelerator, precision, arithmetic };
    }
    const warning = heapWarning(litert.heap) || plan.warning;
    return { units, notes, warning, residency: this.#residency, heap: litert.heap };
  }

  free() {
    for (const unit of Object.values(this.#units)) unit.delete();
    this.#units = {};
    this.#tested.clear();
  }

  /** The network that the sampler calls. */
  async call(name, inputs) {
    if (!this.#units[name]) await this.#load(name, []);
    return this.#units[name].run(inputs);
  }

  /** Takes the first way on which a unit passes its self-test; drops those on which it does not. */
  async #load(name, notes, count) {
    if (this.#residency === "in turn") {
      for (const other of Object.keys(this.#units)) {
        if (this.#ways[other][0].file === this.#ways[name][0]?.file) continue;
        this.#units[other].delete();
        delete this.#units[other];
      }
    }
    const found = [];
    for (const ways = this.#ways[name]; ways.length; ways.shift()) {
      const [way] = ways;
      const { signature } = this.manifest.units[name];
      let why = "";
      const beside = this.#loaded(way);
      const bytes = beside ? null : await this.files.bytes(way.file, count);
      try {
        this.#units[name] = beside?.beside(signature) ?? (await this.litert.compile(bytes, way, signature));
        why = this.#tested.has(name) ? "" : await this.#selfTest(name, way.precision);
      } catch (error) {
        if (error instanceof BundleError || error instanceof WebAssembly.RuntimeError) throw error;
        why = error.message;
      }
      if (!why) {
        this.#tested.add(name);
        if (found.length) notes.push(`${found.join("; ")}: it runs by ${label(way)}`);
        return;
      }
      this.#units[name]?.delete();
      delete this.#units[name];
      found.push(`${name} by ${label(way)}: ${why}`);
    }
    throw new BundleError(`this browser does not run the bundle. ${found.join("; ")}`);
  }

  /** A unit that runs from the same file in the same way; undefined where none is loaded. */
  #loaded(way) {
    const same = ["file", "accelerator", "arithmetic"];
    return Object.entries(this.#units).find(([name]) => same.every((key) => this.#ways[name][0][key] === way[key]))?.[1];
  }

  /** One recorded call. Returns what is wrong with what comes out; "" where nothing is. */
  async #selfTest(name, precision) {
    const { inputs, outputs, signature } = this.manifest.units[name];
    const limit = this.facts.self_test?.[precision];
    if (limit === undefined) return `${signature} has no recorded call to test it with; export the bundle again`;
    const given = {};
    for (const tensor of Object.keys(inputs))
      given[tensor] = await this.files.golden(`self_test/${name}/inputs/${tensor}`);
    const made = await this.#units[name].run(given);
    for (const tensor of Object.keys(outputs)) {
      const error = relativeL2(made[tensor], await this.files.golden(`self_test/${name}/outputs/${tensor}`));
      if (!(error <= limit))
        return `its self-test is off by ${error.toPrecision(2)}, at most ${limit.toPrecision(2)}`;
    }
    return "";
  }

  /**
   * Draws one example: {outputs: {name: NDArray}, notes: [text]}.
   *
   * `prompt`: text, where the bundle takes prompts. `inputs`: {name: NDArray}, the others. `hooks`: see `Sampler.run`.
   */
  async draw({ prompt = "", inputs = {}, seed = 0, index = 0, options = {} }, hooks = {}) {
    const notes = [];
    const given = { ...inputs, ...this.tokenize(prompt, notes) };
    const noise =
      this.program instanceof Flow ? drawNoise(seed, index, withOptions(this.program, options).noiseShape()) : null;
    return { outputs: await this.sampler.run(given, noise, options, hooks), notes };
  }

  /** The inputs that the bundle's tokenizers make of a prompt. */
  tokenize(prompt, notes = []) {
    if (prompt.length > LONGEST_PROMPT) {
      throw new InputError(`the prompt has ${prompt.length} characters; at most ${LONGEST_PROMPT} are read`);
    }
    const made = {};
    for (const entry of this.program.tokenizers) {
      const { tokens, mask, lost } = frame(this.tokenizers[entry.file], prompt, entry);
      made[entry.tokens] = tokens;
      if (entry.mask) made[entry.mask] = mask;
      if (lost) notes.push(`The prompt is too long: its last ${lost} of ${lost + entry.length} tokens are not read.`);
    }
    return made;
  }
}

/** For people: "WebGPU (float16)". */
export function label({ accelerator, precision, arithmetic }) {
  const names = { f32: "float32", f16: "float16", int8: "int8", mixed: "mixed int4 and int8" };
  const place = accelerator === "webgpu" ? "WebGPU" : "WebAssembly";
  const half = arithmetic === "fp16" ? ", half-precision arithmetic" : "";
  return `${place} (${names[precision] ?? precision}${half})`;
}
