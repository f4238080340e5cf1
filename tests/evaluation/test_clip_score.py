"""The CLIP score with a contrastive run that is given, and where it is found otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.evaluation import clip_score
from snapgen_jax.evaluation.clip_score import ClipScore, text_workdir
from snapgen_jax.generation import Generator
from tests.generators_for_tests import TOKENS, Circle, Numbers, Validation, by_label, by_prompt


@pytest.fixture
def loaded(monkeypatch):
    """The workdirs that are loaded; each is a contrastive run."""
    names = []

    def load(workdir):
        names.append(workdir)
        return Generator(Circle(TOKENS), jnp.int32(0), jnp.int32(0), Numbers())

    monkeypatch.setattr(clip_score, "load", load)
    return names


def test_images_of_their_prompts_score_one_and_the_next_prompts_what_the_angles_say(loaded):
    numbers = ClipScore("run", prompts=("0", "4", "8", "12"))(by_prompt()).numbers
    assert loaded == ["run"] and numbers["clip.score"] == pytest.approx(1, abs=1e-6)
    assert numbers["clip.chance"] == pytest.approx(0, abs=1e-6)
    assert ClipScore("run", count=4)(by_prompt(2), Validation()).numbers["clip.score"] == pytest.approx(0.5**0.5)


def test_the_run_is_by_default_the_one_whose_tokenizer_the_generator_reads(loaded):
    ClipScore(prompts=("1",))(by_prompt(workdirs=("text", "text")))
    assert loaded == ["text"]
    for workdirs, known in (((), "that of no run"), (("a", "b"), "several runs, a, b")):
        with pytest.raises(ValueError, match=f"name it in the option `workdir`.*{known}"):
            text_workdir(by_prompt(workdirs=workdirs))
    assert loaded == ["text"]


@pytest.mark.parametrize("other", [by_prompt, by_label])
def test_a_run_of_another_kind_is_refused_before_anything_is_drawn(monkeypatch, other):
    made = by_prompt()
    monkeypatch.setattr(clip_score, "load", lambda workdir: other())
    with pytest.raises(ValueError, match=r"other does not compare images with texts; name a run of .* 'contrastive'"):
        ClipScore("other", prompts=("1",))(made)
    assert made.recipe.traced == 0


def test_what_has_no_prompts_or_no_images_has_no_score(loaded):
    with pytest.raises(ValueError, match="this run takes no prompts"):
        ClipScore("run")(by_label(), Validation())
    with pytest.raises(ValueError, match=r"'depth' is float32 .* reads images"):
        ClipScore("run", prompts=("1",), output="depth")(by_prompt())
    large = jax.ShapeDtypeStruct((4, 16, 16, 3), np.uint8)
    clip = Generator(Circle({"16x16": {**TOKENS["8x8"], "image": large}}), jnp.int32(0), jnp.int32(0), Numbers())
    with pytest.raises(ValueError, match=r"\['image'\] is uint8 \[1, 8, 8, 3\]; expected image uint8 \[N, 16, 16, 3\]"):
        clip_score.embeddings(clip, np.zeros((1, 8, 8, 3), np.uint8), ["1"])
