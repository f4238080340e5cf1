// What program.json (schema 3) says: the calls that make one example. program.py in a bundle explains every field.

import {
  BundleError,
  InputError,
  NDArray,
  broadcastTo,
  canBroadcast,
  fromLists,
  map,
  sameShape,
  shapeOf,
  zeros,
} from "./arrays.js";

const SCHEMA = 3;
export const RULES = ["euler", "heun", "renoise"];
const DTYPES = ["float32", "int32", "uint8"];
const PREDICTIONS = { velocity: [], x_0: ["t_min"], linear: ["x", "out"] };
const TIMES = { features: ["dim", "scale", "max_period", "order"], index: ["size"], values: ["values"] };
const NEEDED = ["unit", "rule", "prediction", "guidance"];
const OPTIONAL = ["time", "native", "arrays", "scale", "context", "guidance_interval"];
const RESERVED = ["latent", "time", "prediction"];
const { fround } = Math;

/** Reads the contents of program.json. Throws `BundleError` that names what is missing or unknown. */
export function parse(data) {
  oneOf("schema", data.schema, [SCHEMA]);
  oneOf("kind", data.kind, ["flow", "feed_forward"]);
  return data.kind === "flow" ? Flow.read(data) : FeedForward.read(data);
}

/** A named array of one example. `null` is undefined where it has none. */
export class ArraySpec {
  constructor(name, entry) {
    [this.name, this.shape, this.dtype, this.null] = [name, entry.shape, entry.dtype, entry.null ?? undefined];
  }

  /** The arrays of one section of program.json, by name. */
  static read(where, entries, optional = []) {
    const found = {};
    for (const [name, entry] of Object.entries(entries)) {
      known(`${where}.${name}`, entry, ["shape", "dtype"], optional);
      oneOf(`${where}.${name}: dtype`, entry.dtype, DTYPES);
      found[name] = new ArraySpec(name, entry);
      if (found[name].null !== undefined && !found[name].keeps) found[name].nullOf();
    }
    return found;
  }

  /** Whether the null calls are given the caller's own array. */
  get keeps() {
    return this.null === "keep";
  }

  /** The caller's array as units take it. Throws `InputError` where shape or dtype is another. */
  of(array) {
    if (!(array instanceof NDArray) || array.dtype !== this.dtype || !sameShape(array.shape, this.shape)) {
      const got = array instanceof NDArray ? `${array.dtype} [${array.shape}]` : typeof array;
      throw new InputError(`the input "${this.name}" is ${this.dtype} [${this.shape}]; got ${got}`);
    }
    return this.dtype === "uint8" ? map((x) => fround(x / 127.5) - 1, array) : array;
  }

  /** What takes the place of the caller's own array in the null calls. */
  nullOf(own) {
    if (this.keeps) return own;
    const array = fromLists(this.null, this.dtype);
    if (!array || !canBroadcast(array.shape, this.shape)) {
      refuse(`inputs.${this.name}: the null ${JSON.stringify(this.null)} is neither "keep" nor fits [${this.shape}]`);
    }
    return this.of(broadcastTo(array, this.shape));
  }
}

function readTokenizer(where, entry, inputs) {
  known(where, entry, ["file", "tokens", "begin", "end", "pad"], ["mask", "kind"]);
  const made = [[entry.tokens, "int32"], ...(entry.mask ? [[entry.mask, "float32"]] : [])];
  for (const [name, dtype] of made) {
    if (inputs[name]?.dtype !== dtype || inputs[name].shape.length !== 1) {
      refuse(`${where} makes "${name}", which is no input of ${dtype} [L]`);
    }
  }
  const [length] = inputs[entry.tokens].shape;
  if (entry.mask && inputs[entry.mask].shape[0] !== length) refuse(`${where}: tokens and mask differ in length`);
  if (entry.begin.length + entry.end.length >= length) {
    refuse(`${where}: between [${entry.begin}] and [${entry.end}] no token fits into ${length}`);
  }
  return { ...entry, length };
}

/** How the denoiser is asked at one time, and what follows. */
export class Step {
  constructor(fields) {
    Object.assign(this, { time: null, native: null, arrays: {}, scale: 1, context: null, guidance_interval: [0, 1] });
    Object.assign(this, fields);
  }

  static read(where, entry) {
    known(where, entry, NEEDED, OPTIONAL);
    oneOf(`${where}: rule`, entry.rule, RULES);
    kind(`${where}: prediction`, entry.prediction, PREDICTIONS);
    if (entry.time) {
      kind(`${where}: time`, entry.time, TIMES);
      if ((entry.time.order ?? "cos,sin") !== "cos,sin") {
        refuse(`${where}: time features in the order "${entry.time.order}"; "cos,sin"`);
      }
    }
    const arrays = Object.entries(entry.arrays ?? {});
    const interval = entry.guidance_interval ?? [0, 1];
    if (!sameShape(shapeOf(interval) ?? [], [2])) refuse(`${where}: guidance_interval is ${interval}; two times`);
    return new Step({
      ...entry,
      native: entry.native ?? null,
      guidance: numbers(`${where}: guidance`, entry.guidance),
      arrays: Object.fromEntries(arrays.map(([name, value]) => [name, numbers(`${where}: arrays.${name}`, value)])),
    });
  }

  with(changes) {
    return new Step({ ...this, ...changes });
  }

  /** Whether it is guided at some time. */
  get guided() {
    return this.guidance.data.some((w) => w !== 1);
  }

  /** Whether a call at time t is guided. */
  guidedAt(t) {
    const [low, high] = this.guidance_interval.map(fround);
    return this.guided && low <= t && t <= high;
  }
}

/** One call of one unit. */
export class FeedForward {
  static read(data) {
    known("", data, ["schema", "kind", "unit", "inputs", "outputs"], ["tokenizers"]);
    return Object.assign(new FeedForward(), { unit: data.unit, ...ends(data) });
  }

  units() {
    return [this.unit];
  }

  encoders() {
    return [];
  }
}

/** A program of the kind "flow", checked; `steps` are whole, and `alike` where the file has none. */
export class Flow {
  static read(data) {
    const needed = ["schema", "kind", "inputs", "outputs", "latent_shape", "times", "step", "decoder"];
    const optional = ["tokenizers", "initial_scale", "shift", "steps", "contexts", "null_contexts", "state"];
    known("", data, needed, optional);
    const { times, steps: differ = null } = data;
    if (times.length < 2) refuse("`times` needs two entries at least");
    if (differ && differ.length !== times.length - 1 && differ.length !== times.length) {
      refuse(`${times.length} times need ${times.length - 1} steps, or one more; got ${differ.length}`);
    }
    known("step", data.step, [], [...NEEDED, ...OPTIONAL]);
    const steps = (differ ?? times.map(() => ({}))).map((entry, i) => {
      known(`steps[${i}]`, entry, [], [...NEEDED, ...OPTIONAL]);
      return Step.read(differ ? `steps[${i}]` : "step", { ...data.step, ...entry });
    });
    const flow = Object.assign(new Flow(), ends(data), {
      latentShape: data.latent_shape,
      times: Float32Array.from(times),
      initialScale: data.initial_scale ?? 1,
      shift: data.shift ?? null,
      steps,
      alike: differ === null,
      contexts: data.contexts ?? {},
      nullContexts: {},
      state: ArraySpec.read("state", data.state ?? {}, ["initial"]),
      decoder: data.decoder,
    });
    flow.#readState(data.state ?? {});
    flow.#readNullContexts(data.null_contexts ?? {});
    flow.#checkDecoder();
    return flow.checked();
  }

  /** The names of all units that are called. */
  units() {
    const decoder = this.decoder?.kind === "network" ? [this.decoder.unit] : [];
    return [...new Set([...this.encoders(), ...this.steps.map((step) => step.unit), ...decoder])];
  }

  /** The names of the units that make contexts. */
  encoders() {
    return [...new Set(Object.values(this.contexts).flat())];
  }

  /** Of the noise of one example: of x; of [S, ...x] where a step renoises. */
  noiseShape() {
    const intervals = this.times.length - 1;
    const renoises = this.steps.slice(0, intervals).some((step) => step.rule === "renoise");
    return renoises ? [intervals, ...this.latentShape] : this.latentShape;
  }

  initialState() {
    return Object.fromEntries(
      Object.values(this.state).map((array) => [array.name, zeros(array.shape, array.dtype)]),
    );
  }

  with(changes) {
    return Object.assign(new Flow(), this, changes);
  }

  /** Itself. Throws `BundleError` that names what does not fit together. */
  checked() {
    const { steps, times } = this;
    const last = steps[times.length - 2];
    const end = times[times.length - 1];
    if (last.rule === "heun" && steps.length < times.length) {
      refuse('the last rule is "heun", which asks at the last time: add an entry to steps');
    }
    if (last.rule === "renoise" && end !== 0) refuse(`the last rule is "renoise", which ends at time 0, not ${end}`);
    if (this.shift !== null && !(this.alike && isFree(steps[0]))) {
      refuse("`shift` offers other grids, but the steps are made for this one; leave it out");
    }
    const without = Object.values(this.inputs).filter((array) => array.null === undefined);
    for (const step of steps) {
      if (step.context !== null && !(step.context in this.contexts)) {
        refuse(`a step has the context "${step.context}"; there are ${Object.keys(this.contexts)}`);
      }
      if (!canBroadcast(step.guidance.shape, this.latentShape)) {
        refuse(`guidance [${step.guidance.shape}] does not fit x, [${this.latentShape}]`);
      }
      const [low, high] = step.guidance_interval;
      if (!(0 <= low && low <= high && high <= 1)) {
        refuse(`guidance_interval is [${low}, ${high}]; two times from 0 to 1, the lower one first`);
      }
      if (step.guided && without.length && !(step.context in this.nullContexts)) {
        refuse(`guidance needs the \`null\` of the inputs ${without.map((array) => array.name).join(", ")}`);
      }
    }
    const asked = steps.slice(0, times.length - 1);
    if (asked.some((step) => step.guided) && !asked.some((step, i) => step.guidedAt(times[i]))) {
      refuse("guidance_interval holds none of the times");
    }
    return this;
  }

  #readState(entries) {
    for (const [name, entry] of Object.entries(entries)) {
      oneOf(`state.${name}: initial`, entry.initial, ["zeros"]);
      oneOf(`state.${name}: dtype`, entry.dtype, ["float32"]);
      if (name in this.inputs || RESERVED.includes(name)) {
        refuse(`the state "${name}" has the name of an input; give it another`);
      }
    }
  }

  #readNullContexts(entries) {
    for (const [name, arrays] of Object.entries(entries)) {
      if (!(name in this.contexts)) {
        refuse(`null_contexts has "${name}"; the contexts are ${Object.keys(this.contexts)}`);
      }
      this.nullContexts[name] = ArraySpec.read(`null_contexts.${name}`, arrays, ["null"]);
      for (const array of Object.values(this.nullContexts[name])) {
        if (array.null === undefined || array.keeps) {
          refuse(`null_contexts.${name}.${array.name} needs a \`null\`, a number or an array`);
        }
      }
    }
  }

  #checkDecoder() {
    const { decoder, outputs } = this;
    if (decoder === null) {
      const { latent, ...others } = outputs;
      if (latent?.dtype !== "float32" || !sameShape(latent.shape, this.latentShape) || Object.keys(others).length) {
        refuse(`without a decoder the output is "latent", float32 [${this.latentShape}]`);
      }
      return;
    }
    oneOf("decoder", decoder.kind, ["identity", "patch", "network"]);
    if (decoder.kind !== "network") {
      if (Object.keys(outputs).join() !== "image") refuse('a decoder without a unit gives "image", and nothing else');
    } else if (!decoder.unit) {
      refuse("the decoder is a network, and names no `unit`");
    } else if (decoder.chunk != null && (decoder.chunk < 1 || this.latentShape[0] % decoder.chunk)) {
      refuse(`the decoder's chunk ${decoder.chunk} does not divide ${this.latentShape[0]}`);
    }
  }
}

/** Inputs, outputs and tokenizers. */
function ends(data) {
  const inputs = ArraySpec.read("inputs", data.inputs, ["null"]);
  const taken = Object.keys(inputs).find((name) => RESERVED.includes(name));
  if (taken) refuse(`the input "${taken}" has the name of what the sampler gives; rename it`);
  const tokenizers = (data.tokenizers ?? []).map((entry, i) => readTokenizer(`tokenizers[${i}]`, entry, inputs));
  return { inputs, outputs: ArraySpec.read("outputs", data.outputs), tokenizers };
}

/** Whether a step can be taken at any time. */
function isFree(step) {
  return (step.time === null || step.time.kind === "features") && step.native === null;
}

function refuse(why) {
  throw new BundleError(`program.json: ${why}`);
}

function numbers(what, value) {
  return fromLists(value) ?? refuse(`${what} is ${JSON.stringify(value)}; numbers were expected`);
}

function known(where, entry, needed, optional = []) {
  const place = where ? `program.json: ${where}` : "program.json";
  if (typeof entry !== "object" || entry === null || Array.isArray(entry)) {
    throw new BundleError(`${place} is ${JSON.stringify(entry)}; an object was expected`);
  }
  const missing = needed.filter((name) => !(name in entry));
  if (missing.length) throw new BundleError(`${place} lacks ${missing.join(", ")}`);
  const all = [...needed, ...optional];
  const unknown = Object.keys(entry).filter((name) => !all.includes(name));
  if (unknown.length) {
    throw new BundleError(`${place} has ${unknown.join(", ")}; this client knows ${all.join(", ")}`);
  }
}

function oneOf(what, value, choices) {
  if (!choices.includes(value)) {
    refuse(`${what} is ${JSON.stringify(value)}; this client knows ${choices.join(", ")}`);
  }
}

/** Checks an object whose "kind" says which other keys it has. */
function kind(what, entry, kinds) {
  oneOf(what, entry?.kind ?? entry, Object.keys(kinds));
  known(what, entry, ["kind", ...kinds[entry.kind]]);
}
