"""CLIP score: how well images fit their prompts, in the eyes of a contrastive run (Hessel et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from snapgen_jax.bounds import SEED, at_least, check, check_texts
from snapgen_jax.evaluation.interfaces import EvaluationResult, Generator, ImageGenerator, ValidationData
from snapgen_jax.evaluation.outputs import draw, read_images
from snapgen_jax.evaluation.requests import requests
from snapgen_jax.generation import load


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """Mean cosine between the embeddings of an image and of its prompt.

    Attributes:
        workdir: a run of the recipe `contrastive`; "" for the one whose text encoder the generator's run reads.
        prompts: the prompts; empty for captions of the validation split.
        count: how many captions to take where no prompts are given.
        seed: image n comes from (seed, n).
        output: which output of the generator is scored, images `uint8 [N, H, W, 3]`.
        options: options of the generator.
    """

    workdir: str = ""
    prompts: tuple[str, ...] = ()
    count: int = 128
    seed: int = 0
    output: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, count=at_least(1), seed=SEED)
        check_texts(self, "prompts")

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers `clip.score`, and `clip.chance`: the same with each image beside the prompt of the next.

        Raises:
            ValueError: there is no contrastive run, or nothing to draw, or the generator takes no prompts.
        """
        clip = contrastive_run(self.workdir, generator, "clip_score")
        wanted = requests(generator, self.prompts, self.count, dataset, self.seed)
        if wanted.prompts is None:
            raise ValueError("clip_score compares images with their prompts, and this run takes no prompts")
        images = read_images(draw(generator, wanted, seed=self.seed, options=self.options), self.output)
        image, text = embeddings(clip, images, wanted.prompts)
        return EvaluationResult(
            {
                "clip.score": float(np.mean(np.sum(image * text, axis=1))),
                "clip.chance": float(np.mean(np.sum(image * np.roll(text, 1, axis=0), axis=1))),
            }
        )


def contrastive_run(workdir: str, generator: ImageGenerator, name: str) -> Generator:
    """The run in a workdir, or where that is "" the one whose text encoder a generator's run reads, loaded.

    Raises:
        ValueError: there is none, or it compares no images with texts; says so of the evaluator `name`.
    """
    workdir = workdir or text_workdir(generator, name)
    run = load(workdir)
    if not compares(run):
        raise ValueError(
            f"{workdir} does not compare images with texts; name a run of the recipe 'contrastive' in the option "
            f"`workdir` of {name}"
        )
    return run


def text_workdir(generator: ImageGenerator, name: str = "clip_score") -> str:
    """The one run whose tokenizer, and so whose text encoder, a generator's run reads.

    Raises:
        ValueError: there is none, or more than one; says so of the evaluator `name`.
    """
    specs = generator.recipe.tokenizers().values() if isinstance(generator, Generator) else ()
    found = sorted({spec.workdir for spec in specs if spec.kind == "trained" and spec.workdir})
    if len(found) != 1:
        known = (
            f"it reads the text encoders of several runs, {', '.join(found)}" if found else "it reads that of no run"
        )
        raise ValueError(
            f"{name} needs a run of the recipe 'contrastive': name it in the option `workdir`, or evaluate a run "
            f"that reads its text encoder ({known})"
        )
    return found[0]


def compares(run: Generator) -> bool:
    """Whether a run embeds images and texts. Its `generate` is traced, and nothing is computed."""
    recipe, batch = run.recipe, next(iter(run.recipe.batch_specs().values()))
    names = {"image", *recipe.conditions()}
    if not run.takes_prompts or not names <= set(batch):
        return False
    given = {name: batch[name] for name in names}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch["image"].shape[0]))
    outputs = jax.eval_shape(lambda *a: recipe.generate(*a, recipe.options), run.params, run.frozen, given, keys)
    return {"image", "text"} <= set(outputs)


def embeddings(clip: Generator, images: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors `[N, D]` of images `uint8 [N, H, W, 3]` and of their prompts, by a contrastive run.

    Raises:
        ValueError: the images are not of the size that it was trained on.
    """
    found = clip.run(list(prompts), conditions={"image": images})
    return found["image"], found["text"]
