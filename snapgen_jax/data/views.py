"""The part of an example's pictures that is kept: one crop and one flip for all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from snapgen_jax.data.arrays import ArraySpec, Resample
from snapgen_jax.data.config import Crop, Flip
from snapgen_jax.data.errors import UnreadableExampleError

Size = tuple[int, int]  # height, width
Box = tuple[float, float, float, float]  # left, top, right, bottom

_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}


@dataclasses.dataclass(frozen=True)
class View:
    """A part of a picture, perhaps mirrored.

    Attributes:
        size: of the picture that the box is measured on. Another picture of the example shows the same part.
        box: the part, in pixels of that picture, after mirroring.
        mirrored: whether the pictures are mirrored.
    """

    size: Size
    box: Box
    mirrored: bool = False

    @classmethod
    def draw(
        cls, size: Size, target: Size, rng: np.random.Generator, crop: Crop = "centre", flip: Flip = "none"
    ) -> View:
        """A part of a picture that has the shape of `target` and is as large as the picture allows.

        Args:
            size: of the picture.
            target: height and width that the part is resized to.
            rng: draws the flip, then the place of a random crop.
            crop: which part.
            flip: "random" mirrors every other picture.
        """
        mirrored = flip == "random" and bool(rng.random() < 0.5)
        height, width = size
        scale = min(height / target[0], width / target[1])  # picture pixels for one pixel of the target
        kept_height, kept_width = scale * target[0], scale * target[1]
        where_y, where_x = (rng.random(), rng.random()) if crop == "random" else (0.5, 0.5)
        top, left = where_y * (height - kept_height), where_x * (width - kept_width)
        box = (left, top, min(left + kept_width, width), min(top + kept_height, height))
        return cls(size, box, mirrored)

    def show(self, spec: ArraySpec, value: Any, target: Size | tuple[int, ...]) -> Any:
        """An entry of the example as this view shows it.

        Args:
            spec: of the entry.
            value: the entry.
            target: height and width of the result, if the entry is an image.

        Raises:
            UnreadableExampleError: a picture is of another aspect ratio than the one that the view is of.
        """
        if spec.kind == "text":
            return value
        if self.mirrored:
            value = spec.mirrored(value)
        if spec.kind == "points":
            return self._points(value)
        if spec.kind == "image":
            height, width = target
            return _resize_all(value, (height, width), self._box_on(value.shape[-3:-1]), spec.resample)
        return value

    def _box_on(self, size: Size) -> Box:
        (height, width), (own_height, own_width) = size, self.size
        if size == self.size:
            return self.box
        # Equal aspect ratios, but for the rounding of a height or a width to whole pixels.
        if abs(width * own_height - height * own_width) > max(height, width, own_height, own_width):
            raise UnreadableExampleError(
                f"its images have the sizes {own_height}x{own_width} and {height}x{width}; images of one example must "
                "show the same view"
            )
        across, down = width / own_width, height / own_height
        left, top, right, bottom = self.box
        return left * across, top * down, min(right * across, width), min(bottom * down, height)

    def _points(self, points: np.ndarray) -> np.ndarray:
        left, top, right, bottom = (x / n for x, n in zip(self.box, self.size[::-1] * 2, strict=True))
        start, length = np.array([left, top]), np.array([right - left, bottom - top])
        return (2 * ((points + 1) / 2 - start) / length - 1).astype(points.dtype)


def _resize_all(array: np.ndarray, target: Size, box: Box, resample: Resample) -> np.ndarray:
    """The box of a picture or of every frame of a clip, resized."""
    if array.shape[-3:-1] == target and box == (0, 0, target[1], target[0]):
        return array
    if array.ndim == 3:
        return resize(array, target, box, resample)
    return np.stack([resize(frame, target, box, resample) for frame in array])


def resize(image: np.ndarray, target: Size, box: Box, resample: Resample) -> np.ndarray:
    """A part of an image at another size.

    Args:
        image: `[h, w, C]` of any number type; integers of more than 16 bits with "nearest" alone.
        target: height H and width W of the result.
        box: the part.
        resample: the filter.

    Returns:
        `[H, W, C]` of the same dtype.
    """
    if resample == "nearest":
        left, top, right, bottom = box
        rows = (top + (np.arange(target[0]) + 0.5) * (bottom - top) / target[0]).astype(int)
        columns = (left + (np.arange(target[1]) + 0.5) * (right - left) / target[1]).astype(int)
        return image[rows.clip(max=image.shape[0] - 1)[:, None], columns.clip(max=image.shape[1] - 1)]
    size = target[1], target[0]
    if image.dtype == np.uint8 and image.shape[2] == 3:
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(picture.resize(size, _FILTERS[resample], box=box, reducing_gap=3.0))
    channels = [
        Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)).resize(size, _FILTERS[resample], box)
        for c in range(image.shape[2])
    ]
    resized = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    if image.dtype.kind in "iu":
        limits = np.iinfo(image.dtype)
        resized = np.rint(resized).clip(limits.min, limits.max)
    return resized.astype(image.dtype)
