// How a program runs: its formulas, and the order of its calls. sampler.py in a bundle is the same in numpy.
//
// A network is anything with `async call(unit, {name: NDArray}) -> {name: NDArray}`: LiteRT.js in the page, recorded
// calls in a test.

import {
  BundleError,
  InputError,
  NDArray,
  add,
  concatenate,
  divide,
  map,
  multiply,
  sameShape,
  subtract,
  zeros,
  fromLists,
} from "./arrays.js";
import { decode, greyLevels } from "./codec.js";
import { FeedForward, RULES } from "./program.js";

const { fround } = Math;

/** Cosines, then sines, of `scale t` at dim / 2 frequencies from 1 towards 1 / max_period: `[1, dim]`. */
export function timeFeatures(t, { dim, scale, max_period: maxPeriod }) {
  const half = Math.floor(dim / 2);
  const step = fround(-Math.log(maxPeriod) / half);
  const scaled = fround(fround(scale) * fround(t));
  const out = zeros([1, 2 * half]);
  for (let i = 0; i < half; i++) {
    const angle = fround(scaled * fround(Math.exp(fround(step * i))));
    out.data[i] = Math.cos(angle);
    out.data[half + i] = Math.sin(angle);
  }
  return out;
}

/** {time: what the denoiser is told at a time of the grid}; {} where it is told nothing. */
export function timeInput(step, t, position) {
  if (step.time === null) return {};
  if (step.time.kind === "values") return { time: fromLists([step.time.values]) };
  if (step.time.kind === "features") return { time: timeFeatures(step.native ?? t, step.time) };
  const row = zeros([1, step.time.size]);
  row.data[step.native === null ? position : Math.trunc(step.native)] = 1;
  return { time: row };
}

/** The velocity at x, from what the denoiser gave there. */
export function asVelocity(out, x, t, prediction) {
  if (prediction.kind === "velocity") return out;
  if (prediction.kind === "linear") {
    return add(multiply(x, fround(prediction.x)), multiply(out, fround(prediction.out)));
  }
  return divide(subtract(x, out), Math.max(fround(t), fround(prediction.t_min)));
}

/**
 * One step from time t to time s. `velocity(x, time, end)` is asked at t, where end is 0, and at s, where it is 1.
 *
 * euler:    x_s = x_t + (s - t) v(x_t, t)
 * heun:     y   = x_t + (s - t) v(x_t, t),   x_s = x_t + (s - t) (v(x_t, t) + v(y, s)) / 2
 * renoise:  x_0 = x_t - t v(x_t, t),         x_s = (1 - s) x_0 + s noise,   noise fresh; none at s = 0
 */
export async function advance(velocity, x, t, s, rule, noise = null) {
  const h = fround(s - t);
  let v = await velocity(x, t, 0);
  if (rule === "renoise") {
    const x0 = subtract(x, multiply(v, t));
    return noise === null ? x0 : add(multiply(x0, fround(1 - s)), multiply(noise, s));
  }
  if (rule === "heun") v = divide(add(v, await velocity(add(x, multiply(v, h)), s, 1)), 2);
  return add(x, multiply(v, h));
}

/**
 * The flow with other `steps` (a number), `guidance`, `method` (a rule) or `guidance_interval`; what is undefined stays.
 * Throws `InputError` where the program does not allow it.
 */
export function withOptions(flow, { steps, guidance, method, guidance_interval: interval, ...others } = {}) {
  if (Object.keys(others).length) {
    throw new InputError(
      `a bundle has no option ${Object.keys(others)}; it takes steps, guidance, method, guidance_interval`,
    );
  }
  const intervals = flow.times.length - 1;
  let [made, times] = [flow.steps, flow.times];
  if (method != null && made.slice(0, intervals).some((step) => step.rule !== method)) {
    if (!RULES.includes(method)) {
      throw new InputError(`unknown sampling method "${method}"; expected one of ${RULES.join(", ")}`);
    }
    if (!flow.alike) throw new InputError("the steps of this bundle differ, and so their method is fixed");
    made = made.map((step) => step.with({ rule: method }));
  }
  if (guidance != null) {
    const scale = fromLists(guidance);
    const other = made.find((step) => !scale || !sameShape(step.guidance.shape, scale.shape));
    if (other) {
      throw new InputError(`the guidance of this bundle has the shape [${other.guidance.shape}]; got ${guidance}`);
    }
    const every = !made.some((step) => step.guided);
    made = made.map((step) => (step.guided || every ? step.with({ guidance: scale }) : step));
  }
  if (interval != null) {
    if (interval.length !== 2) throw new InputError(`guidance_interval is ${interval}; give two times, T_LOW,T_HIGH`);
    made = made.map((step) => step.with({ guidance_interval: interval.map(Number) }));
  }
  if (steps != null && steps !== intervals) {
    if (!Number.isInteger(steps) || steps < 1) throw new InputError(`a sample needs at least one step, got ${steps}`);
    if (flow.shift === null) throw new InputError(`this bundle takes ${intervals} steps and no other number`);
    times = Float32Array.from({ length: steps + 1 }, (_, i) => {
      const t = i === steps ? 0 : 1 - i / steps;
      return (flow.shift * t) / (1 + (flow.shift - 1) * t);
    });
    made = Array(steps + 1).fill(made[0]);
  }
  return flow.with({ times, steps: made }).checked();
}

/** A program over a network. `shapes`: {unit: {input: its shape in the file}}. */
export class Sampler {
  #null = null;

  constructor(program, network, shapes) {
    Object.assign(this, { program, network, shapes });
  }

  /**
   * The outputs {name: NDArray} of one example.
   *
   * `inputs`: {name: NDArray}, all that the program lists. `noise`: of a flow, of `noiseShape()`. `hooks`: optional
   * {signal: AbortSignal, step: async ({index, count, x}) => {}}, asked after every call, told after every step.
   */
  async run(inputs, noise = null, options = {}, hooks = {}) {
    const given = this.given(inputs);
    if (this.program instanceof FeedForward) {
      if (Object.keys(options).length)
        throw new InputError(`this bundle is one call, without ${Object.keys(options)}`);
      return this.#outputs(await this.call(this.program.unit, given, hooks));
    }
    const flow = withOptions(this.program, options);
    const contexts = await this.contexts(given, hooks);
    const nulls = flow.steps.some((step) => step.guided) ? await this.nullContexts(given, hooks) : null;
    const latents = await this.trajectory(noise, contexts, nulls, options, hooks);
    return this.decode(latents.at(-1), hooks);
  }

  /** The caller's arrays as units take them. Throws `InputError` that names what is missing or does not fit. */
  given(inputs) {
    const [names, got] = [Object.keys(this.program.inputs), Object.keys(inputs)];
    if (names.length !== got.length || names.some((name) => !(name in inputs))) {
      throw new InputError(`the inputs are ${names.join(", ") || "none"}; got ${got.join(", ") || "none"}`);
    }
    return Object.fromEntries(names.map((name) => [name, this.program.inputs[name].of(inputs[name])]));
  }

  /** Runs a unit with those of `arrays` that it takes. */
  async call(unit, arrays, { signal } = {}) {
    signal?.throwIfAborted();
    const out = await this.network.call(unit, this.take(unit, arrays));
    signal?.throwIfAborted();
    return out;
  }

  /** Those of `arrays` that a unit takes, each with an axis of 1 before it where the file has one. */
  take(unit, arrays) {
    const taken = {};
    for (const [name, shape] of Object.entries(this.shapes[unit])) {
      const array = arrays[name];
      if (!array) throw new BundleError(`the unit "${unit}" needs ${name}; there is only ${Object.keys(arrays)}`);
      if (!sameShape(shape, array.shape) && !sameShape(shape, [1, ...array.shape])) {
        throw new BundleError(`the unit "${unit}" takes ${name} of shape [${shape}]; got [${array.shape}]`);
      }
      taken[name] = array.reshape(shape);
    }
    return taken;
  }

  /** {context: its arrays}; "" is the caller's inputs alone. */
  async contexts(given, hooks = {}, isNull = false) {
    const made = { "": given };
    for (const [name, units] of Object.entries(this.program.contexts)) {
      made[name] = { ...given };
      const fixed = isNull ? this.program.nullContexts[name] : undefined;
      if (fixed) {
        for (const array of Object.values(fixed))
          made[name][array.name] = array.nullOf().reshape([1, ...array.shape]);
        continue;
      }
      for (const unit of units) Object.assign(made[name], await this.call(unit, made[name], hooks));
    }
    return made;
  }

  /** The contexts of the null calls; made once, unless they hold something of the caller's own. */
  async nullContexts(given, hooks = {}) {
    if (this.#null) return this.#null;
    const arrays = Object.values(this.program.inputs).filter((array) => array.null !== undefined);
    const nulls = Object.fromEntries(arrays.map((array) => [array.name, array.nullOf(given[array.name])]));
    const made = await this.contexts(nulls, hooks, true);
    if (!arrays.some((array) => array.keeps)) this.#null = made;
    return made;
  }

  /** The latent after each step, a list. `nulls` may be null where guidance makes no call. */
  async trajectory(noise, contexts, nulls, options = {}, hooks = {}) {
    const flow = withOptions(this.program, options);
    const expected = flow.noiseShape();
    if (!noise || !sameShape(noise.shape, expected)) {
      throw new InputError(`the noise has the shape [${noise?.shape}]; these steps take [${expected}]`);
    }
    const states = [flow.initialState(), flow.initialState()];

    const ask = async (i, x, t, context, state) => {
      const step = flow.steps[i];
      const latent = step.scale === 1 ? x : multiply(x, fround(step.scale));
      const named = { ...context[step.context ?? ""], ...state, ...step.arrays, latent, ...timeInput(step, t, i) };
      const out = await this.call(step.unit, named, hooks);
      rewrite(state, out);
      return asVelocity(out.prediction.reshape(x.shape), x, t, step.prediction);
    };
    const velocity = async (i, x, t) => {
      const step = flow.steps[i];
      const v = await ask(i, x, t, contexts, states[0]);
      const guided = step.guidedAt(t);
      // A state of the null calls goes on at all times.
      if (!guided && !(step.guided && Object.keys(flow.state).length)) return v;
      const vNull = await ask(i, x, t, nulls, states[1]);
      return guided ? map((a, b, w) => a + fround(w * fround(b - a)), vNull, v, step.guidance) : v;
    };

    const renoises = !sameShape(expected, flow.latentShape);
    let x = renoises ? noise.at(0) : noise;
    if (flow.initialScale !== 1) x = multiply(x, fround(flow.initialScale));
    const count = flow.times.length - 1;
    const latents = [];
    for (let i = 0; i < count; i++) {
      const fresh = renoises && i + 1 < count ? noise.at(i + 1) : null;
      const asked = (y, time, end) => velocity(i + end, y, time);
      x = await advance(asked, x, flow.times[i], flow.times[i + 1], flow.steps[i].rule, fresh);
      latents.push(x);
      await hooks.step?.({ index: i, count, x });
    }
    return latents;
  }

  /** The outputs of a latent. */
  async decode(latent, hooks = {}) {
    const { decoder } = this.program;
    if (decoder === null) return { latent };
    if (decoder.kind !== "network") return { image: decode(latent, decoder) };
    const chunk = decoder.chunk ?? null;
    const state = this.program.initialState();
    const made = [];
    for (let begin = 0; begin < (chunk ? latent.shape[0] : 1); begin += chunk ?? 1) {
      const piece = chunk ? latent.rows(begin, begin + chunk) : latent;
      made.push(await this.call(decoder.unit, { ...state, latent: piece }, hooks));
      rewrite(state, made.at(-1));
    }
    if (!chunk) return this.#outputs(made[0]);
    const names = Object.keys(this.program.outputs);
    return this.#outputs(Object.fromEntries(names.map((name) => [name, concatenate(made.map((out) => out[name]))])));
  }

  /** What a unit gave, as the caller gets it. */
  #outputs(out) {
    return Object.fromEntries(
      Object.values(this.program.outputs).map(({ name, shape, dtype }) => {
        const array = out[name].reshape(shape);
        return [name, dtype === "uint8" ? greyLevels(array) : array];
      }),
    );
  }
}

/** Puts in what a unit gave under the names of the state. */
function rewrite(state, out) {
  for (const name of Object.keys(state)) {
    if (name in out) state[name] = out[name].reshape(state[name].shape);
  }
}
