"""What an evaluator asks a generator to draw.

Prompts are those of the config, or captions of the validation split. A run that needs other arrays (class labels,
images to edit, stored text states) is given those of the first examples of the split.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.evaluation.interfaces import Generator, ImageGenerator, ValidationData


@dataclasses.dataclass(frozen=True)
class Requests:
    """N examples to draw.

    Attributes:
        titles: N texts for people: the prompt, "label 3" or "example 7".
        prompts: N texts; None for a run that takes none.
        conditions: `{name: [N, ...]}`, beside the prompts or alone.
    """

    titles: Sequence[str]
    prompts: Sequence[str] | None = None
    conditions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_prompts(cls, prompts: Sequence[str]) -> Requests:
        """Prompts and nothing else."""
        return cls(list(prompts), list(prompts))

    def repeated(self, times: int) -> Requests:
        """Each request several times in a row."""
        rows = [n for n in range(len(self.titles)) for _ in range(times)]
        return Requests(
            [self.titles[n] for n in rows],
            None if self.prompts is None else [self.prompts[n] for n in rows],
            {name: array[rows] for name, array in self.conditions.items()},
        )


def requests(
    generator: ImageGenerator, prompts: Sequence[str], count: int, dataset: ValidationData | None, seed: int
) -> Requests:
    """What to draw: the prompts given, or else `count` examples of the validation split.

    A run that needs no array beside prompts is given captions of the first examples. Another is given the arrays of
    the first readable examples of one bucket, with their captions where it takes prompts too.

    Raises:
        ValueError: there is no validation split where one is needed, or it lacks an array or examples.
    """
    needs, prompted = needs_of(generator), takes_prompts(generator)
    if prompts and (not needs or not prompted):
        return Requests.of_prompts(prompts)  # which a run that takes none refuses
    if not needs and not prompted:
        return Requests([f"example {n}" for n in range(count)])
    if dataset is None:
        what = f"the arrays {', '.join(needs)}" if needs else "captions, unless the option `prompts` lists some texts"
        raise ValueError(f"there is nothing to draw: this run takes {what}, from the validation split, and got none")
    if not needs:
        return Requests.of_prompts(captions(dataset, range(min(count, len(dataset.source))), seed))
    arrays, indices = examples(dataset, needs, len(prompts) or count)
    return requests_of_examples(generator, prompts, arrays, indices, dataset, seed)


def requests_of_examples(
    generator: ImageGenerator,
    prompts: Sequence[str],
    arrays: Mapping[str, np.ndarray],
    indices: Sequence[int],
    dataset: ValidationData,
    seed: int,
) -> Requests:
    """What to draw for examples of the validation split.

    Args:
        generator: takes of the examples what it needs.
        prompts: one for each example; empty for the captions of the examples.
        arrays: `{name: [N, ...]}` of the examples, as from `examples`.
        indices: their N numbers in the split.
        dataset: the split.
        seed: of the phrasing of captions.

    Raises:
        ValueError: there are not as many examples as prompts.
    """
    if len(prompts) not in (0, len(indices)):
        raise ValueError(
            f"{len(prompts)} prompts need as many examples of the validation split beside them, and it has "
            f"{len(indices)} of one size; give fewer prompts"
        )
    conditions = {name: arrays[name] for name in needs_of(generator)}
    if takes_prompts(generator):
        texts = list(prompts) or captions(dataset, indices, seed)
        return Requests(texts, texts, conditions)
    labels = [name for name, x in conditions.items() if x.ndim == 1 and np.issubdtype(x.dtype, np.integer)]
    if len(labels) == 1:
        return Requests([f"{labels[0]} {value}" for value in conditions[labels[0]]], None, conditions)
    return Requests([f"example {index}" for index in indices], None, conditions)


def needs_of(generator: ImageGenerator) -> tuple[str, ...]:
    """The arrays that a generator needs beside prompts; none where it has no `run`, as a bundle."""
    return generator.condition_names if isinstance(generator, Generator) else ()


def takes_prompts(generator: ImageGenerator) -> bool:
    """Whether a generator draws from prompts, as all do that have no `run`."""
    return generator.takes_prompts if isinstance(generator, Generator) else True


def captions(dataset: ValidationData, indices: Iterable[int], seed: int) -> list[str]:
    """Captions of examples of the validation split, each in the phrasing that (seed, index) draws."""

    def caption(index: int) -> str:
        rng = np.random.default_rng((seed, index))
        return dataset.source.example(index, rng, ("caption",))["caption"]

    return [caption(int(index)) for index in indices]


def examples(dataset: ValidationData, names: Iterable[str], count: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """Arrays `{name: [N, ...]}` of up to `count` different readable examples of one bucket, with their N indices.

    Raises:
        ValueError: the split has no such array, or no readable example.
    """
    found: dict[int, dict[str, np.ndarray]] = {}
    seen: set[int] = set()
    bucket = None
    with contextlib.closing(iter(dataset)) as batches:  # type: ignore[type-var]  # a generator
        for batch in batches:
            bucket = bucket or batch.bucket
            if batch.bucket != bucket:
                continue
            arrays = {name: _array_of(batch.arrays, name) for name in names}
            again = False
            for row, (index, valid) in enumerate(zip(batch.source_index, batch.valid, strict=True)):
                again |= int(index) in seen
                seen.add(int(index))
                if valid:
                    found.setdefault(int(index), {name: array[row] for name, array in arrays.items()})
            if again or len(found) >= count:
                break
    indices = list(found)[:count]
    if not indices:
        raise ValueError("the validation split has no readable example; is the data where `data` says?")
    return {name: np.stack([found[index][name] for index in indices]) for name in next(iter(found.values()))}, indices


def _array_of(arrays: Mapping[str, Any], name: str) -> np.ndarray:
    if name not in arrays:
        raise ValueError(f"the validation split has no array {name!r}; it has {', '.join(map(repr, arrays))}")
    return np.asarray(arrays[name])
