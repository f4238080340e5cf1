"""Generation as stages, each a function of the networks and of what the one before it made.

`run_stages` composes them into the one program that draws; `snapgen_jax.timing` compiles each by itself and says how
long it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Tree = Any
Stage = Callable[[Tree, Tree], Tree]
"""`(networks, what came before) -> what comes next`, trees of arrays; can be jitted."""
Stages = Mapping[str, Stage]
"""In their order: "encoders", "steps" and "decoder"."""


def run_stages(stages: Stages, networks: Tree, value: Tree) -> Tree:
    """What the last stage makes, of what the first is given."""
    for stage in stages.values():
        value = stage(networks, value)
    return value


@dataclasses.dataclass(frozen=True)
class Staged:
    """One batch that is about to be drawn, in stages.

    Attributes:
        stages: of the program.
        networks: their parameters.
        given: what the first stage takes.
        steps: of the sampler.
        examples: in the batch.
        tokenize: makes token ids of the prompts; None where there are none.
    """

    stages: Stages
    networks: Tree
    given: Tree
    steps: int
    examples: int
    tokenize: Callable[[], Any] | None = None
