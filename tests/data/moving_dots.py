"""A source of every kind of entry, in which everything says where one dot is: a test compares what the entries say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np

from snapgen_jax.data.arrays import LABEL, TEXT, ArraySpec, Example

SPEC: dict[str, ArraySpec] = {
    "image": ArraySpec("image", (None, None, 3), np.uint8, "same"),
    "clip": ArraySpec("image", (3, None, None, 3), np.uint8, "same"),
    "depth": ArraySpec("image", (None, None, 1), np.float32, "same", "area"),
    "classes": ArraySpec("image", (None, None, 1), np.int32, "same", "nearest"),
    "flow": ArraySpec("image", (None, None, 2), np.float32, "negate_x", "area"),
    "place": ArraySpec("points", (1, 2), np.float32, "negate_x"),
    "direction": ArraySpec("array", (2,), np.float32, "negate_x"),
    "state": ArraySpec("array", (5,), np.float16, "none"),
    "number": LABEL,
    "caption": TEXT,
    "instruction": TEXT,
}


def batch_specs(batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a recipe may ask of `MovingDots`: square pictures, maps of half their size, and what goes with them."""
    return {
        "image": jax.ShapeDtypeStruct((batch, 24, 24, 3), np.uint8),
        "clip": jax.ShapeDtypeStruct((batch, 3, 24, 24, 3), np.uint8),
        "depth": jax.ShapeDtypeStruct((batch, 12, 12, 1), np.float32),
        "classes": jax.ShapeDtypeStruct((batch, 24, 24, 1), np.int32),
        "flow": jax.ShapeDtypeStruct((batch, 12, 12, 2), np.float32),
        "place": jax.ShapeDtypeStruct((batch, 1, 2), np.float32),
        "direction": jax.ShapeDtypeStruct((batch, 2), np.float32),
        "number": jax.ShapeDtypeStruct((batch,), np.int32),
    }


@dataclasses.dataclass(frozen=True)
class MovingDots:
    """A square dot on black. Its place, and its way to the left or right, come from the index.

    Attributes:
        count: examples.
        size: height and width of the pictures.
        depth_size: of the depth map, the classes and the flow.
        words: caption of every example.
        spoil: {entry: value} in place of what is declared.
    """

    count: int = 40
    size: tuple[int, int] = (48, 96)
    depth_size: tuple[int, int] = (24, 48)
    words: str = "a dot"
    spoil: Mapping[str, object] = dataclasses.field(default_factory=dict)

    held_out = True

    def __len__(self) -> int:
        return self.count

    def spec(self) -> dict[str, ArraySpec]:
        return SPEC

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        draw = np.random.default_rng((99, index))
        x, y, step = *draw.uniform(-0.4, 0.4, 2), draw.choice([-0.05, 0.05])

        def dot(size: tuple[int, int], centre: float = x) -> np.ndarray:
            """1 inside the dot and 0 outside: `[h, w, 1]`."""
            rows, columns = ((2 * np.arange(n) + 1) / n - 1 for n in size)
            reach = 0.25  # of half the height
            ratio = size[1] / size[0]
            inside = (np.abs(rows[:, None] - y) < reach) & (np.abs(columns - centre) * ratio < reach)
            return inside[..., None].astype(np.float32)

        def picture(centre: float = x) -> np.ndarray:
            return (255 * dot(self.size, centre)).astype(np.uint8).repeat(3, axis=2)

        entries: dict[str, Callable[[], object]] = {
            "image": picture,
            "clip": lambda: np.stack([picture(x + n * step) for n in range(3)]),
            "depth": lambda: 1000.5 * dot(self.depth_size),
            "classes": lambda: (70_001 * dot(self.depth_size)).astype(np.int32),
            "flow": lambda: dot(self.depth_size) * np.array([np.sign(step), 1.0], np.float32),
            "place": lambda: np.array([[x, y]], np.float32),
            "direction": lambda: np.array([step, 1.0], np.float32),
            "state": lambda: np.full(5, index, np.float16),
            "number": lambda: np.int32(index),
            "caption": lambda: self.words,
            "instruction": lambda: f"move the dot {index}",
        }
        return {name: entries[name]() for name in names or SPEC} | dict(self.spoil)

    def name(self, index: int) -> str:
        return f"dot {index}"

    def sizes(self) -> None:
        return None

    def buckets(self) -> None:
        return None
