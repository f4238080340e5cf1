"""What recipes and the loop know about evaluation: names, cadence and results. Imports nothing of ours
but the bounds of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from snapgen_jax.bounds import at_least, check


@dataclasses.dataclass(frozen=True)
class EvaluatorSpec:
    """A recipe's request for one evaluator.

    Attributes:
        name: the evaluator's name in `snapgen_jax.evaluation.registry`.
        every_steps: cadence in steps; 0 means only at the end.
        at_end: whether it also runs after the last step.
        function: a function of the recipe that the evaluator calls, where it needs one; as a rule a pure
            `function(params, frozen, batch, key) -> {name: array}`.
        options: further keyword arguments of the evaluator.
    """

    name: str
    every_steps: int = 0
    at_end: bool = True
    function: Callable[..., dict[str, Any]] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When to evaluate, and what.

    Attributes:
        every_steps: cadence of `during`; 0 means only at the end.
        during: evaluators run while training.
        final: evaluators run once after the last step.
    """

    every_steps: int = 1000
    during: tuple[str, ...] = ("validation_loss", "sample_grid")
    final: tuple[str, ...] = ("validation_loss", "sample_grid")

    def __post_init__(self) -> None:
        check(self, every_steps=at_least(0))

    @property
    def names(self) -> tuple[str, ...]:
        """All that are named, each once."""
        return tuple(dict.fromkeys((*self.during, *self.final)))

    def spec(self, name: str, **parts: Any) -> EvaluatorSpec:
        """The request for one evaluator at these times; `parts` are its `function` and `options`."""
        return EvaluatorSpec(name, self.every_steps if name in self.during else 0, name in self.final, **parts)


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What an evaluator found.

    Attributes:
        numbers: by name.
        pictures: by name, `uint8 [H, W, 3]`.
        values: float64 `[N]`, by the name of the number that is their mean: one for each prompt, in an order that the
            prompts alone decide, so that two generators are compared prompt by prompt.
    """

    numbers: dict[str, float]
    pictures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class ImageGenerator(Protocol):
    """Prompts to images, whatever runs underneath: a JAX run, or a TFLite bundle, which has no more than this."""

    def generate(
        self, prompts: list[str], *, seed: int = 0, indices: list[int] | None = None, **options: Any
    ) -> np.ndarray:
        """`uint8 [N, H, W, 3]`. Image n depends on (seed, indices[n], prompts[n]) alone; indices default to 0..N-1."""
        ...


@runtime_checkable
class Generator(ImageGenerator, Protocol):
    """Prompts and other conditions to named outputs: a JAX run.

    Attributes:
        recipe: the `training.recipe.Recipe` of the run.
        params: `{player: weights}`.
        frozen: its frozen networks.
    """

    recipe: Any
    params: Any
    frozen: Any

    @property
    def takes_prompts(self) -> bool:
        """Whether prompts give some of the arrays that generation needs."""
        ...

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The arrays that generation needs and no prompt gives; the validation split has them by these names."""
        ...

    def run(
        self,
        prompts: list[str] | None = None,
        *,
        conditions: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
        indices: list[int] | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """`{name: [N, ...]}`. Example n depends on (seed, indices[n]), its prompt and its conditions alone."""
        ...


class ValidationData(Protocol):
    """The validation split. Each time that it is iterated it yields the same batches from the first one on, without
    end: `arrays` (a tree of `[B, ...]`), `valid` (bool `[B]`), `source_index` (int64 `[B]`) and `bucket`. Closing the
    iterator ends its workers.

    Attributes:
        source: its examples by index; `source.example(index, rng, ("caption",))["caption"]` is the text of one, and
            `source.held_out` is False where training sees them too.
    """

    source: Any

    def __iter__(self) -> Iterator[Any]: ...


class Evaluator(Protocol):
    """Measures a generator."""

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """Runs the measurement; `dataset` is the run's validation split, where the evaluator needs one."""
        ...
