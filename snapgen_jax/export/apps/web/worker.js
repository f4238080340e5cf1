// A classic worker, which LiteRT.js needs: it runs the bundle, so that the page stays alive meanwhile.
//
// Messages in:  {type: "open", base, litert, threads, wanted}, {type: "draw", id, ...}, {type: "verify", id},
//               {type: "cancel"}
// Messages out: {type, id, ...}, type one of progress, opened, step, drawn, check, verified, cancelled, failed

"use strict";

let client = null;
let loaded = null;
let job = null; // the AbortController of what runs

self.onmessage = async ({ data }) => {
  if (data.type === "cancel") {
    job?.abort();
    return;
  }
  if (job) {
    postMessage({
      type: "failed",
      id: data.id,
      message: "another picture is being drawn; wait for it, or cancel it",
    });
    return;
  }
  job = new AbortController();
  try {
    await { open, draw, verify }[data.type](data, job.signal);
  } catch (error) {
    if (error.name === "AbortError") postMessage({ type: "cancelled", id: data.id });
    else fail(error, data.id);
  } finally {
    job = null;
  }
};

function fail(error, id) {
  const told = ["BundleError", "InputError"].includes(error.constructor?.name);
  // After a trap the module's memory is in no known state: a new worker must take over.
  const broken = error instanceof WebAssembly.RuntimeError || /abort|out of memory/i.test(String(error));
  console.error(error);
  const message = told ? error.message : `LiteRT.js failed: ${error.message ?? error}`;
  postMessage({ type: "failed", id, message, broken, opening: client === null || loaded === null });
}

async function open({ base, litert: folder, threads, wanted, id }) {
  const [{ Client }, { startLiteRT }] = await Promise.all([import("./client.js"), import("./litert.js")]);
  postMessage({ type: "progress", id, stage: "Starting LiteRT.js" });
  const litert = await startLiteRT(folder, { threads });
  client = await Client.open(base, litert);
  let told = 0;
  loaded = await client.load(wanted, (progress) => {
    if (performance.now() - told < 50 && progress.loaded < progress.total) return;
    told = performance.now();
    postMessage({ type: "progress", id, stage: "Loading the networks", ...progress });
  });
  const { label } = await import("./client.js");
  const ways = Object.entries(loaded.units).map(([name, way]) => [name, label(way)]);
  postMessage({ type: "opened", id, bundle: client.describe(), ...loaded, labels: Object.fromEntries(ways) });
}

async function draw({ id, prompt, inputs, seed, options }, signal) {
  const { NDArray } = await import("./arrays.js");
  const { decode } = await import("./codec.js");
  const given = {};
  for (const [name, { data, shape }] of Object.entries(inputs)) given[name] = new NDArray(data, shape);
  const { decoder } = client.program;
  let shown = 0;
  const step = async ({ index, count, x }) => {
    const preview =
      decoder && decoder.kind !== "network" && performance.now() - shown > 80 ? decode(x, decoder) : null;
    if (preview) shown = performance.now();
    postMessage({ type: "step", id, index, count, preview: preview && plain(preview) });
    await turn();
  };
  const began = performance.now();
  const { outputs, notes } = await client.draw({ prompt, inputs: given, seed, options }, { signal, step });
  const seconds = (performance.now() - began) / 1000;
  const arrays = Object.entries(outputs).map(([name, array]) => [name, plain(array)]);
  postMessage({ type: "drawn", id, outputs: Object.fromEntries(arrays), notes, seconds, heap: client.litert.heap });
}

async function verify({ id }, signal) {
  const { verify: checks } = await import("./verify.js");
  const precisions = [...new Set(Object.values(loaded.units).map((way) => way.precision))];
  const found = [];
  for await (const check of checks(client, precisions, { signal, step: turn })) {
    found.push(check);
    postMessage({ type: "check", id, ...check });
  }
  postMessage({ type: "verified", id, checks: found });
}

function plain({ data, shape }) {
  return { data: data.slice(), shape };
}

/** Lets messages in, which are not looked at while promises follow one another. */
function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}
