"""Whether a run's frozen networks are what they were: compared, bit by bit, with the files that they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from snapgen_jax.evaluation.interfaces import EvaluationResult, Generator, ValidationData
from snapgen_jax.parallel.mesh import mesh_of
from snapgen_jax.training.fingerprint import fingerprint

Tree = Any


@dataclasses.dataclass(frozen=True)
class Unchanged:
    """Reads the frozen networks again and compares them with those in use, by their fingerprints.

    Attributes:
        function: `function(mesh) -> {role: parameters}`, which reads them onto the mesh that those in use lie on; None
            for one device. On several hosts no device of one alone holds what all compare.
    """

    function: Callable[[Mesh | None], Tree]

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """`frozen.unchanged`, the number of frozen networks, all of them as they were.

        Raises:
            ValueError: there is none, or one has changed; names it.
        """
        del dataset
        if not isinstance(generator, Generator) or not generator.frozen:
            raise ValueError("unchanged compares the frozen networks of a run, and here are none")
        read = self.function(mesh_of(generator.frozen))
        changed = [role for role, tree in generator.frozen.items() if fingerprint(tree) != fingerprint(read[role])]
        if changed:
            raise ValueError(
                f"the frozen networks {', '.join(changed)} are not those of their files any more: a file was replaced "
                "while the run went on, or memory is damaged. Restore the files, and start again from a checkpoint"
            )
        return EvaluationResult({"frozen.unchanged": float(len(generator.frozen))})
