"""What a generator draws for requests, and the one output of it that an evaluator reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.evaluation.interfaces import Generator, ImageGenerator
from snapgen_jax.evaluation.requests import Requests

Outputs = dict[str, np.ndarray]


def draw(
    generator: ImageGenerator,
    wanted: Requests,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Outputs:
    """All outputs `{name: [N, ...]}` of a generator; "image" alone of one that has no `run`, such as a bundle.

    Args:
        generator: a run or a bundle.
        wanted: N requests.
        seed: of the noise.
        indices: example n depends on (seed, indices[n]); by default on (seed, n).
        options: of the generator, such as `steps` and `guidance`.

    Raises:
        ValueError: the generator draws from prompts alone, and the requests are others.
    """
    chosen = {**(options or {}), **({} if indices is None else {"indices": list(indices)})}
    prompts = None if wanted.prompts is None else list(wanted.prompts)
    if isinstance(generator, Generator):
        if prompts is None and not wanted.conditions:  # an unconditional run takes N from the indices
            chosen.setdefault("indices", list(range(len(wanted.titles))))
        return generator.run(prompts, conditions=wanted.conditions or None, seed=seed, **chosen)
    if prompts is None or wanted.conditions:
        raise ValueError("this generator draws from prompts alone; evaluate the run that it was made from")
    return {"image": generator.generate(prompts, seed=seed, **chosen)}


def read(outputs: Outputs, name: str) -> np.ndarray:
    """One output `[N, ...]`.

    Raises:
        ValueError: there is none of this name; lists those that there are.
    """
    if name not in outputs:
        raise ValueError(
            f"the generator gives no output {name!r}; set the evaluator's option `output` to one of "
            f"{described(outputs)}"
        )
    return outputs[name]


def read_images(outputs: Outputs, name: str) -> np.ndarray:
    """One output that holds images, `uint8 [N, H, W, 3]`.

    Raises:
        ValueError: there is none of this name, or it holds something else; lists the outputs that there are.
    """
    found = read(outputs, name)
    if not are_images(found):
        raise ValueError(
            f"the output {name!r} is {form(found)}, and this evaluator reads images uint8 [N, H, W, 3]; "
            f"the generator gives {described(outputs)}"
        )
    return found


def are_images(array: np.ndarray) -> bool:
    """Whether an array is `uint8 [N, H, W, 3]`."""
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3


def form(array: np.ndarray) -> str:
    """Type and shape for people: "uint8 [N, 8, 8, 3]"."""
    return f"{array.dtype} [{', '.join(('N', *map(str, array.shape[1:])))}]"


def described(outputs: Mapping[str, np.ndarray]) -> str:
    """All outputs for people."""
    return ", ".join(f"{name!r} {form(array)}" for name, array in outputs.items())
