// The golden suite that every client runs, in JavaScript: `node conformance.mjs APP BUNDLE`. Prints one JSON object,
// {section: cases}, or fails with the first case that differs.

import assert from "node:assert/strict";
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [app, bundle] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(path.join(app, name)).href);
const { NDArray, relativeL2 } = await load("arrays.js");
const { drawNoise } = await load("noise.js");
const { readNpy } = await load("npy.js");
const { parse } = await load("program.js");
const { Sampler, timeFeatures, withOptions } = await load("sampler.js");
const { decode, greyLevels } = await load("codec.js");
const { Tokenizer, frame } = await load("tokenizer.js");

const read = (name) => JSON.parse(fs.readFileSync(path.join(bundle, name), "utf8"));
const cases = read("golden/conformance.json");
const TYPES = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };
const array = ({ shape, values }, dtype = "float32") => new NDArray(TYPES[dtype].from(values), shape);
const close = (a, b, limit, what) => {
  assert.equal(a.length, b.length, what);
  a.forEach((value, i) => assert.ok(Math.abs(value - b[i]) <= limit, `${what}: ${value} and ${b[i]}`));
};
const below = (value, reference, limit, what) => {
  assert.deepEqual(value.shape, reference.shape, what);
  const error = relativeL2(value, reference);
  assert.ok(error <= limit, `${what}: relative L2 ${error}, at most ${limit}`);
};

const SECTIONS = {
  noise(one) {
    const { data } = drawNoise(one.seed, one.index, one.shape);
    close([...data], one.values, 1e-6, `noise of ${one.seed}, ${one.index}`);
  },

  time_features(one) {
    const { data } = timeFeatures(one.t, one.time);
    close([...data], one.values, cases.tolerances.time_features.abs, `time features of ${one.t}`);
  },

  tokenizer(one) {
    const tokenizer = new Tokenizer(read(one.file), one.file);
    assert.deepEqual(tokenizer.encode(one.prompt), one.ids, one.prompt);
    const { tokens, mask, lost } = frame(tokenizer, one.prompt, one);
    assert.deepEqual([[...tokens.data], [...mask.data]], [one.tokens, one.mask], one.prompt);
    assert.equal(lost, Math.max(0, one.ids.length + one.begin.length + one.end.length - one.length));
  },

  codec(one) {
    assert.deepEqual(decode(array(one.latent), one.decoder), array(one.image, "uint8"));
  },

  rounding(one) {
    const pixels = Float32Array.from(one.pixels);
    assert.deepEqual([...greyLevels(new NDArray(pixels, [pixels.length])).data], one.grey);
  },

  async runs(run) {
    const limits = cases.tolerances.runs;
    const program = parse(run.program);
    const left = [...run.calls];
    const network = {
      async call(unit, inputs) {
        const call = left.shift();
        assert.equal(unit, call?.unit, run.name);
        assert.deepEqual(Object.keys(inputs).sort(), Object.keys(call.inputs).sort());
        for (const [name, given] of Object.entries(inputs)) {
          const expected = array(call.inputs[name]);
          assert.deepEqual(given.shape, expected.shape);
          if (name === "time") close([...given.data], [...expected.data], limits.time_abs, `${run.name}: time`);
          else below(given, expected, limits.inputs_rel_l2, `${run.name}: ${unit}'s ${name}`);
        }
        return Object.fromEntries(Object.entries(call.outputs).map(([name, plain]) => [name, array(plain)]));
      },
    };
    const shapes = Object.fromEntries(Object.entries(run.units).map(([name, unit]) => [name, unit.inputs]));
    const sampler = new Sampler(program, network, shapes);
    const given = Object.values(program.inputs).map(({ name, dtype }) => [name, array(run.inputs[name], dtype)]);
    const isFlow = run.program.kind === "flow";
    const noise = isFlow ? drawNoise(run.seed, run.index, withOptions(program, run.options).noiseShape()) : null;
    const latents = [];
    const outputs = await sampler.run(Object.fromEntries(given), noise, run.options, {
      step: ({ x }) => latents.push(x),
    });
    assert.equal(left.length, 0, `${run.name}: calls that were not made`);
    if (run.latents) {
      const expected = array(run.latents);
      assert.equal(latents.length, expected.shape[0]);
      latents.forEach((x, i) => below(x, expected.at(i), limits.latents_rel_l2, `${run.name}: latent ${i}`));
    }
    for (const [name, plain] of Object.entries(run.outputs)) {
      const { dtype } = program.outputs[name];
      if (dtype === "uint8") assert.deepEqual(outputs[name], array(plain, dtype), run.name);
      else below(outputs[name], array(plain), limits.outputs_rel_l2, `${run.name}: ${name}`);
    }
  },
};

/** The sampler alone: the golden outputs of the denoiser lead to the golden latents. */
async function replay() {
  const golden = (name) => readNpy(new Uint8Array(fs.readFileSync(path.join(bundle, `golden/${name}.npy`))), name);
  const [program, manifest] = [parse(read("program.json")), read("manifest.json")];
  const predictions = golden("predictions");
  const times = fs.existsSync(path.join(bundle, "golden/time.npy")) ? golden("time") : null;
  const shapes = {};
  for (const [name, unit] of Object.entries(manifest.units)) {
    shapes[name] = Object.fromEntries(Object.entries(unit.inputs).map(([tensor, { shape }]) => [tensor, shape]));
  }
  for (let i = 0; i < predictions.shape[0]; i++) {
    let asked = 0;
    const network = {
      async call(unit, inputs) {
        const row = predictions
          .at(i)
          .at(asked >> 1)
          .at(asked & 1);
        if (times) close([...inputs.time.data], [...times.at(asked >> 1).data], 1e-4, "time");
        asked += 1;
        return { prediction: row };
      },
    };
    const sampler = new Sampler(program, network, shapes);
    const inputs = Object.fromEntries(
      Object.keys(program.inputs).map((name) => [name, golden(`inputs/${name}`).at(i)]),
    );
    const contexts = { "": inputs };
    for (const context of Object.keys(program.contexts)) {
      contexts[context] = { ...inputs };
      const prefix = `golden/contexts/${context}/`;
      for (const file of Object.keys(manifest.files).filter((name) => name.startsWith(prefix))) {
        const name = file.slice(prefix.length, -".npy".length);
        contexts[context][name] = golden(`contexts/${context}/${name}`).at(i);
      }
    }
    const latents = await sampler.trajectory(golden("noise").at(i), contexts, contexts);
    latents.forEach((x, step) => below(x, golden("latents").at(i).at(step), 1e-5, `golden ${i}, latent ${step}`));
  }
  return predictions.shape[0];
}

const counts = { replays: await replay() };
for (const [section, check] of Object.entries(SECTIONS)) {
  for (const one of cases[section]) await check(one);
  counts[section] = cases[section].length;
}
console.log(JSON.stringify(counts));
