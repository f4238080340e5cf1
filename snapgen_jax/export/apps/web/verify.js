// The golden examples of a bundle against what this browser computes, as verify.py does on a desktop.

import { relativeL2 } from "./arrays.js";
import { Flow } from "./program.js";

/**
 * Checks every golden example by the units as they are loaded. `precisions`: those in use; the widest of their
 * tolerances holds. Yields {name, finding, passed}.
 */
export async function* verify(client, precisions, hooks = {}) {
  const { files, program, facts, sampler } = client;
  const limits = precisions.map((precision) => facts.tolerances[precision]);
  const widest = (read) => Math.max(...limits.map(read));
  const golden = {};
  const array = async (name, i) => (golden[name] ??= await files.golden(name)).at(i);

  for (let i = 0; i < facts.examples; i++) {
    const inputs = {};
    for (const name of Object.keys(program.inputs)) inputs[name] = await array(`inputs/${name}`, i);
    const tokens = facts.prompts.length ? client.tokenize(facts.prompts[i]) : {};
    const same = Object.keys(tokens).every((name) => tokens[name].data.every((id, k) => id === inputs[name].data[k]));
    if (facts.prompts.length)
      yield { name: `example ${i}, tokens`, finding: same ? "equal" : "differ", passed: same };

    let outputs = null;
    if (program instanceof Flow) {
      const given = sampler.given(inputs);
      const contexts = await sampler.contexts(given, hooks);
      for (const context of Object.keys(program.contexts)) {
        const names = Object.keys(contexts[context]).filter((name) => !(name in inputs));
        let error = 0;
        for (const name of names) {
          error = Math.max(error, relativeL2(contexts[context][name], await array(`contexts/${context}/${name}`, i)));
        }
        yield below(
          `example ${i}, context ${context}`,
          error,
          widest((limit) => limit.contexts[context]),
        );
      }
      const guided = program.steps.some((step) => step.guided);
      const nulls = guided ? await sampler.nullContexts(given, hooks) : null;
      const latents = await sampler.trajectory(await array("noise", i), contexts, nulls, {}, hooks);
      const expected = await array("latents", i);
      for (const [step, x] of latents.entries()) {
        const name = `example ${i}, latent after step ${step + 1}`;
        yield below(
          name,
          relativeL2(x, expected.at(step)),
          widest((limit) => limit.latents[step]),
        );
      }
      outputs = await sampler.decode(latents.at(-1), hooks);
    } else {
      outputs = await sampler.run(inputs, null, {}, hooks);
    }
    for (const [name, made] of Object.entries(outputs)) {
      const expected = await array(`outputs/${name}`, i);
      yield* output(
        `example ${i}, ${name}`,
        made,
        expected,
        limits.map((limit) => limit.outputs[name]),
      );
    }
  }
}

function* output(name, made, expected, limits) {
  if (!(made.data instanceof Uint8Array)) {
    yield below(name, relativeL2(made, expected), Math.max(...limits.map((limit) => limit.rel_l2)));
    return;
  }
  const levels = made.data.map((grey, i) => Math.abs(grey - expected.data[i]));
  const squares = levels.reduce((sum, level) => sum + level * level, 0);
  const root = Math.sqrt(squares / levels.length);
  const roots = limits.map((limit) => limit.rms_grey).filter((limit) => limit !== undefined);
  if (roots.length) yield below(`${name}, rms grey level`, root, Math.max(...roots));
  else
    yield below(
      `${name}, largest grey level`,
      Math.max(...levels),
      Math.max(...limits.map((limit) => limit.max_grey)),
    );
}

function below(name, value, limit) {
  const text = (number) => (number === 0 || number >= 0.01 ? number.toFixed(2) : number.toExponential(1));
  return { name, finding: `${text(value)}, at most ${text(limit)}`, passed: value <= limit };
}
