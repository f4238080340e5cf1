"""Short runs of programs of every kind, over networks of a few numbers, with all calls and results on record.

A client replays the calls: in place of a network it has the record, which holds the inputs that each call must be given
and the outputs that it returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.export.program import Flow, parse
from snapgen_jax.export.sampler import Arrays, Sampler, Unit, with_options

Json = dict[str, Any]
# {unit: ({input: shape}, {output: shape})}, as the files of a bundle have them.
Units = Mapping[str, tuple[Mapping[str, Sequence[int]], Mapping[str, Sequence[int]]]]

LATENT = [2, 2, 3]
CLIP = [4, 2, 2, 3]
FEATURES = {"kind": "features", "dim": 6, "scale": 1000.0, "max_period": 10_000.0, "order": "cos,sin"}
VELOCITY = {"kind": "velocity"}
IMAGE = {"shape": [2, 2, 3], "dtype": "uint8"}
LABEL = {"label": {"shape": [2], "dtype": "float32", "null": 0.5}}


@dataclasses.dataclass(frozen=True)
class Run:
    """One case: a program over units, what it is given, and the options of the run."""

    name: str
    program: Json
    units: Units
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Json = dataclasses.field(default_factory=dict)


def flow(step: Json, latent: Sequence[int] = LATENT, **changes: Any) -> Json:
    """A program of the kind "flow" that begins with one denoiser "net", changed."""
    plain = {"unit": "net", "rule": "euler", "prediction": VELOCITY, "guidance": 1.0}
    return {
        "schema": 3,
        "kind": "flow",
        "inputs": {},
        "outputs": {"latent": {"shape": list(latent), "dtype": "float32"}},
        "latent_shape": list(latent),
        "times": [1.0, 0.75, 0.3125, 0.0],
        "step": {**plain, **step},
        "decoder": None,
        **changes,
    }


def net(latent: Sequence[int] = LATENT, **inputs: Sequence[int]) -> Units:
    """The denoiser "net", whose file has the batch axis, with further inputs."""
    return {"net": ({"latent": [1, *latent], **inputs}, {"prediction": [1, *latent]})}


TIME, GIVEN = {"time": [1, 6]}, {"label": np.array([0.25, -1.5], np.float32)}
GUIDED = {"time": FEATURES, "guidance": 3.0}
TEXT: Json = {
    "inputs": {
        "tokens": {"shape": [3], "dtype": "int32", "null": [1, 2, 0]},
        "mask": {"shape": [3], "dtype": "float32", "null": [1, 1, 0]},
        "size": {"shape": [1], "dtype": "float32", "null": "keep"},
    },
    "contexts": {"text": ["first", "second"]},
}
WORDS = {
    "tokens": np.array([1, 5, 2], np.int32),
    "mask": np.ones(3, np.float32),
    "size": np.array([0.5], np.float32),
}
# "second" reads what "first" made; both are called before the first step.
ENCODERS: Units = {
    "first": ({"tokens": [1, 3]}, {"states": [1, 3, 2]}),
    "second": ({"states": [1, 3, 2], "mask": [1, 3]}, {"pooled": [1, 2]}),
}
ATTENDING = {"states": [1, 3, 2], "mask": [1, 3], "pooled": [1, 2], "size": [1, 1], **TIME}
NULL_CONTEXT = {
    "text": {
        "states": {"shape": [3, 2], "dtype": "float32", "null": 0},
        "pooled": {"shape": [2], "dtype": "float32", "null": [0.5, -0.5]},
        "mask": {"shape": [3], "dtype": "float32", "null": 1},
    }
}
CACHE = {"cache": {"shape": CLIP, "dtype": "float32", "initial": "zeros"}}
TWO_UNITS: Units = {
    "full": ({"latent": CLIP, "time": [1, 4], "cache": CLIP}, {"prediction": CLIP, "cache": CLIP}),
    "short": ({"latent": CLIP, "label": [1, 2], "cache": CLIP}, {"prediction": CLIP}),
    "decoder": ({"latent": [2, 2, 2, 3], "cache": CLIP}, {"image": [2, 2, 2, 3], "edges": [2, 2, 2, 1], "cache": CLIP}),
}
CLIPS = {"image": {"shape": CLIP, "dtype": "uint8"}, "edges": {"shape": [*CLIP[:3], 1], "dtype": "float32"}}
PATCH = {"kind": "patch", "patch": 2, "scale": 1.5, "shift": 0.1, "frequency_scale": [1.0, 2.0, 0.5, 3.0]}
PICTURES = {"inputs": {"image": IMAGE}, "outputs": {"image": IMAGE, "edges": {"shape": [2, 2, 1], "dtype": "float32"}}}
PICTURE = np.arange(0, 240, 20).astype(np.uint8).reshape(2, 2, 3)

RUNS = (
    Run("euler, velocity", flow({}), net()),
    Run("heun asks at the end of a step, too", flow({"rule": "heun", "time": FEATURES}), net(**TIME)),
    Run("renoise takes fresh noise before each further step", flow({"rule": "renoise", "time": FEATURES}), net(**TIME)),
    Run(
        "x_0 below t_min",
        flow({"prediction": {"kind": "x_0", "t_min": 0.05}}, times=[1.0, 0.4, 0.03, 0.0]),
        net(),
    ),
    Run(
        "linear prediction, scales, native times, rules that differ by step",
        flow(
            {"time": FEATURES},
            initial_scale=0.5,
            steps=[
                {"native": 9.5, "scale": 0.7, "prediction": {"kind": "linear", "x": -1.25, "out": 1.5}},
                {"native": 3.25, "rule": "heun", "prediction": {"kind": "linear", "x": 0.5, "out": -2.0}},
                {"native": 0.5, "scale": 1.3},
            ],
        ),
        net(**TIME),
    ),
    Run(
        "index and values as time, and further arrays",
        flow(
            {"arrays": {"size": [2.0, 3.0]}},
            steps=[
                {"time": {"kind": "index", "size": 6}},
                {"time": {"kind": "index", "size": 6}, "native": 4},
                {"time": {"kind": "values", "values": [0.5, 1.5, -2.0, 0.0, 1.0, 7.0]}},
            ],
        ),
        net(**TIME, size=[1, 2]),
    ),
    Run("another number of steps", flow({"time": FEATURES}, shift=3.0), net(**TIME), options={"steps": 5}),
    Run(
        "another rule, steps without a shift",
        flow({"time": FEATURES}, shift=1.0),
        net(**TIME),
        options={"method": "heun", "steps": 2},
    ),
    Run(
        "guidance over two encoders, one input kept",
        flow({**GUIDED, "context": "text"}, **TEXT),
        {**net(**ATTENDING), **ENCODERS},
        WORDS,
    ),
    Run(
        "guidance 1 makes no null call",
        flow({**GUIDED, "context": "text"}, **TEXT),
        {**net(**ATTENDING), **ENCODERS},
        WORDS,
        {"guidance": 1.0},
    ),
    Run(
        "null contexts in place of the encoders",
        flow({**GUIDED, "context": "text"}, **TEXT, null_contexts=NULL_CONTEXT),
        {**net(**ATTENDING), **ENCODERS},
        WORDS,
    ),
    Run(
        "a guidance interval of the program",
        flow({**GUIDED, "guidance_interval": [0.3125, 0.75]}, inputs=LABEL),
        net(**TIME, label=[1, 2]),
        GIVEN,
    ),
    Run(
        "a guidance interval and a guidance of the run, with heun",
        flow({**GUIDED, "rule": "heun"}, inputs=LABEL),
        net(**TIME, label=[1, 2]),
        GIVEN,
        {"guidance": 1.75, "guidance_interval": [0.0, 0.5]},
    ),
    Run(
        "guidance by channel, x_0",
        flow({"guidance": [3.0, 1.0, 0.5], "prediction": {"kind": "x_0", "t_min": 0.05}}, inputs=LABEL),
        net(label=[1, 2]),
        GIVEN,
    ),
    Run(
        "two denoisers, guidance by frame in an interval, a state that goes on, a decoder in chunks",
        flow(
            {"guidance": [[[[1.0]]], [[[1.5]]], [[[2.0]]], [[[2.5]]]], "guidance_interval": [0.3, 0.8]},
            CLIP,
            inputs=LABEL,
            outputs=CLIPS,
            state=CACHE,
            steps=[
                {"unit": "full", "time": {"kind": "index", "size": 4}},
                {"unit": "short"},
                {"unit": "full", "time": {"kind": "index", "size": 4}},
            ],
            decoder={"kind": "network", "unit": "decoder", "chunk": 2},
        ),
        TWO_UNITS,
        GIVEN,
    ),
    Run(
        "pixels as latents",
        flow({}, outputs={"image": IMAGE}, decoder={"kind": "identity", "scale": 2.0, "shift": 0.1}),
        net(),
    ),
    Run(
        "patches as latents",
        flow(
            {"prediction": {"kind": "x_0", "t_min": 0.05}, "time": FEATURES},
            [1, 2, 12],
            outputs={"image": {"shape": [2, 4, 3], "dtype": "uint8"}},
            decoder=PATCH,
        ),
        net([1, 2, 12], **TIME),
    ),
    Run(
        "one call, picture to picture",
        {"schema": 3, "kind": "feed_forward", "unit": "net", **PICTURES},
        {"net": ({"image": [1, 2, 2, 3]}, {"image": [1, 2, 2, 3], "edges": [1, 2, 2, 1]})},
        {"image": PICTURE},
    ),
)


def record(run: Run) -> Json:
    """One case as plain data: all that a client needs to repeat it, the calls in their order, and what came out."""
    parsed, units, calls, latents = parse(run.program), run.units, [], []
    made = {unit: _recorded(unit, _network(unit, shapes), calls) for unit, (_, shapes) in units.items()}
    sampler = Sampler(parsed, made, {unit: shapes for unit, (shapes, _) in units.items()})
    seed, index = 5, 2
    noise = None
    if isinstance(parsed, Flow):
        noise = draw_noise(seed, index, with_options(parsed, **run.options).noise_shape())
    outputs = sampler.run(run.inputs, noise, on_step=lambda i, x: latents.append(x), **run.options)
    return {
        "name": run.name,
        "program": run.program,
        "units": {
            unit: {"inputs": {n: list(s) for n, s in taken.items()}, "outputs": {n: list(s) for n, s in given.items()}}
            for unit, (taken, given) in units.items()
        },
        "inputs": named(run.inputs),
        "seed": seed,
        "index": index,
        "options": run.options,
        "calls": calls,
        "latents": plain(np.stack(latents)) if latents else None,
        "outputs": named(outputs),
    }


def _network(name: str, outputs: Mapping[str, Sequence[int]]) -> Unit:
    """A function that mixes all its inputs by fixed random numbers: no input can be forgotten or exchanged."""

    def run(**inputs: np.ndarray) -> Arrays:
        made = {}
        for output, shape in outputs.items():
            total = np.zeros(int(np.prod(shape)))
            for tensor, array in sorted(inputs.items()):
                random = np.random.default_rng([*f"{name}/{output}/{tensor}".encode()])
                total += array.reshape(-1) @ random.standard_normal((array.size, total.size)) / np.sqrt(array.size)
            made[output] = (1.2 * np.tanh(total)).reshape(shape).astype(np.float32)
        return made

    return run


def _recorded(name: str, unit: Unit, calls: list[Json]) -> Unit:
    """The same function, whose calls are noted."""

    def run(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        outputs = unit(**inputs)
        calls.append({"unit": name, "inputs": named(inputs), "outputs": named(outputs)})
        return outputs

    return run


def named(arrays: Mapping[str, Any]) -> Json:
    """`{name: plain(array)}`."""
    return {name: plain(np.asarray(array)) for name, array in arrays.items()}


def plain(array: np.ndarray) -> Json:
    """An array as {"shape", "values"}, the values in C order."""
    return {"shape": list(array.shape), "values": numbers(array)}


def numbers(array: np.ndarray) -> list[float] | list[int]:
    """The values in C order. A float32 is written with the fewest digits that are read back as the same float32."""
    if np.issubdtype(array.dtype, np.integer):
        return array.reshape(-1).tolist()
    return [float(str(value)) for value in array.astype(np.float32).reshape(-1)]
