"""How alike the outputs of a network's modules are at successive sampling steps, as numbers and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from snapgen_jax.bounds import SEED, at_least, check
from snapgen_jax.evaluation.fonts import legible
from snapgen_jax.evaluation.interfaces import EvaluationResult, ValidationData
from snapgen_jax.evaluation.pictures import FONT_SIZE, INK, PAPER
from snapgen_jax.evaluation.validation_loss import ValidationLoss

Tree = Any
CELL, GAP = 18, 8
LOW, HIGH = np.array([68, 1, 84]), np.array([253, 231, 37])


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Samples the validation split's conditions and compares each module's output with its own one step before.

    Attributes:
        function: `function(params, frozen, batch, key) -> {"MODULE/step=07": [B]}`, the cosine of module and step.
        batches: how many batches of the validation split.
        seed: of the noise.
    """

    function: Callable[[Tree, Tree, Tree, jax.Array], dict[str, jax.Array]]
    batches: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, batches=at_least(1), seed=SEED)

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `similarity.MODULE/step=07`, their `similarity.mean` and `similarity.least`, and the picture
        `similarity`: a row a module, a column a step, dark at the least and light at 1.

        Raises:
            ValueError: there is no validation split.
        """
        if dataset is None:
            raise ValueError("similarity samples conditions of the validation split, and was given none")
        measured = ValidationLoss(self.function, self.batches, self.seed)(generator, dataset).numbers
        found = {name.removeprefix("validation_loss."): value for name, value in measured.items()}
        rows: dict[str, list[float]] = {}
        for name, value in found.items():
            rows.setdefault(name.partition("/")[0], []).append(value)
        values = [value for row in rows.values() for value in row]
        numbers = {"similarity.mean": float(np.mean(values)), "similarity.least": min(values)}
        numbers |= {f"similarity.{name}": value for name, value in found.items()}
        return EvaluationResult(numbers, {"similarity": heat_map(rows)})


def heat_map(rows: Mapping[str, list[float]]) -> np.ndarray:
    """`uint8 [H, W, 3]`: a line of cells for each row with its name on the left; dark at the least value, light at the
    greatest."""
    values = np.array(list(rows.values()))
    low, high = values.min(), values.max()
    shares = (values - low) / (high - low) if high > low else np.ones_like(values)
    cells = (LOW + shares[..., None] * (HIGH - LOW)).round().astype(np.uint8)
    texts = [legible(name, FONT_SIZE) for name in rows]
    left = 2 * GAP + max(int(font.getlength(text)) for text, font in texts)
    picture = Image.new("RGB", (left + CELL * values.shape[1] + GAP, CELL * len(rows) + 2 * GAP), PAPER)
    picture.paste(Image.fromarray(cells.repeat(CELL, axis=0).repeat(CELL, axis=1)), (left, GAP))
    draw = ImageDraw.Draw(picture)
    for n, (text, font) in enumerate(texts):
        draw.text((GAP, GAP + CELL * n + (CELL - FONT_SIZE) // 2), text, INK, font)
    return np.asarray(picture)
