"""Distance to real images, by themselves and with their captions, and difference between seeds, as evaluators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from snapgen_jax.bounds import SEED, at_least, check, check_texts
from snapgen_jax.evaluation.clip_score import contrastive_run, embeddings
from snapgen_jax.evaluation.diversity import pairwise_distances
from snapgen_jax.evaluation.features import image_features
from snapgen_jax.evaluation.frechet import frechet_distance
from snapgen_jax.evaluation.interfaces import EvaluationResult, ImageGenerator, ValidationData
from snapgen_jax.evaluation.outputs import are_images, draw, form, read_images
from snapgen_jax.evaluation.requests import Requests, examples, needs_of, requests, requests_of_examples
from snapgen_jax.evaluation.statistics import mean_interval

_REMEDY = (
    "it holds data.validation_share of your images, 1 of 20 by default: give 80 images, or a larger share (0.2 of 20 "
    "images), and train anew; a data set with splits of its own has data.validation_split"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AgainstReal:
    """What is compared with real images of the validation split.

    Attributes:
        examples: how many generated images meet as many real ones; half of the split, where that is less.
        seed: image n comes from (seed, n).
        output: which output of the generator is compared, images `uint8 [N, H, W, 3]`.
        reference: the array of the split that it is compared with, such images too.
        options: options of the generator.
    """

    name = ""  # of the evaluator, for messages; no option, and so without an annotation
    examples: int = 512
    seed: int = 0
    output: str = "image"
    reference: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, examples=at_least(2), seed=SEED)

    def drawn(self, generator: ImageGenerator, wanted: Requests) -> np.ndarray:
        """The images that are asked for, `uint8 [N, H, W, 3]`."""
        return read_images(draw(generator, wanted, seed=self.seed, options=self.options), self.output)

    def halves(self, generator: ImageGenerator, dataset: ValidationData | None) -> list[tuple[np.ndarray, Requests]]:
        """Two sets of as many real images, `uint8 [N, H, W, 3]`, N at most `examples`, and what to draw for each.

        Raises:
            ValueError: there is no validation split, it repeats the training split, it has fewer than four readable
                images, or `reference` is no array of images.
        """
        if dataset is None:
            raise ValueError(f"{self.name} compares with images of the validation split, and was given none")
        if not dataset.source.held_out:
            raise ValueError(
                f"{self.name} needs images that training does not see, four or more, and the validation split repeats "
                f"the {len(dataset.source)} training images; {_REMEDY}"
            )
        arrays, indices = examples(dataset, dict.fromkeys((self.reference, *needs_of(generator))), 2 * self.examples)
        images, size = arrays[self.reference], len(indices) // 2
        if not are_images(images):
            raise ValueError(
                f"the array {self.reference!r} of the validation split is {form(images)}, and {self.name} reads images "
                "uint8 [N, H, W, 3]; set its option `reference` to an array of such"
            )
        if size < 2:
            raise ValueError(
                f"{self.name} needs four readable images of one size in the validation split or more and found "
                f"{len(images)}; {_REMEDY}"
            )

        def part(rows: slice) -> tuple[np.ndarray, Requests]:
            own = {array: values[rows] for array, values in arrays.items()}
            return images[rows], requests_of_examples(generator, (), own, indices[rows], dataset, self.seed)

        return [part(slice(0, size)), part(slice(size, 2 * size))]


@dataclasses.dataclass(frozen=True)
class FrechetScore(_AgainstReal):
    """Frechet distance between generated images and real ones of the validation split; the fields are those above."""

    name = "frechet"

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `frechet.distance`, and `frechet.real`: what real images in place of the generated ones would score.

        The captions (or other conditions) of one half of the real images are drawn, and compared with the other half,
        as the first half is for `frechet.real`.

        Raises:
            ValueError: see `halves`, or there are no images by the name of `output`.
        """
        (one, wanted), (other, _) = self.halves(generator, dataset)
        drawn = image_features(self.drawn(generator, wanted))
        first, second = image_features(one), image_features(other)
        return EvaluationResult(
            {"frechet.distance": frechet_distance(drawn, second), "frechet.real": frechet_distance(first, second)}
        )


@dataclasses.dataclass(frozen=True)
class JointFrechetScore(_AgainstReal):
    """Frechet distance between pairs of an image and its caption, generated and real, in the eyes of a contrastive run.

    DeVries et al. 2019, "On the evaluation of conditional GANs": the features of a pair are those of the image and the
    embedding of the caption, side by side. Here both are unit vectors of one trained pair of networks, so that neither
    outweighs the other. A model whose images are right and belong to other captions is far away, which the distance of
    images alone does not see.

    Attributes:
        workdir: a run of the recipe `contrastive`; "" for the one whose text encoder the generator's run reads.
    """

    name = "joint_frechet"
    workdir: str = ""
    examples: int = dataclasses.field(default=2048, kw_only=True)

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `joint_frechet.distance`; `joint_frechet.real`, as for `FrechetScore`; and `joint_frechet.permuted`:
        that of the generated images each beside the caption of the next.

        Raises:
            ValueError: as for `FrechetScore`, or there is no contrastive run, or the generator takes no prompts.
        """
        clip = contrastive_run(self.workdir, generator, self.name)
        (one, wanted), (other, others) = self.halves(generator, dataset)
        if wanted.prompts is None or others.prompts is None:
            raise ValueError("joint_frechet compares images with their captions, and this run takes no prompts")
        drawn, text = embeddings(clip, self.drawn(generator, wanted), wanted.prompts)
        first, second = embeddings(clip, one, wanted.prompts)[0], np.hstack(embeddings(clip, other, others.prompts))
        beside = {"distance": (drawn, text), "real": (first, text), "permuted": (drawn, np.roll(text, 1, axis=0))}
        return EvaluationResult(
            {f"joint_frechet.{name}": frechet_distance(np.hstack(pair), second) for name, pair in beside.items()}
        )


@dataclasses.dataclass(frozen=True)
class DiversityScore:
    """How much the images of one prompt differ from seed to seed.

    Attributes:
        prompts: the prompts; empty for captions, or other conditions, of the validation split.
        count: how many examples of the split to take where no prompts are given.
        images: drawn for each prompt.
        seed: image s of prompt p comes from (seed, p * images + s).
        output: which output of the generator is measured, images `uint8 [N, H, W, 3]`.
        options: options of the generator.
    """

    prompts: tuple[str, ...] = ()
    count: int = 32
    images: int = 4
    seed: int = 0
    output: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, count=at_least(1), images=at_least(2), seed=SEED)
        check_texts(self, "prompts")

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Number `diversity.pairwise`: mean feature distance over pairs of images of a prompt, then over prompts; with
        its 95% interval over two prompts or more as `.low` and `.high`."""
        wanted = requests(generator, self.prompts, self.count, dataset, self.seed).repeated(self.images)
        outputs = draw(generator, wanted, seed=self.seed, options=self.options)
        features = image_features(read_images(outputs, self.output))
        distances = pairwise_distances(features.reshape(-1, self.images, features.shape[-1]))
        numbers = {"diversity.pairwise": float(distances.mean())}
        if len(distances) > 1:
            numbers["diversity.pairwise.low"], numbers["diversity.pairwise.high"] = mean_interval(distances)
        return EvaluationResult(numbers, values={"diversity.pairwise": distances})
