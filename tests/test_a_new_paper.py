"""A paper is one recipe file: one that the package has never seen is trained, derived, drawn from and exported.

`paper/recipes/clip_adapter.py` feeds on clips, has two networks of which one is frozen from an earlier run, merges a
low-rank update in `weights`, takes its rank from a derived stage, and exports one feed-forward call. Its folder is put
on the path of `snapgen_jax.recipes`; nothing else knows of it.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

import snapgen_jax.recipes
from snapgen_jax.chain import load_chain
from snapgen_jax.chain_run import run_chain
from snapgen_jax.evaluation.pictures import film_strip
from snapgen_jax.export.client import Bundle
from snapgen_jax.export.run import export_run
from snapgen_jax.generation import load
from snapgen_jax.inputs.interfaces import Inputs
from snapgen_jax.training.metrics import read_lines
from snapgen_jax.training.recipe import Recipe

PAPER = pathlib.Path(__file__).with_name("paper")


@pytest.fixture(scope="module")
def paper():
    """The recipe's folder, beside those of the package."""
    snapgen_jax.recipes.__path__.append(str(PAPER / "recipes"))
    yield
    snapgen_jax.recipes.__path__.remove(str(PAPER / "recipes"))
    sys.modules.pop("snapgen_jax.recipes.clip_adapter", None)


@pytest.fixture(scope="module")
def chain(paper, tmp_path_factory):
    """The workdir of its chain, trained."""
    workdir = tmp_path_factory.mktemp("chain")
    run_chain(*load_chain(str(PAPER / "configs" / "chain.py")), workdir)
    return workdir


@pytest.fixture(scope="module")
def clips():
    return np.random.default_rng(5).integers(0, 256, (3, 4, 8, 8, 3), np.uint8)


def test_it_fulfils_the_contracts(chain):
    recipe = load(chain / "adapted").recipe
    assert isinstance(recipe, Recipe) and isinstance(recipe.inputs, Inputs)


def test_its_adapter_takes_the_rank_that_was_derived_before_it(chain):
    assert json.loads((chain / "rank" / "derived.json").read_text()) == {"adapter": {"rank": 2}}
    params = load(chain / "adapted").params["model"]
    assert params["adapter"]["a"].shape == (2, 4) and set(params) == {"adapter", "head"}


def test_it_learns_through_the_merged_weights_while_the_earlier_network_stays(chain):
    losses = [line["loss"] for line in read_lines(chain / "adapted" / "metrics" / "train.jsonl")]
    assert losses[-1] < 0.05 < 0.5 < losses[0]
    base, adapted = load(chain / "base"), load(chain / "adapted")
    frozen = adapted.frozen["mixer"]["kernel"]
    np.testing.assert_array_equal(frozen, base.params["model"]["mixer"]["kernel"])
    merged = adapted.recipe.weights(adapted.params, adapted.frozen)["mixer"]["kernel"]
    np.testing.assert_allclose(merged, np.eye(4)[::-1], atol=0.2)


def test_clips_come_out_reversed_and_are_shown_as_film_strips(chain, clips):
    drawn = load(chain / "adapted").run(conditions={"clip": clips})["clip"]
    assert drawn.shape == clips.shape and drawn.dtype == np.uint8
    assert np.abs(drawn.astype(int) - clips[:, ::-1]).mean() < 0.1 * np.abs(drawn.astype(int) - clips).mean() + 8
    assert film_strip(drawn[0]).shape[1] >= 4 * 8


def test_its_bundle_is_one_call_that_gives_what_the_run_gives(chain, clips, tmp_path):
    numbers = export_run(chain / "adapted", tmp_path / "bundle")
    assert numbers["export.adapter.rel_l2_f32"] < 1e-5
    run = load(chain / "adapted").run(conditions={"clip": clips})["clip"]
    sampler = Bundle(tmp_path / "bundle").sampler()
    for clip, expected in zip(clips, run, strict=True):
        assert np.abs(sampler.run({"clip": clip})["reversed"].astype(int) - expected).max() <= 1


def test_nothing_of_the_package_names_it():
    root = pathlib.Path(snapgen_jax.recipes.__file__).parents[1]
    assert not [path for path in root.rglob("*.py") if "clip_adapter" in path.read_text(encoding="utf-8")]
    assert jax.process_count() == 1
