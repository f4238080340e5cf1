"""Pairs of images of which one is preferred, drawn by a trained run and told apart by a judge: a stage of a chain.

    {"name": "pairs", "derive": "snapgen_jax.derivations.preference_pairs:derive", "earlier": {"base": "base"},
     "options": {"prompts": 1024, "images": 4}, "example": {"path": "pairs", "pairs": 1}}
    {"name": "preference", "config": "preference.py", "earlier": {"base": "base"},
     "filled": {"data.path": "pairs.path"}}

Several images are drawn for each prompt. Where the judge sees a difference, the best and the worst are kept, as `image`
and `other_image` of a folder of shards that the source "stored" reads. The judge is the exact detector of the shapes
world, or a run of the recipe `detection` or `matching`. A shard is an item, so that a stage that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath
from PIL import Image

from snapgen_jax.bookkeeping import Items
from snapgen_jax.bounds import SEED, at_least, check
from snapgen_jax.config import build_dataclass
from snapgen_jax.data.prompts import CATEGORIES, Requirement, requirement
from snapgen_jax.data.shapes_captions import caption
from snapgen_jax.data.shapes_grammar import ShapesConfig, sample_scene
from snapgen_jax.data.shards import Manifest, Shard, StoredArray, shard_name, write_shard
from snapgen_jax.evaluation.compositional import fixed_prompts
from snapgen_jax.evaluation.detector import detect
from snapgen_jax.generation import Generator, load
from snapgen_jax.training.exits import ConfigError

FOLDER = "pairs"
ARRAYS = {
    "image": StoredArray("bytes"),
    "other_image": StoredArray("bytes"),
    "captions": StoredArray("text", captions=True),
    "height": StoredArray("int32"),
    "width": StoredArray("int32"),
    "score": StoredArray("float64"),
    "other_score": StoredArray("float64"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the stage.

    Attributes:
        prompts: how many; captions of scenes of the shapes world, other than those of the compositional score.
        categories: of these scenes, in turn.
        images: how many are drawn for each prompt.
        least_difference: of the judge's scores of the best and the worst, below which nothing is kept of a prompt.
        shards: into how many files the pairs go; each is made in one piece.
        seed: prompt n is drawn from (seed, n), and its images from (seed, n * images) on.
        batch_size: images at a time.
        generation: options of the generator, such as {"steps": 8}.
    """

    prompts: int = 1024
    categories: tuple[str, ...] = CATEGORIES
    images: int = 4
    least_difference: float = 0.1
    shards: int = 8
    seed: int = 0
    batch_size: int = 64
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, prompts=at_least(1), images=at_least(2), least_difference=at_least(0), seed=SEED)
        check(self, shards=at_least(1), batch_size=at_least(1))
        unknown = [name for name in self.categories if name not in CATEGORIES]
        if unknown or not self.categories:
            raise ValueError(f"categories: there is no {', '.join(unknown)!r}; there are {', '.join(CATEGORIES)}")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, and what an image of it must show."""

    prompt: str
    requirement: Requirement


class Judge(Protocol):
    """What images are worth; higher is better."""

    def __call__(self, images: np.ndarray, asked: Sequence[Asked]) -> np.ndarray:
        """Scores `[N]` of images uint8 `[N, H, W, 3]`, one asked for each."""
        ...


def exact(images: np.ndarray, asked: Sequence[Asked]) -> np.ndarray:
    """1 where the detector finds exactly what was asked for, and 0 elsewhere."""
    return np.array([float(one.requirement.met_by(detect(x))) for x, one in zip(images, asked, strict=True)])


@dataclasses.dataclass(frozen=True)
class Matched:
    """The probability that an image shows what its prompt says, by a run of the recipe `detection` or `matching`."""

    run: Generator
    batch_size: int

    def __call__(self, images: np.ndarray, asked: Sequence[Asked]) -> np.ndarray:
        prompts = [one.prompt for one in asked]
        found = self.run.run(prompts, conditions={"image": images}, batch_size=self.batch_size)
        return found["match"].astype(np.float64)


def derive(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs of a run's own images.

    Args:
        stages: "base", the run that draws; optionally "reward", a run of `detection` or `matching` that judges
            in place of the exact detector.
        workdir: of the stage; the pairs are its folder "pairs".
        options: fields of `Options`.

    Returns:
        "path", that folder; "pairs", how many there are; "prompts", of how many; "score" and "other_score", what the
        judge gives the better and the worse on average.

    Raises:
        ConfigError: the options are none, the run takes no prompts, or "reward" is of another recipe; or there is no
            pair, since the judge saw no difference.
    """
    chosen: Options = build_dataclass(Options, dict(options))
    generator = load(stages["base"])
    if not generator.takes_prompts:
        raise ConfigError(f"{stages['base']} takes no prompts, of whose images pairs are made")
    judge = _judge(stages.get("reward"), chosen)
    folder, items = workdir / FOLDER, Items(workdir)
    parts = np.array_split(np.arange(chosen.prompts), min(chosen.shards, chosen.prompts))
    found = [
        items.run(
            f"shard {k + 1} of {len(parts)}",
            functools.partial(_shard, generator, judge, chosen, part, folder, shard_name("pairs", k, len(parts))),
        )
        for k, part in enumerate(parts)
    ]
    pairs = sum(one["shard"]["examples"] for one in found)
    if not pairs:
        raise ConfigError(
            f"the judge saw no difference of {chosen.least_difference} among the {chosen.images} images of any of "
            f"{chosen.prompts} prompts; draw more images a prompt, or other categories, or lower least_difference"
        )
    shards = tuple(Shard(**one["shard"]) for one in found if one["shard"]["examples"])
    facts = {"options": dataclasses.asdict(chosen), "base": str(stages["base"]), "judge": _name(stages.get("reward"))}
    Manifest("images", ARRAYS, shards, facts).write(folder)
    means = {name: sum(one[name] for one in found) / pairs for name in ("score", "other_score")}
    return {"path": str(folder), "pairs": pairs, "prompts": chosen.prompts, **means}


def asked_for(options: Options, number: int) -> Asked:
    """Prompt `number`: a caption of a scene whose combinations training shows, and not one of the compositional score,
    so that this is still of prompts that nothing learnt from."""
    kept = {prompt.prompt for prompt in fixed_prompts()}
    category = options.categories[number % len(options.categories)]
    rng = np.random.default_rng((options.seed, number))
    config = ShapesConfig(relation_colours=0.0)
    while True:
        scene = sample_scene(rng, "seen", config, category)  # type: ignore[arg-type]
        text = caption(scene, rng)
        if text not in kept:
            return Asked(text, requirement(scene))


def _judge(reward: epath.Path | None, options: Options) -> Judge:
    if reward is None:
        return exact
    run = load(reward)
    if not run.takes_prompts or "image" not in run.condition_names:
        raise ConfigError(
            f"{reward} does not say how well an image fits a prompt; name a run of 'detection' or 'matching' as "
            "`reward`, or leave it out for the exact detector"
        )
    return Matched(run, options.batch_size)


def _name(reward: epath.Path | None) -> str:
    return "detector" if reward is None else str(reward)


def _shard(
    generator: Generator, judge: Judge, options: Options, numbers: np.ndarray, folder: epath.Path, file: str
) -> dict[str, Any]:
    """Draws for some prompts, and writes their pairs: `{"shard", "score", "other_score"}`, the latter as sums."""
    asked = [asked_for(options, int(number)) for number in numbers for _ in range(options.images)]
    indices = [int(number) * options.images + k for number in numbers for k in range(options.images)]
    images = generator.generate(
        [one.prompt for one in asked],
        seed=options.seed,
        indices=indices,
        batch_size=options.batch_size,
        **options.generation,
    )
    scores = judge(images, asked).reshape(len(numbers), options.images)
    best, worst = (
        np.arange(len(numbers)) * options.images + place for place in (scores.argmax(axis=1), scores.argmin(axis=1))
    )
    scores = scores.ravel()
    kept = [
        (i, j) for i, j in zip(best, worst, strict=True) if scores[i] - scores[j] >= max(options.least_difference, 1e-9)
    ]
    shard = write_shard(folder, file, (_pair(images, asked, scores, i, j) for i, j in kept))
    sums = {name: float(sum(scores[pair[side]] for pair in kept)) for side, name in enumerate(("score", "other_score"))}
    return {"shard": dataclasses.asdict(shard), **sums}


def _pair(images: np.ndarray, asked: Sequence[Asked], scores: np.ndarray, i: int, j: int) -> dict[str, Any]:
    """A record: image i, which is preferred to image j."""
    height, width = images.shape[1:3]
    return {
        "image": _png(images[i]),
        "other_image": _png(images[j]),
        "captions": [asked[i].prompt],
        "height": np.int32(height),
        "width": np.int32(width),
        "score": np.float64(scores[i]),
        "other_score": np.float64(scores[j]),
    }


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
