"""Golden examples: the numbers that a client on any device can hold its own against, and how close it must come."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.export import client
from snapgen_jax.export.compare import LIMITS
from snapgen_jax.export.precision import Precision
from snapgen_jax.export.program import Flow, Program
from snapgen_jax.export.sampler import Arrays, Sampler, Unit, relative_l2, time_input
from snapgen_jax.export.verify import grey_levels
from snapgen_jax.training.exports import GoldenInputs

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
# A tolerance is the deviation that errors at the limit of one call add up to, times this.
SAFETY = 2.0
ROUNDING = 1e-6  # relative; what float32 alone loses over some tens of steps
RECORDED = 2  # examples of which the denoiser's outputs are kept: they are large
# Relative L2 error that a call may have beside that of its precision, for an accelerator to be taken: half-precision
# arithmetic stays below it, and garbage is off by 0.1 and more.
SELF_TEST = 2e-2


def begin(
    program: Program, given: GoldenInputs, tokenizers: Mapping[str, pathlib.Path]
) -> tuple[Arrays, np.ndarray | None]:
    """What the golden examples begin with: {input: `[N, ...]`}, and the noise `[N, *noise_shape]` of a flow.

    `tokenizers`: where the program's files of that kind lie.

    Raises:
        ValueError: the program takes other inputs, or the examples are not all of one number.
    """
    found: Arrays = {name: np.asarray(array) for name, array in given.arrays.items()}
    if program.tokenizers:
        if {entry.file for entry in program.tokenizers} - set(tokenizers) or not given.prompts:
            raise ValueError("the program takes prompts: its bundle needs a tokenizer and at least one golden prompt")
        found |= client.token_inputs(program, given.prompts, lambda name: tokenizers[name])
    if set(found) != set(program.inputs):
        raise ValueError(f"the golden inputs are {sorted(found)}; the program takes {sorted(program.inputs)}")
    counts = {len(array) for array in found.values()} or {given.examples}
    if len(counts) > 1 or not all(counts):
        raise ValueError(f"the golden inputs hold different numbers of examples, or none: {sorted(counts)}")
    if not isinstance(program, Flow):
        return found, None
    shape = program.noise_shape()
    return found, np.stack([draw_noise(given.seed, i, shape) for i in range(counts.pop())])


def others(given: GoldenInputs, count: int) -> GoldenInputs:
    """Other examples of the same kind: prompts of the same words, the same arrays in turn, and other noise."""
    random = np.random.default_rng(given.seed)
    words = [word for prompt in given.prompts for word in prompt.split()] or [""]
    prompts = (
        tuple(" ".join(random.choice(words, random.integers(1, 17))) for _ in range(count)) if given.prompts else ()
    )
    arrays = {name: np.asarray(array)[np.arange(count) % len(array)] for name, array in given.arrays.items()}
    return dataclasses.replace(given, prompts=prompts, arrays=arrays, examples=count, seed=(given.seed + 1) % 2**32)


def run(sampler: Sampler, inputs: Mapping[str, np.ndarray], noise: np.ndarray | None, recorded: int = 0) -> Arrays:
    """Runs N examples and keeps all that a client should see on the way.

    Args:
        sampler: over JAX functions or files.
        inputs: `{name: [N, ...]}`, all that the program lists.
        noise: `[N, *noise_shape]` of a flow; None for a program of one call.
        recorded: of how many examples what the denoiser gives is kept, too.

    Returns:
        By the names of their files: `inputs/<name>` `[N, ...]`, `outputs/<name>` `[N, ...]`, and of a flow also
        `noise`, `latents` `[N, S, ...]` after each step, and what each encoder gave, `contexts/<context>/<name>` and,
        where guidance asks, `null_contexts/<context>/<name>` `[N, 1, ...]`. Of the recorded examples also
        `predictions` `[recorded, calls, 2, *latent_shape]`, what the denoiser gave before guidance in the order of its
        calls (row 1 is the null call's, or row 0 again where there was none), and `time` `[calls, n]`, its input of
        that name, where it has one of equal length in all calls.
    """
    count = len(next(iter(inputs.values()))) if noise is None else len(noise)
    examples = [{name: array[i] for name, array in inputs.items()} for i in range(count)]
    found: Arrays = {f"inputs/{name}": np.asarray(array) for name, array in inputs.items()}
    if noise is None or not isinstance(sampler.program, Flow):
        made = [sampler.run(example) for example in examples]
        return {**found, **{f"outputs/{name}": np.stack([one[name] for one in made]) for name in made[0]}}
    given = [sampler.given(example) for example in examples]
    contexts, nulls = [sampler.contexts(one) for one in given], [{} for _ in given]
    for name in sampler.program.contexts:
        found |= _encoded("contexts", name, contexts, sampler)
    if any(step.guided for step in sampler.program.steps):
        nulls = [sampler.null_contexts(one) for one in given]
        for name in sampler.program.contexts:
            found |= _encoded("null_contexts", name, nulls, sampler)
    kept = [_Kept() for _ in given]
    paths = [
        sampler.trajectory(one_noise, context, null, on_call=one.on_call if i < recorded else None)
        for i, (one_noise, context, null, one) in enumerate(zip(noise, contexts, nulls, kept, strict=True))
    ]
    found |= {"noise": noise, "latents": np.stack(paths)}
    if recorded:
        found["predictions"] = np.stack([np.stack(one.predictions) for one in kept[:recorded]])
        if len({time.shape for time in kept[0].times}) == 1 and len(kept[0].times) == len(kept[0].predictions):
            found["time"] = np.stack(kept[0].times)
    made = [sampler.decode(path[-1]) for path in paths]
    return {**found, **{f"outputs/{name}": np.stack([one[name] for one in made]) for name in made[0]}}


class _Kept:
    """What a denoiser is told and gives in one trajectory."""

    def __init__(self) -> None:
        self.predictions: list[np.ndarray] = []
        self.times: list[np.ndarray] = []

    def on_call(self, inputs: Arrays, out: np.ndarray, null_out: np.ndarray | None) -> None:
        self.predictions.append(np.stack([out, out if null_out is None else null_out]))
        if "time" in inputs:
            self.times.append(inputs["time"].reshape(-1))


def _encoded(kind: str, context: str, contexts: list[Any], sampler: Sampler) -> Arrays:
    """What the encoders added to a context."""
    names = [name for name in contexts[0][context] if name not in sampler.program.inputs]
    return {f"{kind}/{context}/{name}": np.stack([one[context][name] for one in contexts]) for name in names}


def inputs_of(golden: Arrays) -> Arrays:
    """{input: `[N, ...]`} of what `run` returned."""
    return {name.removeprefix("inputs/"): array for name, array in golden.items() if name.startswith("inputs/")}


class Calls:
    """Some calls of each unit, spread evenly over all that pass by: what its file is compared at."""

    LIMIT = 8

    def __init__(self) -> None:
        self._kept: dict[str, list[Arrays]] = {}
        self._stride: dict[str, int] = {}
        self._count: dict[str, int] = {}

    def watch(self, name: str, unit: Unit) -> Unit:
        """The same function, which also notes what goes in."""
        self._kept[name], self._stride[name], self._count[name] = [], 1, 0

        def run(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            if self._count[name] % self._stride[name] == 0:
                self._kept[name].append(inputs)
            self._count[name] += 1
            if len(self._kept[name]) > self.LIMIT:  # an odd stride keeps calls of both halves of guidance
                self._kept[name], self._stride[name] = self._kept[name][::3], 3 * self._stride[name]
            return unit(**inputs)

        return run

    def cases(self, name: str) -> dict[str, Arrays]:
        """{"call <number>": inputs}."""
        return {f"call {i * self._stride[name]}": inputs for i, inputs in enumerate(self._kept[name])}


def self_test(calls: Calls, units: Mapping[str, Unit]) -> Arrays:
    """One recorded call of each unit, as its file takes it, by the names of its own files: `self_test/<unit>/inputs/`
    and `.../outputs/`, and the name of the tensor."""
    found: Arrays = {}
    for name, unit in units.items():
        cases = list(calls.cases(name).values())
        inputs = cases[len(cases) // 2]
        for kind, arrays in (("inputs", inputs), ("outputs", unit(**inputs))):
            found |= {f"self_test/{name}/{kind}/{tensor}": array for tensor, array in arrays.items()}
    return found


def takes_any_time(program: Program, unit: str) -> bool:
    """Whether a unit is the one denoiser of a flow whose grid is free, and without a state."""
    if not isinstance(program, Flow) or program.shift is None or program.state:
        return False
    return unit == program.steps[0].unit


def denoiser_cases(sampler: Sampler, golden: Arrays, example: int = 0) -> dict[str, Arrays]:
    """Inputs of such a denoiser at each of `TIMES`, along a golden example's path `x_t = (1 - t) x_0 + t noise`."""
    flow = sampler.program
    assert isinstance(flow, Flow)
    x_0, noise = golden["latents"][example, -1], golden["noise"][example]
    noise = noise if noise.shape == flow.latent_shape else noise[0]
    step = flow.steps[0]
    given = sampler.given({name: array[example] for name, array in inputs_of(golden).items()})
    context = sampler.contexts(given)[step.context]
    cases = {}
    for t in np.asarray(TIMES, np.float32):
        latent = np.float32(step.scale) * ((1 - t) * x_0 + t * noise).astype(np.float32)
        cases[f"t={t:g}"] = sampler.take(
            step.unit, {**context, **step.arrays, "latent": latent, **time_input(step, t, 0)}
        )
    return cases


def tolerances(sampler: Sampler, golden: Arrays, precision: Precision) -> dict[str, Any]:
    """How far a client may be from the golden arrays.

    Each call of a unit may be off by the limit of its precision. Here every call is put off by exactly that much, in
    one direction throughout, so that the steps add up as badly as they can; guidance widens an error of the velocity by
    |w| + |w - 1|, with opposite signs in its two calls. The deviation that this leads to, measured on LiteRT and
    doubled, is the tolerance: it includes how much this sampler, with these weights, amplifies an error. What a single
    call gives is held to the limit itself.

    Returns:
        outputs: {name: {"max_grey": 1} (float32: the one grey level that rounding may flip), {"rms_grey"} (root mean
        square) or {"rel_l2"} (relative L2, where the output is no picture)}. Of a flow also contexts: {name: relative
        L2}, and latents: relative L2 after each step.
    """
    limit, program = LIMITS[precision], sampler.program
    units = {name: _put_off(unit, limit * _widening(program, name)) for name, unit in sampler.units.items()}
    inputs, noise = inputs_of(golden), golden.get("noise")
    exact, off = run(sampler, inputs, noise), run(Sampler(program, units, sampler.shapes), inputs, noise)
    found = measured_tolerances(program, exact, [off])
    if isinstance(program, Flow):
        for context, encoders in program.contexts.items():
            found["contexts"][context] = limit if len(encoders) < 2 else max(limit, found["contexts"][context])
    for name, array in program.outputs.items():
        if array.dtype != "uint8" and not isinstance(program, Flow):
            found["outputs"][name] = {"rel_l2": limit}
        elif array.dtype == "uint8" and precision == "f32":
            found["outputs"][name] = {"max_grey": 1}
    return found


def measured_tolerances(program: Program, golden: Arrays, made: Sequence[Arrays]) -> dict[str, Any]:
    """How far a client may be from the golden arrays where what was made here is right: twice the worst of it.

    That is the tolerance of integer weights, made once in integer and once in floating point arithmetic: they are off
    by a few per cent in each call, in directions that do not add up, and `tolerances`, which takes them to add up,
    would accept any picture.

    Args:
        golden, made: what `run` returned.

    Returns:
        As `tolerances`.
    """

    def deviation(name: str, worst: Callable[[np.ndarray, np.ndarray], float] = relative_l2) -> float:
        return max(worst(a, b) for off in made for a, b in zip(off[name], golden[name], strict=True))

    def root(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(np.mean(grey_levels(a, b) ** 2)))

    found: dict[str, Any] = {"outputs": {}}
    if isinstance(program, Flow):
        steps = range(golden["latents"].shape[1])
        errors = [
            max(max(map(relative_l2, off["latents"][:, i], golden["latents"][:, i])) for off in made) for i in steps
        ]
        found["latents"] = [SAFETY * error + ROUNDING for error in errors]
        found["contexts"] = {}
        for context in program.contexts:
            arrays = [name for name in golden if name.startswith(f"contexts/{context}/")]
            found["contexts"][context] = max((SAFETY * deviation(name) + ROUNDING for name in arrays), default=ROUNDING)
    for name, array in program.outputs.items():
        if array.dtype == "uint8":  # half a level for rounding
            found["outputs"][name] = {"rms_grey": SAFETY * deviation(f"outputs/{name}", root) + 0.5}
        else:
            found["outputs"][name] = {"rel_l2": SAFETY * deviation(f"outputs/{name}") + ROUNDING}
    return found


def _widening(program: Program, unit: str) -> float:
    """What guidance makes of an error of a denoiser, at most; 1 for other units."""
    scales = [step.guidance for step in program.steps if step.unit == unit] if isinstance(program, Flow) else []
    return max((float(np.max(np.abs(w) + np.abs(w - 1))) for w in scales), default=1.0)


def _put_off(unit: Unit, amount: float) -> Unit:
    """The unit with every output moved by `amount` times its norm, in a direction that never changes."""

    def run(**inputs: np.ndarray) -> Arrays:
        moved = {}
        for name, array in unit(**inputs).items():
            direction = np.random.default_rng(0).standard_normal(array.shape)
            direction *= amount * np.linalg.norm(array) / np.linalg.norm(direction)
            moved[name] = (array + direction).astype(np.float32)
        return moved

    return run
