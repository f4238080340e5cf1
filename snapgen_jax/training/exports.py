"""What leaves a recipe for a phone: functions to convert, the program that calls them, and golden inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Tree = Any


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight whose values are `scale * integers`, as quantisation-aware training leaves it.

    Attributes:
        integers: any integer dtype, in the shape of the weight.
        scale: float32; its shape broadcasts to that of the weight.
        bits: b; the integers lie in -2^(b-1) .. 2^(b-1), both ends included (Sui et al. 2024, "BitsFusion").
    """

    integers: np.ndarray
    scale: np.ndarray
    bits: int


@dataclasses.dataclass(frozen=True)
class Branches:
    """A function of which some modules run only where it decides so, and else are replaced by inputs of their names.

    Called, it branches by `lax.cond`. In a file each module is the branch of an IF, which only a CPU runs: several
    `lax.cond` in one function convert to a file that TFLite does not load.

    Attributes:
        names: of the modules, in the order in which they run. `inputs[name]` is what a module may be replaced by.
        decide: `decide(name, weights, values, inputs) -> (run, entering)`: whether a module runs, a bool scalar, and
            what enters it; `values` are the outputs of all modules before, or what replaced them.
        module: `module(name, weights, entering) -> output`.
        finish: `finish(weights, values, inputs) -> {name: array}`.
    """

    names: tuple[str, ...]
    decide: Callable[..., tuple[Any, Any]]
    module: Callable[..., Any]
    finish: Callable[..., dict[str, Any]]

    def __call__(self, weights: Tree, **inputs: Any) -> dict[str, jax.Array]:
        """`finish` of what runs, in JAX."""

        def choose(run: jax.Array, name: str, entering: jax.Array) -> jax.Array:
            return jax.lax.cond(run, lambda: self.module(name, weights, entering), lambda: inputs[name])

        return self.composed(
            lambda name, values: self.decide(name, weights, values, inputs),
            choose,
            lambda values: self.finish(weights, values, inputs),
        )

    def composed(self, decide: Callable[..., Any], choose: Callable[..., Any], finish: Callable[..., Any]) -> Any:
        """The order of the calls, whatever makes them."""
        values: dict[str, Any] = {}
        for name in self.names:
            run, entering = decide(name, dict(values))
            values[name] = choose(run, name, entering)
        return finish(values)


@dataclasses.dataclass(frozen=True)
class ExportUnit:
    """One function that becomes a signature of a `.tflite` file.

    Attributes:
        name: signature name, and stem of the file, "unet": lower-case letters, digits and underscores.
        function: `function(weights, **inputs) -> {name: array}`, pure, static shapes, float32 and int32 only. `weights`
            is `{role: parameters}` of `roles`. `Branches` where parts of it run or not.
        roles: which of `recipe.weights(params, frozen)` it needs.
        inputs: named input shapes. The batch is 1; a clip has its frames in the place of the batch.
        storage: `{path: Stored}`, path being "role/module/kernel": weights that take few values; or a function that
            finds them in all of `recipe.weights(params, frozen)`. See `stored`. The exporter checks that they are those
            values, and the manifest lists them. The float32 file holds them as floats all the same, that of eight bits
            as they are.
        part: `part(weights)`: what `function` reads of its roles, where that is less than all of them, such as some
            layers of an encoder that is split.
        file: the stem of the file, where several units are signatures of one. They have the same roles and part, and
            the file holds those weights once. "" for a file of its own.
    """

    name: str
    function: Callable[..., dict[str, jax.Array]]
    roles: tuple[str, ...]
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    storage: Mapping[str, Stored] | Callable[[Mapping[str, Tree]], Mapping[str, Stored]] = dataclasses.field(
        default_factory=dict
    )
    part: Callable[[Mapping[str, Tree]], dict[str, Tree]] | None = None
    file: str = ""

    @property
    def stem(self) -> str:
        """Of its file."""
        return self.file or self.name

    @property
    def branches(self) -> bool:
        """Whether parts of it run or not, so that only a CPU runs it."""
        return isinstance(self.function, Branches)

    def stored(self, weights: Mapping[str, Tree]) -> dict[str, Stored]:
        """`{path: Stored}` of its weights that take few values; `weights` are those of `recipe.weights`."""
        return dict(self.storage(weights) if callable(self.storage) else self.storage)

    def select(self, weights: Mapping[str, Tree]) -> dict[str, Tree]:
        """The weights that `function` takes.

        Raises:
            ValueError: a role is not among the weights.
        """
        if missing := [role for role in self.roles if role not in weights]:
            raise ValueError(
                f"the export unit {self.name!r} needs the weights {', '.join(missing)}; the recipe has "
                f"{', '.join(sorted(weights))}. Load them among the frozen networks, or change the unit's roles"
            )
        held = {role: weights[role] for role in self.roles}
        return held if self.part is None else self.part(held)


@dataclasses.dataclass(frozen=True)
class GoldenInputs:
    """What the golden examples of a bundle begin with.

    Attributes:
        prompts: become token ids by the bundle's tokenizer, for a program that has one.
        arrays: `{input of the program: [N, ...]}`, for inputs that no tokenizer makes.
        seed: example i begins with the noise of (seed, i).
        examples: how many, where there are neither prompts nor arrays to say it.
    """

    prompts: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seed: int = 0
    examples: int = 2


@dataclasses.dataclass(frozen=True)
class InputsExport:
    """What a kind of example brings to a plan.

    Attributes:
        encoders: the units that make what the denoiser attends to, in the order of their calls.
        null: `{input of the program: array of one example}`, those of the empty condition; shape and dtype alone count
            where there is a `null_context`.
        codec: `Codec.describe()`, how latents become pictures; None leaves latents to the caller.
        decoder: the unit that decodes, where the codec is a network.
        tokenizers: the program's `tokenizers`, see `export/program.py`; empty where it reads no text. An entry without
            "begin" is framed as its file says.
        null_context: `{array that the denoiser attends to: its value}` in the calls without a condition, where no
            encoder makes it.
        context: ShapeDtypeStructs `[1, ...]` of what the denoiser attends to; None where `Inputs.condition` makes it of
            `null`.
        golden: `{input of the program: [N, ...]}` that the golden examples take, of inputs that no tokenizer makes.
    """

    encoders: Sequence[ExportUnit]
    null: Mapping[str, np.ndarray]
    codec: Mapping[str, Any] | None
    decoder: ExportUnit | None = None
    tokenizers: Sequence[Mapping[str, Any]] = ()
    null_context: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    context: Any = None
    golden: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """All that a client needs to run a recipe's generator away from JAX.

    Attributes:
        units: the functions to convert.
        program: how to call them, as plain JSON-able data. `export/program.py` describes it at its top.
        golden: what the bundle's golden examples begin with.
    """

    units: Sequence[ExportUnit]
    program: Mapping[str, Any]
    golden: GoldenInputs = GoldenInputs()
