"""Pairs as a stage of a chain: a run's own images, the better and the worse of each prompt as a judge sees them."""

import json

import numpy as np
import pytest
from etils import epath

from snapgen_jax.chain import load_chain
from snapgen_jax.chain_run import _Chain
from snapgen_jax.config import build_dataclass
from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.shapes import Scene, SceneObject, render
from snapgen_jax.data.sources import build_source
from snapgen_jax.derivations import preference_pairs
from snapgen_jax.derivations.preference_pairs import Options, asked_for, derive, exact
from snapgen_jax.evaluation.compositional import fixed_prompts
from snapgen_jax.training.exits import ConfigError

OPTIONS = {"prompts": 6, "images": 3, "shards": 3, "batch_size": 4, "generation": {"steps": 1}}


class Draws:
    """A run whose images are noise of (seed, index), and are brighter for longer prompts."""

    takes_prompts, condition_names = True, ()

    def generate(self, prompts, *, seed, indices, batch_size, steps):
        assert (batch_size, steps) == (4, 1)
        rngs = [np.random.default_rng((seed, index)) for index in indices]
        return np.stack(
            [rng.integers(0, 100 + len(text), (32, 32, 3), np.uint8) for rng, text in zip(rngs, prompts, strict=True)]
        )


@pytest.fixture
def base(monkeypatch):
    """The name of such a run."""
    monkeypatch.setattr(preference_pairs, "load", lambda workdir: Draws())
    return epath.Path("runs/base")


def brightness(images, asked):
    """A judge that always sees a difference."""
    return images.reshape(len(images), -1).mean(axis=1)


@pytest.fixture
def bright(monkeypatch):
    monkeypatch.setattr(preference_pairs, "exact", brightness)


def test_the_detector_accepts_what_was_asked_for_and_nothing_else():
    asked = asked_for(Options(categories=("colours",)), 0)
    (demand,) = asked.requirement.demands
    right = SceneObject(demand.kind, demand.colour, 0.5, 0.5, 0.5)
    wrong = SceneObject(demand.kind, "red" if demand.colour != "red" else "blue", 0.5, 0.5, 0.5)
    images = np.stack([render(Scene((item,), (), "colours"), 32) for item in (right, wrong)])
    np.testing.assert_array_equal(exact(images, [asked, asked]), [1, 0])


def test_no_prompt_is_one_of_the_score_and_all_categories_take_turns():
    options, kept = Options(), {prompt.prompt for prompt in fixed_prompts()}
    asked = [asked_for(options, n) for n in range(60)]
    assert not kept & {one.prompt for one in asked} and asked[7] == asked_for(options, 7)
    assert sum(one.requirement.relation is not None for one in asked) == 10
    assert len({one.prompt for one in asked}) > 40


def test_the_best_and_the_worst_of_each_prompt_are_kept_and_read_as_a_source(base, tmp_path, bright):
    found = derive({"base": base}, epath.Path(tmp_path), OPTIONS)
    assert found["pairs"] == found["prompts"] == 6 and found["score"] > found["other_score"]
    source = build_source(DataConfig(source="stored", path=found["path"], validation_share=0.0))
    assert len(source) == 6 and set(source.spec()) == {"image", "other_image", "caption"}
    captions = []
    for n in range(6):
        example = source.example(n, np.random.default_rng(0))
        captions.append(example["caption"])
        places = [3 * n, 3 * n + 1, 3 * n + 2]
        images = Draws().generate([example["caption"]] * 3, seed=0, indices=places, batch_size=4, steps=1)
        order = np.argsort(brightness(images, None))
        np.testing.assert_array_equal(example["image"], images[order[-1]])
        np.testing.assert_array_equal(example["other_image"], images[order[0]])
    assert captions == [asked_for(Options(), n).prompt for n in range(6)]


def test_a_stage_that_was_stopped_draws_no_shard_twice(base, tmp_path, bright, monkeypatch):
    whole, stopped = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "stopped")
    derive({"base": base}, whole, OPTIONS)
    generate, calls = Draws.generate, []

    def failing(self, prompts, **options):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, **options)

    monkeypatch.setattr(Draws, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        derive({"base": base}, stopped, OPTIONS)
    assert not (stopped / "pairs" / "manifest.json").exists()
    again = derive({"base": base}, stopped, OPTIONS)
    assert calls == [6] * 4 and again["pairs"] == 6
    for name in [json.loads(line)["value"]["shard"]["file"] for line in (whole / "items.jsonl").open()]:
        assert (whole / "pairs" / name).read_bytes() == (stopped / "pairs" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 1}, "images"),
        ({"categories": ("cats",)}, "there is no .cats.; there are single_object"),
        ({**OPTIONS, "prompts": 2}, "saw no difference of 0.1 among the 3 images of any of 2 prompts; draw more"),
    ],
)
def test_options_that_mean_nothing_and_pairs_that_do_not_differ_are_refused(base, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        derive({"base": base}, epath.Path(tmp_path), options)
    assert not (tmp_path / "pairs" / "manifest.json").exists()


def test_a_judge_must_say_how_well_an_image_fits(base, tmp_path):
    with pytest.raises(ConfigError, match="fits a prompt; name a run of 'detection' or 'matching'"):
        derive({"base": base, "reward": base}, epath.Path(tmp_path), OPTIONS)


@pytest.mark.parametrize("arg", ["", ":quick", ":runlocal"])
def test_the_chain_fills_the_folder_of_the_pairs_into_the_stage_that_learns(arg, tmp_path):
    chain, overrides = load_chain(f"configs/shapes/preference_chain.py{arg}", ["pairs.images=8"])
    names = [stage.name for stage in chain.stages]
    assert [name for name in names if name != "reward"] == ["base", "pairs", "preference"]
    pairs = chain.stages[names.index("pairs")]
    assert build_dataclass(Options, dict(pairs.options)).images == 8
    run = _Chain(chain, overrides, epath.Path(tmp_path))
    run.derived["pairs"] = {"path": "somewhere/pairs", "pairs": 4}
    config = run._config(run.stages["preference"])
    assert config.recipe.base == str(tmp_path / "base") and config.experiment.data.path == "somewhere/pairs"
    if "reward" in names:
        assert run._config(run.stages["reward"]).recipe.network.kind == "detection"
