"""What an example is: named arrays and texts, each declared with what cropping and mirroring do to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from snapgen_jax.data.errors import UnreadableExampleError

Example = dict[str, Any]
"""`{name: numpy array or str}`."""

Kind = Literal["image", "points", "array", "text"]
Mirror = Literal["same", "negate_x", "none"]
Resample = Literal["lanczos", "area", "nearest"]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One entry of a source's examples. All images of an example share one crop and one flip.

    Attributes:
        kind: "image": a picture `[h, w, C]` or a clip `[F, h, w, C]`, cropped and resized to the bucket.
            "points": floats `[..., 2]`, each (x, y) of a place in the picture, from -1 at its left and top edge to 1 at
            its right and bottom edge. The crop moves them, and may move them outside.
            "array": anything else of a fixed shape. The crop does not touch it.
            "text": a string.
        shape: of the array; None for a height or width that varies: of images, or of arrays `[h, w, C]` that are stored
            for each bucket.
        dtype: of the array, whatever `numpy.dtype` accepts.
        mirror: what a horizontal flip of the images does to this entry.
            "same": images are reversed along their width. Arrays are unchanged: a class label. Texts are unchanged too,
            and an example whose text speaks of left or right is not flipped.
            "negate_x": as "same", and then the first element of the last axis is negated: the x component of optical
            flow or of surface normals, a point, a direction. Here x is 0 in the middle of the picture.
            "none": unknown. Flips are off for a batch that holds this entry.
        resample: how an image is resized. "lanczos" for pictures, "area" (the mean of the pixels covered) for depth,
            "nearest" for values that must not be mixed, such as labels.
    """

    kind: Kind
    shape: tuple[int | None, ...] = ()
    dtype: Any = np.uint8
    mirror: Mirror = "none"
    resample: Resample = "lanczos"

    def __post_init__(self):
        """Raises ValueError if the fields contradict each other."""
        dtype, rank = np.dtype(self.dtype), len(self.shape)
        free = self.shape[-3:-1] if self.kind in ("image", "array") and rank >= 3 else ()
        if self.kind == "image" and rank not in (3, 4):
            raise ValueError(f"an image is [h, w, C] or [F, h, w, C], not of {rank} axes")
        if self.kind == "points" and (self.shape[-1:] != (2,) or self.mirror == "same" or dtype.kind != "f"):
            raise ValueError('points are floats [..., 2] with mirror "negate_x" or "none"')
        if self.shape.count(None) > free.count(None):
            raise ValueError(
                "only the height and width of an image or of an array [h, w, C] may be None, and the shape is "
                f"{self.shape}"
            )
        if self.mirror == "negate_x" and (self.kind == "text" or not rank or dtype.kind in "ub"):
            raise ValueError(f'mirror "negate_x" needs a last axis of signed numbers, and this is {self}')
        if self.kind == "image" and self.resample != "nearest" and dtype.kind in "iu" and dtype.itemsize > 2:
            raise ValueError(f'images of {dtype.name} can be resized with "nearest" alone')

    def __str__(self) -> str:
        """ "uint8 [*, *, 3]", or "text"."""
        if self.kind == "text":
            return "text"
        return f"{np.dtype(self.dtype).name} [{', '.join('*' if n is None else str(n) for n in self.shape)}]"

    def accepts(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether an array of this shape and dtype is what is declared."""
        fits = len(shape) == len(self.shape) and all(b in (None, a) for a, b in zip(shape, self.shape, strict=True))
        return fits and np.dtype(dtype) == np.dtype(self.dtype)

    def mirrored(self, array: np.ndarray) -> np.ndarray:
        """The array after a horizontal flip of the images."""
        if self.kind == "image":
            array = array[..., ::-1, :]
        if self.mirror == "negate_x":
            array = array.copy()
            array[..., 0] = -array[..., 0]
        return array


IMAGE = ArraySpec("image", (None, None, 3), np.uint8, "same")
TEXT = ArraySpec("text", mirror="same")
LABEL = ArraySpec("array", (), np.int32, "same")


def entry(example: Example, name: str, spec: ArraySpec) -> Any:
    """One entry of an example: a string, or an array of the declared shape and dtype.

    Raises:
        UnreadableExampleError: the example lacks it, or it is not what is declared.
    """
    value = example.get(name)
    if spec.kind == "text" and isinstance(value, str):
        return value
    array = np.asarray(value)
    if value is None or spec.kind == "text" or not spec.accepts(array.shape, array.dtype):
        found = "nothing" if value is None else type(value).__name__ if isinstance(value, str) else _describe(array)
        raise UnreadableExampleError(f"{name} is {found}, and its source declares {spec}")
    return array


def listed(declared: Mapping[str, ArraySpec]) -> str:
    """What a source has, for messages: "image (uint8 [*, *, 3]), caption (text)"."""
    return ", ".join(f"{name} ({spec})" for name, spec in declared.items())


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype.name} [{', '.join(map(str, array.shape))}]"
