"""How well decoders make images again: by pixel, by structure, by feature, as a distribution, and in colour."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from snapgen_jax.bounds import at_least, check
from snapgen_jax.evaluation.features import image_features
from snapgen_jax.evaluation.frechet import frechet_distance
from snapgen_jax.evaluation.interfaces import EvaluationResult, ValidationData
from snapgen_jax.evaluation.pictures import grid
from snapgen_jax.generation import on_every_host

Tree = Any
COLOURS = ("red", "green", "blue")
MOST_DECIBELS = 100.0


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Compares each decoder's images with the originals, on the first examples of the validation split.

    Attributes:
        function: `function(params, frozen, batch, key) -> {name: [B, ...]}`: `original` and the output of each decoder,
            uint8 `[B, H, W, 3]`, and maybe `lpips/<decoder>` float `[B]`.
        examples: how many images; all of the split, where that is less.
        shown: how many of them are in the picture.
    """

    function: Callable[[Tree, Tree, Tree, jax.Array], dict[str, jax.Array]]
    examples: int = 128
    shown: int = 8

    def __post_init__(self) -> None:
        check(self, examples=at_least(2), shown=at_least(1))

    def __call__(self, generator: Any, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `reconstruction.<decoder>.<measure>` as `compare` gives them, `.lpips` where the function does, and
        the picture `reconstruction`: originals beside what each decoder makes of them.

        Args:
            generator: holds `params` and `frozen`, the first two arguments of the function.
            dataset: the validation split.

        Raises:
            ValueError: there is no validation split, or it has fewer than two readable images.
        """
        if dataset is None:
            raise ValueError("reconstruction compares with images of the validation split, and was given none")
        found = self._collect(generator, dataset)
        original = found["original"]
        if len(original) < 2:
            raise ValueError(f"reconstruction needs two readable validation images or more and found {len(original)}")
        decoders = [name for name in found if name != "original" and not name.startswith("lpips/")]
        numbers: dict[str, float] = {}
        for name in decoders:
            measured = compare(original, found[name])
            if f"lpips/{name}" in found:
                measured["lpips"] = float(found[f"lpips/{name}"].mean())
            numbers.update({f"reconstruction.{name}.{measure}": value for measure, value in measured.items()})
        columns = ["original", *decoders]
        rows = min(self.shown, len(original))
        images = np.stack([found[name][n] for n in range(rows) for name in columns])
        picture = grid(images, columns * rows, columns=len(columns))
        return EvaluationResult(numbers, {"reconstruction": picture})

    def _collect(self, generator: Any, dataset: ValidationData) -> dict[str, np.ndarray]:
        """What the function gives of the first readable examples of one size, each once."""
        parts: list[dict[str, np.ndarray]] = []
        seen: set[int] = set()
        bucket = None
        run = self._compiled(on_every_host(generator.params))
        with contextlib.closing(iter(dataset)) as batches:  # type: ignore[type-var]  # a generator
            for batch in batches:
                bucket = bucket or batch.bucket
                if batch.bucket != bucket:
                    continue
                fresh = np.array([int(index) not in seen for index in batch.source_index])
                seen.update(map(int, batch.source_index))
                kept = fresh & np.asarray(batch.valid)
                given = jax.device_get(run(generator.params, generator.frozen, batch.arrays, jax.random.key(0)))
                parts.append({name: array[kept] for name, array in given.items()})
                if not fresh.all() or sum(len(part["original"]) for part in parts) >= self.examples:
                    break
        return {name: np.concatenate([part[name] for part in parts])[: self.examples] for name in parts[0]}

    @functools.cached_property
    def _compiled(self) -> Callable[[Any], Callable[..., dict[str, jax.Array]]]:
        """The function with its results lying somewhere, compiled once for all evaluations of a run."""
        return functools.cache(lambda where: jax.jit(self.function, out_shardings=where))


def compare(original: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """Measures of images against their originals, both uint8 `[N, H, W, 3]` with N of two at least.

    Returns:
        psnr: peak signal-to-noise ratio in dB, a mean over images, each at most `MOST_DECIBELS`.
        ssim: structural similarity (Wang et al. 2004, with its Gaussian window of 11 px), a mean over images.
        frechet: distance of the sets of images, see `evaluation.features`.
        shift_red, shift_green, shift_blue: mean of made less original, in grey levels.
        colour_shift: mean over images and colours of the size of that difference of means.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # a second to import

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = list(zip(original, made, strict=True))
    with np.errstate(divide="ignore"):  # of equal images
        psnr = [min(peak_signal_noise_ratio(x, y, data_range=255), MOST_DECIBELS) for x, y in pairs]
    ssim = [structural_similarity(x, y, data_range=255, channel_axis=-1, **window) for x, y in pairs]
    shift = made.mean(axis=(1, 2), dtype=np.float64) - original.mean(axis=(1, 2), dtype=np.float64)  # [N, 3]
    return {
        "psnr": float(np.mean(psnr)),
        "ssim": float(np.mean(ssim)),
        "frechet": frechet_distance(image_features(made), image_features(original)),
        **{f"shift_{colour}": float(shift[:, i].mean()) for i, colour in enumerate(COLOURS)},
        "colour_shift": float(np.abs(shift).mean()),
    }
