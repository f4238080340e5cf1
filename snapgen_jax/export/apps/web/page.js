// The page: fields, buttons and progress. What computes is in the worker.

import { gigabytes } from "./choice.js";
import { addFields } from "./inputs.js";
import { HEAP } from "./litert.js";
import { pictureShape, paint, play, received, save } from "./show.js";

const CANCEL_MS = 2500; // a call that takes longer is not waited for: its worker is ended
const TWICE_MS = 400; // the second of two quick clicks on "Draw" does not cancel
const MAX_SEED = 2 ** 32 - 1;
const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);

let worker = null;
let bundle = null; // what the worker says of it
let readInputs = async () => ({});
let job = null; // {id, type, settle}: what the worker is doing
let last = null; // {outputs, seed, prompt}: what was drawn last
let stop = () => {};
let jobs = 0;

// --- the worker ------------------------------------------------------------------------------------------------------

/** Starts a worker and opens the bundle in it; an earlier worker is ended. */
function open(note = "") {
  worker?.terminate();
  job = null;
  worker = new Worker("worker.js", { name: "bundle" });
  worker.onmessage = ({ data }) => hear(data);
  worker.onerror = (event) => {
    event.preventDefault();
    hear({
      type: "failed",
      id: job?.id,
      message: `the worker did not start: ${event.message ?? "unknown"}`,
      opening: true,
    });
  };
  show("opening", "Reading the bundle");
  say(note);
  const here = new URL(".", location.href).href;
  const wanted = {
    accelerator: $("accelerator").value,
    precision: bundle ? $("precision").value : (query.get("precision") ?? "auto"),
  };
  const threads = globalThis.crossOriginIsolated === true;
  return ask({ type: "open", base: `${here}bundle/`, litert: `${here}litert/`, threads, wanted });
}

function ask(message) {
  jobs += 1;
  job = { id: jobs, type: message.type, sent: performance.now() };
  worker.postMessage({ ...message, id: jobs });
  buttons();
}

const HEARD = {
  progress({ stage, loaded, total }) {
    const amount = total ? ` ${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB` : "";
    $("stagetext").textContent = `${stage}${amount}`;
    if (total) $("bar").value = loaded / total;
    else $("bar").removeAttribute("value");
  },
  opened: opened,
  step({ index, count, preview }) {
    $("bar").value = (index + 1) / count;
    say(`Step ${index + 1} of ${count}`);
    if (preview) {
      stop();
      show("drawing");
      paint($("canvas"), received(preview));
    }
  },
  drawn: drawn,
  check({ name, finding, passed }) {
    item("checks", `${name}: ${finding}`, passed ? "good" : "bad");
    say("Checking ...");
  },
  verified({ checks }) {
    finish();
    const failed = checks.filter((check) => !check.passed).length;
    say(failed ? `${failed} of ${checks.length} checks failed.` : `All ${checks.length} checks passed.`, failed > 0);
  },
  cancelled() {
    finish();
    say("Cancelled.");
    restore();
  },
  failed({ message, opening, broken }) {
    const type = job?.type;
    finish();
    const end = /[.!?]$/.test(message) ? "" : ".";
    const text = `${type === "draw" ? "Not drawn" : "This does not work"}: ${message}${end}`;
    if (broken && type === "open" && $("accelerator").value !== "wasm") {
      $("accelerator").value = "wasm";
      open(`${text} It goes on without the GPU.`);
    } else if (opening) {
      show("failed", text);
      buttons();
    } else if (broken) {
      open(`${text} The page began anew; try again, with the CPU or another precision if it stays so.`);
    } else {
      say(text, true);
      restore();
    }
  },
};

function hear(message) {
  if (message.id !== undefined && message.id !== job?.id) return; // of a job that is over
  HEARD[message.type](message);
}

function finish() {
  clearTimeout(job?.timer);
  job = null;
  buttons();
}

// --- what is on the page ---------------------------------------------------------------------------------------------

function show(state, text = "") {
  $("stage").dataset.state = state;
  $("stagetext").textContent = text;
}

function say(text, isBad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", isBad);
}

function item(list, text, kind = "") {
  const line = Object.assign(document.createElement("li"), { textContent: text, className: kind });
  $(list).append(line);
  $(list).scrollTop = $(list).scrollHeight;
}

function buttons() {
  const [ready, drawing] = [bundle !== null && job === null, job?.type === "draw" || job?.type === "verify"];
  $("draw").textContent = drawing ? "Cancel" : "Draw";
  $("draw").classList.toggle("cancel", drawing);
  $("draw").disabled = !(ready || drawing);
  $("check").disabled = !ready;
  $("download").disabled = !(last && job === null);
  for (const id of ["accelerator", "precision"]) $(id).disabled = job !== null && job.type !== "open";
}

/** The picture that was there before, or none. */
function restore() {
  stop();
  const name = last && Object.keys(last.outputs).find((each) => pictureShape(last.outputs[each]));
  if (name) {
    show("drawn");
    stop = play($("canvas"), last.outputs[name]);
  } else {
    const listed = last
      ? Object.entries(last.outputs).map(([each, array]) => `${each}: ${array.dtype} [${array.shape}]`)
      : [];
    show("empty", listed.join("\n") || "Write what you want to see, and press Draw.");
  }
}

function opened(message) {
  finish();
  const first = bundle === null;
  bundle = message.bundle;
  if (first) build();
  const facts = Object.entries(message.labels);
  const rows = [
    ...facts,
    [
      "GPU",
      bundle.adapter ? `${bundle.adapter.name}${bundle.adapter.software ? " (software)" : ""}` : "none for this page",
    ],
    ["Threads", bundle.threads ? "yes" : "no"],
    ["Networks", `loaded ${message.residency}`],
    ["Memory", memory(message.heap)],
    ...(bundle.licence ? [["Licence", bundle.licence]] : []),
  ];
  $("facts").replaceChildren(
    ...rows.flatMap(([name, value]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value, id: `fact-${name.toLowerCase()}` }),
    ]),
  );
  $("notes").replaceChildren();
  for (const note of message.notes) item("notes", note);
  if (message.warning) item("notes", message.warning, "bad");
  document.documentElement.dataset.ready = JSON.stringify(message.units);
  buttons();
  restore();
}

const memory = (heap) => `${gigabytes(heap)} of ${gigabytes(HEAP)}`;

/** Fields for what the bundle takes; asked once. */
function build() {
  $("title").textContent = bundle.model || "SnapGen";
  document.title = bundle.model || "SnapGen";
  $("promptfield").hidden = !bundle.prompt;
  $("stepsfield").hidden = !bundle.freeSteps;
  $("guidancefield").hidden = bundle.guidance === null;
  $("seed").closest(".row").hidden = !bundle.isFlow;
  $("steps").value = bundle.steps ?? "";
  $("guidance").value = bundle.guidance ?? "";
  if (bundle.prompt && !$("prompt").value) $("prompt").value = bundle.prompts[0] ?? "";
  for (const text of bundle.prompt ? bundle.prompts.slice(0, 4) : []) {
    const chip = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    chip.onclick = () => {
      $("prompt").value = text;
      $("prompt").focus();
    };
    $("examples").append(chip);
  }
  for (const name of bundle.precisions) $("precision").append(new Option(name, name));
  if (bundle.precisions.includes(query.get("precision"))) $("precision").value = query.get("precision");
  readInputs = addFields($("inputs"), bundle.inputs);
}

function drawn({ outputs, notes, seconds, heap }) {
  finish();
  $("fact-memory").textContent = memory(heap);
  const arrays = Object.entries(outputs).map(([name, array]) => [name, received(array)]);
  last = { ...job, outputs: Object.fromEntries(arrays), seed: $("seed").value.trim(), prompt: $("prompt").value };
  const picture = arrays.map(([, array]) => array).find(pictureShape);
  const [, height, width] = picture ? pictureShape(picture) : [];
  $("canvas").setAttribute("aria-label", last.prompt || "The picture");
  const size = picture ? `${width} × ${height} pixels` : "Done";
  say(`${size} in ${seconds.toFixed(seconds < 10 ? 2 : 0)} s, seed ${last.seed}.`);
  $("notes").replaceChildren();
  for (const note of notes) item("notes", note);
  buttons();
  restore();
}

// --- what the user does ----------------------------------------------------------------------------------------------

function numberIn(id, what, isGood) {
  const text = $(id).value.trim();
  const value = Number(text);
  if (text === "" || !isGood(value)) throw new Error(what);
  return value;
}

async function draw() {
  if (job || !bundle) return;
  const asked = { type: "draw", prompt: bundle.prompt ? $("prompt").value : "", options: {}, seed: 0 };
  try {
    if (bundle.isFlow) {
      const isSeed = (value) => Number.isInteger(value) && value >= 0 && value <= MAX_SEED;
      asked.seed = numberIn("seed", `The seed is a whole number from 0 to ${MAX_SEED}.`, isSeed);
    }
    if (bundle.freeSteps) {
      const isCount = (value) => Number.isInteger(value) && value >= 1 && value <= 1000;
      const steps = numberIn("steps", "Steps are a whole number from 1 to 1000.", isCount);
      if (steps !== bundle.steps) asked.options.steps = steps;
    }
    if (bundle.guidance !== null) {
      const guidance = numberIn("guidance", "Guidance is a number; 1 is none.", Number.isFinite);
      if (guidance !== bundle.guidance) asked.options.guidance = guidance;
    }
    const arrays = await readInputs();
    asked.inputs = Object.fromEntries(
      Object.entries(arrays).map(([name, { data, shape }]) => [name, { data, shape }]),
    );
  } catch (error) {
    say(error.message, true);
    return;
  }
  if (job) return; // a second click while a picture file was read
  $("notes").replaceChildren();
  $("bar").value = 0;
  say("Drawing ...");
  if (last === null) show("opening", "Drawing");
  else show("drawing");
  ask(asked);
}

function cancel() {
  if (job.timer || performance.now() - job.sent < TWICE_MS) return;
  worker.postMessage({ type: "cancel" });
  say("Cancelling ...");
  job.timer = setTimeout(() => open("Cancelled; the networks are loaded again."), CANCEL_MS);
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (job?.type === "draw" || job?.type === "verify") cancel();
  else draw();
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  draw();
};
$("dice").onclick = () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
};
$("download").onclick = async () => {
  const words = last.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const stem = [...words.slice(0, 8).join("_").slice(0, 60).split(" "), last.seed].filter(Boolean).join("_");
  const names = Object.keys(last.outputs);
  for (const name of names) await save(last.outputs[name], names.length > 1 ? `${stem}_${name}` : stem);
};
$("check").onclick = () => {
  $("checks").replaceChildren();
  ask({ type: "verify" });
};
for (const id of ["accelerator", "precision"]) {
  $(id).onchange = () => {
    last = null;
    open();
  };
}

if (["webgpu", "wasm"].includes(query.get("accelerator"))) $("accelerator").value = query.get("accelerator");
if (query.get("prompt")) $("prompt").value = query.get("prompt");
if (query.get("seed")) $("seed").value = query.get("seed");
open();
