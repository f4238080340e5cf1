"""What program.json says: the calls that make one example, as plain data.

This file is copied into every bundle, beside sampler.py, which does what it says. program.json, schema 3 (arithmetic is
float32; arrays are channels last and of one example; the client adds an axis of 1 where the file of a unit has one):

    schema          3
    kind            "flow" or "feed_forward"
    inputs          {name: {"shape", "dtype", "null"}}: what the caller gives. "uint8" is a picture, which the client
                    turns into x / 127.5 - 1. "null", optional, is what guidance leads away from: a number, an array, or
                    "keep" for the caller's own
    outputs         {name: {"shape", "dtype"}}: what comes out. "uint8": the unit gives pixels, about -1..1, which the
                    client rounds to grey levels
    tokenizers      optional [{"file", "tokens": input, "begin", "end", "pad"}]: what makes ids of a prompt, each by its
                    file. The input is `begin`, the ids, `end`, and `pad` up to its length; see `tokenize`. "mask",
                    optional, is an input that is 1 up to `end`. "kind", optional, names the file's model, as "BPE"

Kind "feed_forward" has one more:

    unit            the one file; it takes `inputs` and gives `outputs`

Kind "flow": x_t = (1 - t) x_0 + t noise, and the sampler follows v = dx/dt.

    latent_shape    of x: [h, w, c]; [f, h, w, c] for a clip
    times           [S + 1] t, as a rule from 1 (noise) down to 0 (data)
    initial_scale   optional: x at times[0] is this times the noise; 1
    shift           optional: s of t' = s t / (1 + (s - 1) t), which makes a grid of another number of steps. Without it
                    there is no other grid
    step            what holds at each of `times`:
        unit        the denoiser. It takes "latent", "time", and what else it names among context and state; it gives
                    "prediction"
        rule        "euler", "heun" or "renoise", of the interval that begins here, see `advance`
        time        optional, what the input "time" is: {"kind": "features", "dim", "scale", "max_period",
                    "order": "cos,sin"}, see `time_features`; {"kind": "index", "size"}: a row of so many zeros with a 1
                    at the position in `times` (a GPU looks nothing up in a table); {"kind": "values", "values": [n]}
        native      optional: the time that features and index are made of, in place of t and the position
        arrays      optional {name: numbers}: further inputs of the denoiser, the same for every example
        scale       optional: the input "latent" is this times x; 1
        prediction  {"kind": "velocity"}: v itself. {"kind": "x_0", "t_min"}: v = (x - out) / max(t, t_min).
                    {"kind": "linear", "x": a, "out": b}: v = a x + b out
        context     optional: a name in `contexts`; the caller's inputs alone without it
        guidance    w of v = v_null + w (v - v_null), a number or an array that broadcasts to x (one w a channel, or a
                    frame). There is no null call where w is 1 throughout
        guidance_interval  optional [t_low, t_high]: at other times there is no guidance, and no null call but for its
                    state; all times
    steps           optional [S] or [S + 1]: what differs from `step` at each time. The last is asked by "heun" alone
    contexts        optional {name: [unit, ...]}: encoders, called in this order before the first step. Each takes what
                    it names among the inputs and earlier outputs. All that there is then is the context
    null_contexts   optional {context: {name: {"shape", "dtype", "null"}}}: what the null calls are given in place of
                    what the encoders of that context make; these are not called for them then
    state           optional {name: {"shape", "dtype", "initial": "zeros"}}: a unit's input of that name is given it,
                    its output of that name rewrites it. The null calls and the decoder each have a state of their own
    decoder         null: the output is {"latent": x}. {"kind": "identity" | "patch", ...}: see `decode`.
                    {"kind": "network", "unit", "chunk"}: a unit that takes "latent" and gives `outputs`; with "chunk",
                    optional, it is called with so many of the first axis at a time, and the results are joined
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

SCHEMA = 3
RULES = ("euler", "heun", "renoise")
DTYPES = ("float32", "int32", "uint8")
PREDICTIONS = {"velocity": (), "x_0": ("t_min",), "linear": ("x", "out")}
TIMES = {"features": ("dim", "scale", "max_period", "order"), "index": ("size",), "values": ("values",)}
DECODERS = ("identity", "patch", "network")
NEEDED, OPTIONAL = (
    ("unit", "rule", "prediction", "guidance"),
    ("time", "native", "arrays", "scale", "context", "guidance_interval"),
)
RESERVED = ("latent", "time", "prediction")


class BundleError(ValueError):
    """The folder is not a bundle that this client can run, or not the one that was written."""


@dataclasses.dataclass(frozen=True)
class Array:
    """A named array of one example: `null` is None where it has none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    null: Any = None

    @classmethod
    def read(cls, where: str, entries: Mapping[str, Any], optional: Sequence[str] = ()) -> dict[str, Array]:
        """The arrays of one section of program.json, by name."""
        found = {}
        for name, entry in entries.items():
            _known(f"{where}.{name}", entry, ("shape", "dtype"), optional)
            _one_of(f"{where}.{name}: dtype", entry["dtype"], DTYPES)
            found[name] = cls(name, tuple(entry["shape"]), entry["dtype"], entry.get("null"))
            if found[name].null is not None and not found[name].keeps:
                found[name].null_of(np.zeros(()))
        return found

    @property
    def keeps(self) -> bool:
        """Whether the null calls are given the caller's own array."""
        return isinstance(self.null, str) and self.null == "keep"

    def of(self, value: Any) -> np.ndarray:
        """The caller's array as units take it. Raises `ValueError` where shape or dtype is another."""
        array = np.asarray(value)
        kinds = {"uint8": np.uint8, "int32": np.integer, "float32": np.floating}
        if array.shape != self.shape or not np.issubdtype(array.dtype, kinds[self.dtype]):
            raise ValueError(f"the input {self.name!r} is {self.dtype} {self.shape}; got {array.dtype} {array.shape}")
        if self.dtype == "uint8":
            return array.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return array.astype(self.dtype)

    def null_of(self, own: np.ndarray) -> np.ndarray:
        """What takes the place of the caller's own array, as units take it, in the null calls."""
        if self.keeps:
            return own
        try:
            return self.of(np.broadcast_to(np.asarray(self.null, self.dtype), self.shape))
        except (TypeError, ValueError) as error:
            _refuse(f"inputs.{self.name}: the null {self.null!r} is neither 'keep' nor fits {self.shape}", error)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What makes the ids of one input, and how they stand in it."""

    file: str
    tokens: str
    begin: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    mask: str | None = None
    kind: str = ""

    @classmethod
    def read(cls, where: str, entry: Any, inputs: Mapping[str, Array]) -> Tokenizer:
        """Checks one entry against the inputs."""
        _known(where, entry, ("file", "tokens", "begin", "end", "pad"), ("mask", "kind"))
        found = cls(**{**entry, "begin": tuple(entry["begin"]), "end": tuple(entry["end"])})
        for name, dtype in ((found.tokens, "int32"), *([(found.mask, "float32")] if found.mask else [])):
            if name not in inputs or inputs[name].dtype != dtype or len(inputs[name].shape) != 1:
                _refuse(f"{where} makes {name!r}, which is no input of {dtype} [L]")
        (length,) = inputs[found.tokens].shape
        if found.mask and inputs[found.mask].shape != (length,):
            _refuse(f"{where}: {found.tokens!r} has {length} tokens and {found.mask!r} {inputs[found.mask].shape[0]}")
        if len(found.begin) + len(found.end) >= length:
            _refuse(f"{where}: between {found.begin} and {found.end} no token fits into {length}")
        return found


@dataclasses.dataclass(frozen=True)
class Step:
    """How the denoiser is asked at one time, and what follows."""

    unit: str
    rule: str
    prediction: Mapping[str, Any]
    guidance: np.ndarray
    time: Mapping[str, Any] | None = None
    native: float | None = None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scale: float = 1.0
    context: str | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def read(cls, where: str, entry: Mapping[str, Any]) -> Step:
        """Checks what can be checked of one step by itself."""
        _known(where, entry, NEEDED, OPTIONAL)
        _one_of(f"{where}: rule", entry["rule"], RULES)
        _kind(f"{where}: prediction", entry["prediction"], PREDICTIONS)
        if (time := entry.get("time")) is not None:
            _kind(f"{where}: time", time, TIMES)
            if time.get("order", "cos,sin") != "cos,sin":
                _refuse(f"{where}: time features in the order {time['order']!r}; 'cos,sin'")
        made: dict[str, Any] = {"guidance": _numbers(f"{where}: guidance", entry["guidance"])}
        made["arrays"] = {
            name: _numbers(f"{where}: arrays.{name}", value) for name, value in entry.get("arrays", {}).items()
        }
        if "guidance_interval" in entry:
            interval = _numbers(f"{where}: guidance_interval", entry["guidance_interval"])
            if interval.shape != (2,):
                _refuse(f"{where}: guidance_interval is {entry['guidance_interval']}; two times")
            made["guidance_interval"] = tuple(interval.tolist())
        return cls(**{**entry, **made})

    @property
    def guided(self) -> bool:
        """Whether it is guided at some time."""
        return bool((self.guidance != 1).any())

    def guided_at(self, t: np.float32) -> bool:
        """Whether a call at time t is guided."""
        low, high = np.asarray(self.guidance_interval, np.float32)
        return self.guided and bool(low <= t <= high)


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """One call of one unit."""

    unit: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    tokenizers: tuple[Tokenizer, ...] = ()

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> FeedForward:
        _known("", data, ("schema", "kind", "unit", "inputs", "outputs"), ("tokenizers",))
        return cls(data["unit"], *_ends(data))

    def units(self) -> set[str]:
        """The names of all units that are called."""
        return {self.unit}


@dataclasses.dataclass(frozen=True)
class Flow:
    """The fields of a program of the kind "flow", checked; `steps` are whole, and `alike` where the file has none."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    tokenizers: tuple[Tokenizer, ...]
    latent_shape: tuple[int, ...]
    times: np.ndarray
    initial_scale: float
    shift: float | None
    steps: tuple[Step, ...]
    alike: bool
    contexts: Mapping[str, Sequence[str]]
    null_contexts: Mapping[str, Mapping[str, Array]]
    state: Mapping[str, Array]
    decoder: Mapping[str, Any] | None

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Flow:
        needed = ("schema", "kind", "inputs", "outputs", "latent_shape", "times", "step", "decoder")
        optional = ("tokenizers", "initial_scale", "shift", "steps", "contexts", "null_contexts", "state")
        _known("", data, needed, optional)
        inputs, outputs, tokenizers = _ends(data)
        times = np.asarray(data["times"], np.float32)
        if len(times) < 2:
            _refuse("`times` needs two entries at least")
        differ = data.get("steps")
        if differ is not None and len(differ) not in (len(times) - 1, len(times)):
            _refuse(f"{len(times)} times need {len(times) - 1} steps, or one more; got {len(differ)}")
        where = "step" if differ is None else "steps[{}]"
        steps = []
        for i, entry in enumerate([{}] * len(times) if differ is None else differ):
            for name, part in (("step", data["step"]), (f"steps[{i}]", entry)):
                _known(name, part, (), (*NEEDED, *OPTIONAL))
            steps.append(Step.read(where.format(i), {**data["step"], **entry}))
        state = Array.read("state", data.get("state", {}), ("initial",))
        for name, entry in data.get("state", {}).items():
            _one_of(f"state.{name}: initial", entry.get("initial"), ("zeros",))
            _one_of(f"state.{name}: dtype", entry["dtype"], ("float32",))
            if name in inputs or name in RESERVED:
                _refuse(f"the state {name!r} has the name of an input; give it another")
        contexts, nulls = data.get("contexts", {}), data.get("null_contexts", {})
        if unknown := [name for name in nulls if name not in contexts]:
            _refuse(f"null_contexts has {unknown[0]!r}; the contexts are {list(contexts)}")
        nulls = {name: Array.read(f"null_contexts.{name}", arrays, ("null",)) for name, arrays in nulls.items()}
        for name, arrays in nulls.items():
            if without := [array.name for array in arrays.values() if array.null is None or array.keeps]:
                _refuse(f"null_contexts.{name}.{without[0]} needs a `null`, a number or an array")
        flow = cls(
            inputs, outputs, tokenizers, tuple(data["latent_shape"]), times, float(data.get("initial_scale", 1.0)),
            data.get("shift"), tuple(steps), differ is None, contexts, nulls, state, data["decoder"],
        )  # fmt: skip
        flow._check_decoder()
        return flow.checked()

    def units(self) -> set[str]:
        """The names of all units that are called."""
        decoder = {self.decoder["unit"]} if self.decoder and self.decoder["kind"] == "network" else set()
        return {step.unit for step in self.steps} | self.encoders() | decoder

    def encoders(self) -> set[str]:
        """The names of the units that make contexts."""
        return {unit for units in self.contexts.values() for unit in units}

    def noise_shape(self) -> tuple[int, ...]:
        """Of the noise of one example: that of x; `[S, ...]`, what is begun with and then mixed in before each further
        step, where a step renoises."""
        intervals = len(self.times) - 1
        renoises = any(step.rule == "renoise" for step in self.steps[:intervals])
        return (intervals, *self.latent_shape) if renoises else self.latent_shape

    def initial_state(self) -> dict[str, np.ndarray]:
        """The state before the first call."""
        return {name: np.zeros(array.shape, array.dtype) for name, array in self.state.items()}

    def checked(self) -> Flow:
        """Itself. Raises `BundleError` that names what does not fit together."""
        last = self.steps[len(self.times) - 2]
        if last.rule == "heun" and len(self.steps) < len(self.times):
            _refuse("the last rule is 'heun', which asks at the last time: add an entry to steps")
        if last.rule == "renoise" and self.times[-1] != 0:
            _refuse(f"the last rule is 'renoise', which ends at time 0, not {self.times[-1]}")
        if self.shift is not None and not (self.alike and _free(self.steps[0])):
            _refuse("`shift` offers other grids, but the steps are made for this one; leave it out")
        for step in self.steps:
            if step.context is not None and step.context not in self.contexts:
                _refuse(f"a step has the context {step.context!r}; there are {list(self.contexts)}")
            if len(step.guidance.shape) > len(self.latent_shape) or any(
                n not in (1, size) for n, size in zip(step.guidance.shape[::-1], self.latent_shape[::-1], strict=False)
            ):
                _refuse(f"guidance {step.guidance.shape} does not fit x, {self.latent_shape}")
            low, high = step.guidance_interval
            if not 0 <= low <= high <= 1:
                _refuse(f"guidance_interval is {[low, high]}; two times from 0 to 1, the lower one first")
            fixed = step.context in self.null_contexts
            without = [name for name, array in self.inputs.items() if array.null is None]
            if step.guided and without and not fixed:
                _refuse(f"guidance needs the `null` of the inputs {', '.join(without)}")
        asked = list(zip(self.steps, self.times[:-1], strict=False))
        if any(step.guided for step, _ in asked) and not any(step.guided_at(t) for step, t in asked):
            _refuse(f"guidance_interval holds none of the times {', '.join(f'{t:.3g}' for t in self.times[:-1])}")
        return self

    def _check_decoder(self) -> None:
        decoder, outputs = self.decoder, self.outputs
        if decoder is None:
            expected = {"latent": ("float32", self.latent_shape)}
            if {name: (array.dtype, array.shape) for name, array in outputs.items()} != expected:
                _refuse(f"without a decoder the outputs are {expected}; got {list(outputs)}")
            return
        _one_of("decoder", decoder.get("kind"), DECODERS)
        if decoder["kind"] != "network":
            if list(outputs) != ["image"]:
                _refuse(f"a decoder without a unit gives 'image'; outputs are {list(outputs)}")
        elif "unit" not in decoder:
            _refuse("the decoder is a network, and names no `unit`")
        elif (chunk := decoder.get("chunk")) is not None and (chunk < 1 or self.latent_shape[0] % chunk):
            _refuse(f"the decoder's chunk {chunk} does not divide {self.latent_shape[0]}")


Program = Flow | FeedForward


def parse(data: Mapping[str, Any]) -> Program:
    """Reads the contents of program.json. Raises `BundleError` that names what is missing or unknown."""
    kinds: dict[str, Callable[[Mapping[str, Any]], Program]] = {"flow": Flow.read, "feed_forward": FeedForward.read}
    _one_of("schema", data.get("schema"), (SCHEMA,))
    _one_of("kind", data.get("kind"), kinds)
    return kinds[data["kind"]](data)


def _ends(data: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array], tuple[Tokenizer, ...]]:
    """Inputs, outputs and tokenizers."""
    inputs, outputs = Array.read("inputs", data["inputs"], ("null",)), Array.read("outputs", data["outputs"])
    if taken := [name for name in inputs if name in RESERVED]:
        _refuse(f"the input {taken[0]!r} has the name of what the sampler gives; rename it")
    entries = enumerate(data.get("tokenizers", ()))
    return inputs, outputs, tuple(Tokenizer.read(f"tokenizers[{i}]", entry, inputs) for i, entry in entries)


def _refuse(why: str, cause: Exception | None = None) -> NoReturn:
    raise BundleError(f"program.json: {why}") from cause


def _numbers(what: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        _refuse(f"{what} is {value!r}; numbers were expected", error)


def _free(step: Step) -> bool:
    """Whether a step can be taken at any time."""
    kind = None if step.time is None else step.time["kind"]
    return kind in (None, "features") and step.native is None


def _known(where: str, entry: Any, needed: Sequence[str], optional: Sequence[str] = ()) -> None:
    where = f"program.json: {where}" if where else "program.json"
    if not isinstance(entry, Mapping):
        raise BundleError(f"{where} is {entry!r}; an object was expected")
    if missing := [name for name in needed if name not in entry]:
        raise BundleError(f"{where} lacks {', '.join(missing)}")
    if unknown := [name for name in entry if name not in (*needed, *optional)]:
        raise BundleError(f"{where} has {', '.join(unknown)}; this client knows {', '.join((*needed, *optional))}")


def _one_of(what: str, value: Any, known: Iterable[Any]) -> None:
    if value not in (known := tuple(known)):
        _refuse(f"{what} is {value!r}; this client knows {', '.join(map(str, known))}")


def _kind(what: str, entry: Any, kinds: Mapping[str, Sequence[str]]) -> None:
    """Checks a mapping whose "kind" says which other keys it has."""
    kind: Any = entry["kind"] if isinstance(entry, Mapping) and "kind" in entry else entry
    _one_of(what, kind, kinds)
    _known(what, entry, ("kind", *kinds[kind]))
