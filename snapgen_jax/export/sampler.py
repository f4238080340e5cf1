"""How a program runs: its formulas in numpy, and the order of its calls. Copied into every bundle.

The exporter runs the same code over JAX functions to make the golden values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

if __package__:
    from snapgen_jax.export.program import RULES, BundleError, FeedForward, Flow, Step
else:  # beside its own copy, in a bundle
    from program import RULES, BundleError, FeedForward, Flow, Step  # type: ignore[import-not-found]

# The function of one file: named arrays in, named arrays out.
Unit = Callable[..., Mapping[str, np.ndarray]]
Arrays = dict[str, np.ndarray]
# {context name: its arrays}; None is the caller's inputs alone.
Contexts = dict[str | None, Arrays]
# `on_step(step, latent)`, after each step of a trajectory, from step 0. What it raises ends the trajectory.
OnStep = Callable[[int, np.ndarray], None]
# `on_call(inputs, out, null_out)`, after each time at which the denoiser was asked: what it was given at first, what it
# gave before guidance, and what it gave in the null call, None where there was none.
OnCall = Callable[[Arrays, np.ndarray, np.ndarray | None], None]


def time_features(t: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """Cosines, then sines, of `scale t` at dim / 2 frequencies from 1 towards 1 / max_period. `[B] -> [B, dim]`."""
    half = spec["dim"] // 2
    step = np.float32(-np.log(spec["max_period"]) / half)
    frequencies = np.exp(step * np.arange(half, dtype=np.float32))
    angles = (np.float32(spec["scale"]) * np.asarray(t, np.float32))[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def as_velocity(out: np.ndarray, x: np.ndarray, t: np.float32, prediction: Mapping[str, Any]) -> np.ndarray:
    """The velocity at x, from what the denoiser gave there."""
    if prediction["kind"] == "velocity":
        return out
    if prediction["kind"] == "linear":
        return np.float32(prediction["x"]) * x + np.float32(prediction["out"]) * out
    return (x - out) / np.maximum(np.float32(t), np.float32(prediction["t_min"]))


def advance(
    velocity: Callable[[np.ndarray, np.float32, int], np.ndarray],
    x: np.ndarray,
    t: np.float32,
    s: np.float32,
    rule: str,
    noise: np.ndarray | None = None,
) -> np.ndarray:
    """One step from time t to time s. `velocity(x, time, end)` is asked at t, where end is 0, and at s, where it is 1.

    euler:    x_s = x_t + (s - t) v(x_t, t)
    heun:     y   = x_t + (s - t) v(x_t, t),   x_s = x_t + (s - t) (v(x_t, t) + v(y, s)) / 2
    renoise:  x_0 = x_t - t v(x_t, t),         x_s = (1 - s) x_0 + s noise,   noise fresh; none at s = 0
    """
    h = np.float32(s - t)
    v = velocity(x, t, 0)
    if rule == "renoise":
        x_0 = x - np.float32(t) * v
        return x_0 if noise is None else (1 - np.float32(s)) * x_0 + np.float32(s) * noise
    if rule == "heun":
        v = (v + velocity(x + h * v, s, 1)) / np.float32(2)
    return x + h * v


def decode(latents: np.ndarray, codec: Mapping[str, Any]) -> np.ndarray:
    """Latents `[..., h, w, c]` to images `uint8 [..., H, W, 3]`, by a codec that is no network."""
    return grey_levels(CODECS[codec["kind"]](latents.astype(np.float32), codec))


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] to the nearest of 0..255, those outside clipped."""
    return np.round(np.clip(pixels * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    """`||value - reference|| / ||reference||`; 0 where both are zero, infinite where only the reference is.

    Infinite, too, where either holds NaN or infinity: `max()` drops NaN, and no limit is below it.
    """
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return float("inf")
    difference = np.linalg.norm(np.asarray(value, np.float64) - reference)
    norm = np.linalg.norm(np.asarray(reference, np.float64))
    return float(difference / norm) if norm else (float("inf") if difference else 0.0)


def _identity(latents: np.ndarray, codec: Mapping[str, Any]) -> np.ndarray:
    """Latents are normalised pixels."""
    return latents / np.float32(codec["scale"]) + np.float32(codec["shift"])


def _patch(latents: np.ndarray, codec: Mapping[str, Any]) -> np.ndarray:
    """Latents are the orthonormal DCT-II of p x p patches; channel = (vertical * p + horizontal) * 3 + colour."""
    p, (*lead, h, w, _) = codec["patch"], latents.shape
    frequency, position = np.mgrid[:p, :p]
    dct = np.sqrt(2 / p) * np.cos(np.pi * (position + 0.5) * frequency / p)
    dct[0] /= np.sqrt(2)
    gain = codec["scale"] * np.reshape(codec["frequency_scale"], (p, p, 1))
    coefficients = latents.reshape(*lead, h, w, p, p, 3) / gain.astype(np.float32)
    # [..., h, w, vertical, horizontal, colour] -> [..., h, row in patch, w, column in patch, colour]
    pixels = np.einsum("...hwklc,kr,ls->...hrwsc", coefficients, dct.astype(np.float32), dct.astype(np.float32))
    return pixels.reshape(*lead, h * p, w * p, 3) + np.float32(codec["shift"])


CODECS = {"identity": _identity, "patch": _patch}


def time_input(step: Step, t: np.float32, position: int) -> Arrays:
    """{"time": what the denoiser is told at a time of the grid}; {} where it is told nothing."""
    if step.time is None:
        return {}
    if step.time["kind"] == "values":
        return {"time": np.asarray([step.time["values"]], np.float32)}
    if step.time["kind"] == "index":
        index = position if step.native is None else int(step.native)
        return {"time": np.eye(1, step.time["size"], index, dtype=np.float32)}
    return {"time": time_features(np.full(1, t if step.native is None else step.native), step.time)}


def with_options(
    flow: Flow,
    steps: int | None = None,
    guidance: Any = None,
    method: str | None = None,
    guidance_interval: Sequence[float] | None = None,
    **others: Any,
) -> Flow:
    """The flow with another number of steps, another guidance or rule; None leaves what is.

    The guidance is that of all steps, or of those that have one where only some do; the interval of times is that of
    all steps.

    Raises:
        ValueError: the program does not allow it, or there is no such thing.
    """
    if others:
        raise ValueError(
            f"a bundle has no option {', '.join(others)}; it takes steps, guidance, method, guidance_interval"
        )
    intervals, made = len(flow.times) - 1, list(flow.steps)
    if method is not None and {step.rule for step in made[:intervals]} != {method}:
        if method not in RULES:
            raise ValueError(f"unknown sampling method {method!r}; expected one of {', '.join(RULES)}")
        if not flow.alike:
            raise ValueError("the steps of this bundle differ, and so their method is fixed; leave out `method`")
        made = [dataclasses.replace(step, rule=method) for step in made]
    if guidance is not None:
        scale = np.asarray(guidance, np.float32)
        if other := {step.guidance.shape for step in made if step.guidance.shape != scale.shape}:
            raise ValueError(f"the guidance of this bundle has the shape {other.pop()}; got {scale.shape}")
        every = not any(step.guided for step in made)
        made = [dataclasses.replace(step, guidance=scale) if step.guided or every else step for step in made]
    if guidance_interval is not None:
        if np.shape(guidance_interval) != (2,):
            raise ValueError(f"guidance_interval is {guidance_interval}; give two times, T_LOW,T_HIGH")
        low, high = map(float, guidance_interval)
        made = [dataclasses.replace(step, guidance_interval=(low, high)) for step in made]
    times = flow.times
    if steps is not None and steps != intervals:
        if steps < 1:
            raise ValueError(f"a sample needs at least one step, got {steps}")
        if flow.shift is None:
            raise ValueError(f"this bundle takes {intervals} steps and no other number; leave out `steps`")
        t = np.linspace(1.0, 0.0, steps + 1)
        times = (flow.shift * t / (1 + (flow.shift - 1) * t)).astype(np.float32)
        made = made[:1] * (steps + 1)
    return dataclasses.replace(flow, times=times, steps=tuple(made)).checked()


# --- the calls -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A program over its units, wherever they run: LiteRT interpreters in a client, JAX while exporting.

    Attributes:
        program: what program.json says.
        units: {unit name: function}.
        shapes: {unit name: {input name: its shape in the file}}.
    """

    program: Flow | FeedForward
    units: Mapping[str, Unit]
    shapes: Mapping[str, Mapping[str, Sequence[int]]]
    _null: Contexts = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)

    def run(
        self,
        inputs: Mapping[str, Any],
        noise: np.ndarray | None = None,
        *,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Arrays:
        """The outputs of one example from the caller's named inputs; a flow also takes noise of `noise_shape`.

        `options`, of a flow alone, are those of `with_options`.
        """
        given = self.given(inputs)
        if isinstance(self.program, FeedForward):
            if options:
                raise ValueError(f"this bundle is one call, without {', '.join(options)}")
            return self._outputs(self.call(self.program.unit, given))
        if noise is None:
            raise ValueError(f"this bundle needs noise of shape {self.program.noise_shape()}")
        flow = with_options(self.program, **options)
        contexts = self.contexts(given)
        null = self.null_contexts(given) if any(step.guided for step in flow.steps) else {}
        return self.decode(self.trajectory(noise, contexts, null, on_step=on_step, **options)[-1])

    def given(self, inputs: Mapping[str, Any]) -> Arrays:
        """The caller's arrays as units take them. Raises `ValueError` that names what is missing or does not fit."""
        known = self.program.inputs
        if set(inputs) != set(known):
            raise ValueError(f"the inputs are {', '.join(known) or 'none'}; got {', '.join(inputs) or 'none'}")
        return {name: array.of(inputs[name]) for name, array in known.items()}

    def call(self, unit: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Runs a unit with those of `arrays` that it takes."""
        return dict(self.units[unit](**self.take(unit, arrays)))

    def take(self, unit: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Those of `arrays` that a unit takes, each with an axis of 1 before it where the file has one."""
        taken = {}
        for name, shape in self.shapes[unit].items():
            if name not in arrays:
                raise BundleError(f"the unit {unit!r} needs {name}; there is only {', '.join(arrays)}")
            array = arrays[name]
            if tuple(shape) not in (array.shape, (1, *array.shape)):
                raise BundleError(f"the unit {unit!r} takes {name} of shape {tuple(shape)}; got {array.shape}")
            taken[name] = array.reshape(shape)
        return taken

    def contexts(self, given: Arrays) -> Contexts:
        """All contexts of one example, from its inputs."""
        return self._contexts(given, null=False)

    def _contexts(self, given: Arrays, *, null: bool) -> Contexts:
        flow = self._flow()
        made: Contexts = {None: given}
        for name, units in flow.contexts.items():
            made[name] = dict(given)
            if null and name in flow.null_contexts:
                made[name] |= {n: array.null_of(np.zeros(()))[None] for n, array in flow.null_contexts[name].items()}
                continue
            for unit in units:
                made[name] |= self.call(unit, made[name])
        return made

    def null_contexts(self, given: Arrays) -> Contexts:
        """The contexts of the null calls; made once, unless they hold something of the caller's own."""
        if self._null:
            return self._null
        arrays = {name: array for name, array in self.program.inputs.items() if array.null is not None}
        made = self._contexts({name: array.null_of(given[name]) for name, array in arrays.items()}, null=True)
        if not any(array.keeps for array in self.program.inputs.values()):
            self._null.update(made)
        return made

    def trajectory(
        self,
        noise: np.ndarray,
        contexts: Contexts,
        null: Contexts,
        *,
        on_step: OnStep | None = None,
        on_call: OnCall | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The latent after each step, `[S, *latent_shape]` float32.

        Args:
            noise: `noise_shape` float32, standard normal.
            contexts, null: of `contexts` and `null_contexts`; the second may be {} where guidance makes no call.
            on_step, on_call: see `OnStep` and `OnCall`.
            options: see `run`.
        """
        flow = with_options(self._flow(), **options)
        noise, expected = np.asarray(noise, np.float32), flow.noise_shape()
        if noise.shape != expected:
            raise ValueError(f"the noise has shape {noise.shape}; these steps take {expected}")
        states = flow.initial_state(), flow.initial_state()

        def ask(i: int, x: np.ndarray, t: np.float32, context: Contexts, state: Arrays) -> tuple[Arrays, np.ndarray]:
            step = flow.steps[i]
            latent = x if step.scale == 1 else np.float32(step.scale) * x
            named = {**context[step.context], **state, **step.arrays, "latent": latent, **time_input(step, t, i)}
            out = self.call(step.unit, named)
            _rewrite(state, out)
            return named, out["prediction"].reshape(x.shape)

        def velocity(i: int, x: np.ndarray, t: np.float32) -> np.ndarray:
            step = flow.steps[i]
            guided = step.guided_at(t)
            named, out = ask(i, x, t, contexts, states[0])
            null_out = None
            if guided or (step.guided and flow.state):  # a state of the null calls goes on at all times
                _, null_out = ask(i, x, t, null, states[1])
            if on_call is not None:
                on_call(named, out, null_out)
            v = as_velocity(out, x, t, step.prediction)
            if not guided or null_out is None:
                return v
            v_null = as_velocity(null_out, x, t, step.prediction)
            return v_null + step.guidance * (v - v_null)

        first, later = (noise[0], noise[1:]) if expected != flow.latent_shape else (noise, noise[:0])
        x = first if flow.initial_scale == 1 else np.float32(flow.initial_scale) * first
        latents = []
        for i, (t, s) in enumerate(zip(flow.times, flow.times[1:], strict=False)):
            fresh = later[i] if i < len(later) else None
            x = advance(lambda x, time, end, i=i: velocity(i + end, x, time), x, t, s, flow.steps[i].rule, fresh)
            latents.append(x)
            if on_step is not None:
                on_step(i, x)
        return np.stack(latents)

    def decode(self, latent: np.ndarray) -> Arrays:
        """The outputs of a latent."""
        flow, latent = self._flow(), latent.astype(np.float32)
        if flow.decoder is None:
            return {"latent": latent}
        if flow.decoder["kind"] != "network":
            return {"image": decode(latent, flow.decoder)}
        unit, chunk = flow.decoder["unit"], flow.decoder.get("chunk")
        pieces = [latent] if chunk is None else np.split(latent, len(latent) // chunk)
        state, made = flow.initial_state(), []
        for piece in pieces:
            made.append(self.call(unit, {**state, "latent": piece}))
            _rewrite(state, made[-1])
        if chunk is None:
            return self._outputs(made[0])
        return self._outputs({name: np.concatenate([out[name] for out in made]) for name in flow.outputs})

    def _outputs(self, out: Arrays) -> Arrays:
        """What a unit gave, as the caller gets it."""
        shaped = {name: out[name].reshape(array.shape) for name, array in self.program.outputs.items()}
        pictures = {name for name, array in self.program.outputs.items() if array.dtype == "uint8"}
        return {name: grey_levels(array) if name in pictures else array for name, array in shaped.items()}

    def _flow(self) -> Flow:
        if not isinstance(self.program, Flow):
            raise ValueError("this bundle is one call of one unit: it has no latents; use `run`")
        return self.program


def _rewrite(state: Arrays, out: Arrays) -> None:
    """Puts in what a unit gave under the names of the state."""
    state.update({name: out[name].reshape(state[name].shape) for name in state.keys() & out.keys()})
