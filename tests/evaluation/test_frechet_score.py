"""Distance to real images and difference between seeds, as evaluators."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.evaluation import clip_score
from snapgen_jax.evaluation.frechet_score import DiversityScore, FrechetScore, JointFrechetScore
from snapgen_jax.generation import Generator
from tests.generators_for_tests import TOKENS, Circle, Numbers, by_edit, by_label, by_prompt
from tests.generators_for_tests import Validation as Split


@dataclasses.dataclass
class Batch:
    arrays: dict
    valid: np.ndarray
    source_index: np.ndarray
    bucket: str = "16x16"


def real(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (16, 16, 3)).astype(np.uint8)


class Source:
    held_out = True

    def __len__(self):
        return 48

    def example(self, index, rng, names):
        return {"caption": f"noise {index}"}


class Validation:
    """48 images in batches of 8, over and over."""

    source = Source()

    def __iter__(self):
        while True:
            for start in range(0, 48, 8):
                rows = np.arange(start, start + 8)
                images = np.stack([real(i) for i in rows])
                yield Batch({"image": images}, rows != 3, rows)


class Copier:
    """A perfect model: fresh images of the same kind."""

    def generate(self, prompts, *, seed=0, indices=None, **options):
        self.prompts = prompts
        return np.stack([real(10_000 + n) for n in range(len(prompts))])


class Collapsed:
    """Draws one image, whatever it is asked."""

    def generate(self, prompts, *, seed=0, indices=None, **options):
        return np.stack([real(5) // 2] * len(prompts))


def test_a_perfect_model_scores_as_real_images_do_and_a_collapsed_one_far_worse():
    perfect, collapsed = (FrechetScore(examples=16)(g, Validation()).numbers for g in (Copier(), Collapsed()))
    assert perfect["frechet.real"] == collapsed["frechet.real"]
    assert perfect["frechet.distance"] < 1.5 * perfect["frechet.real"]
    assert collapsed["frechet.distance"] > 5 * perfect["frechet.distance"]


def test_captions_are_those_of_readable_images_and_a_small_split_is_halved():
    copier = Copier()
    FrechetScore(examples=512)(copier, Validation())
    assert copier.prompts == [f"noise {i}" for i in range(24) if i != 3]  # 47 readable images


def test_without_images_there_is_nothing_to_compare_with():
    with pytest.raises(ValueError, match="validation split"):
        FrechetScore()(Copier())


def test_seeds_differ_or_do_not():
    prompts = ("a", "b")
    diverse = DiversityScore(prompts=prompts, images=3)(Copier()).numbers["diversity.pairwise"]
    assert DiversityScore(prompts=prompts, images=3)(Collapsed()).numbers["diversity.pairwise"] == 0.0 < diverse
    found = DiversityScore(prompts=(*prompts, *prompts), images=3)(Copier())
    numbers = found.numbers
    assert found.values["diversity.pairwise"].mean() == pytest.approx(numbers["diversity.pairwise"])
    assert numbers["diversity.pairwise.low"] < numbers["diversity.pairwise"] < numbers["diversity.pairwise.high"]


# --- pairs of image and caption ---------------------------------------------------------------------------------------


@pytest.fixture
def eyes(monkeypatch):
    """A contrastive run, whose embeddings of an image and of its caption are equal."""
    run = Generator(Circle(TOKENS), jnp.int32(0), jnp.int32(0), Numbers())
    monkeypatch.setattr(clip_score, "load", lambda workdir: run)


class Shifted:
    """A run whose images are all right, each for the caption before it."""

    def __init__(self, made):
        self.made = made

    def generate(self, prompts, **options):
        return np.roll(self.made.generate(prompts, **options), 1, axis=0)


def test_right_images_of_other_captions_are_far_away_together_with_their_captions_alone(eyes):
    right, shifted = by_prompt(), Shifted(by_prompt())
    images = [FrechetScore()(made, Split()).numbers["frechet.distance"] for made in (right, shifted)]
    assert images[0] == pytest.approx(images[1], rel=1e-4)
    pairs = [JointFrechetScore("run")(made, Split()).numbers for made in (right, shifted)]
    assert pairs[0]["joint_frechet.distance"] == pytest.approx(pairs[0]["joint_frechet.real"], rel=1e-4)
    assert pairs[1]["joint_frechet.distance"] > pairs[0]["joint_frechet.distance"] + 0.1
    assert pairs[0]["joint_frechet.permuted"] > pairs[0]["joint_frechet.distance"] + 0.1
    assert pairs[0]["joint_frechet.real"] == pairs[1]["joint_frechet.real"]


def test_what_has_no_captions_has_no_joint_distance(eyes):
    with pytest.raises(ValueError, match="joint_frechet compares images with their captions, and this run takes no"):
        JointFrechetScore("run")(by_label(), Split())
    with pytest.raises(ValueError, match="joint_frechet needs a run of the recipe 'contrastive': name it"):
        JointFrechetScore()(by_prompt(), Split())


# --- runs with other conditions and outputs --------------------------------------------------------------------------


def test_a_class_conditional_run_is_given_the_labels_of_one_half_of_the_split():
    made = by_label()
    asked = []
    draw = made.recipe.generate
    made.recipe.generate = lambda params, frozen, conditions, keys, options: (
        asked.append(conditions) or draw(params, frozen, conditions, keys, options)
    )
    numbers = FrechetScore()(made, Split()).numbers
    assert numbers["frechet.distance"] > numbers["frechet.real"] > 0  # labels are ten times the grey of the image
    assert [set(conditions) for conditions in asked] == [{"label"}]
    assert asked[0]["label"].shape == (5,)  # of ten readable examples


def test_the_real_images_are_the_array_that_is_named():
    image, source = (FrechetScore(reference=name)(by_edit(), Split()).numbers for name in ("image", "source"))
    assert source["frechet.real"] > image["frechet.real"]  # its greys are twice as far apart
    with pytest.raises(ValueError, match="no array 'target'; it has 'image', 'source', 'label', 'states'"):
        FrechetScore(reference="target")(by_prompt(), Split())
    with pytest.raises(ValueError, match=r"array 'label' .* is int32 \[N\], .* set its option `reference`"):
        FrechetScore(reference="label")(by_prompt(), Split())


@pytest.mark.parametrize("evaluator", [FrechetScore, DiversityScore])
def test_outputs_that_are_no_images_are_refused_with_those_there_are(evaluator):
    with pytest.raises(ValueError, match=r"'clip' is uint8 \[N, 12, 8, 8, 3\], .* reads images.*'image' uint8"):
        evaluator(output="clip")(by_prompt(), Split())
    with pytest.raises(ValueError, match=r"no output 'video'; .*`output` to one of 'clip' uint8 .* 'image' uint8"):
        evaluator(output="video")(by_prompt(), Split())


def test_the_diversity_of_a_class_conditional_run_is_that_of_its_labels():
    found = DiversityScore(count=3, images=2)(by_label(), Split())
    assert found.values["diversity.pairwise"].tolist() == [0, 0, 0]  # it paints a label in one grey, whatever the seed
