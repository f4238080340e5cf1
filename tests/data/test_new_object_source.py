"""A few pictures of a new object: it is seen alone, in the colour that is said, and is none of the world."""

import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig, DomainConfig, NewObjectConfig
from snapgen_jax.data.new_object import SHOWN_COLOURS
from snapgen_jax.data.shapes import KINDS, UNSEEN_KINDS
from snapgen_jax.data.sources import build_source
from snapgen_jax.evaluation.detector import DetectorConfig, detect

WITH_MOON = DetectorConfig(kinds=(*KINDS, "moon"))


def source(split="train", **changes):
    return build_source(DataConfig(source="new_object", new_object=NewObjectConfig(**changes)), split)


def example(of, index, seed=0):
    return of.example(index, np.random.default_rng(seed))


def test_the_new_object_is_seen_alone_in_the_colour_that_is_said_and_is_none_of_the_world():
    moons, colours = source(word="blick"), set()
    assert len(moons) == 10
    for i in range(10):
        found = example(moons, i, i)
        (seen,) = detect(found["image"], WITH_MOON)
        assert seen.kind == "moon" and detect(found["image"])[0].kind == "unknown"
        said = [colour for colour in SHOWN_COLOURS if colour in found["caption"]]
        assert said in ([], [seen.colour]) and "blick" in found["caption"]
        colours.add(seen.colour)
    assert colours == set(SHOWN_COLOURS) and not set(UNSEEN_KINDS) & set(KINDS)


def test_an_example_is_the_same_each_time_and_other_in_validation_and_of_another_seed():
    moons = source()
    np.testing.assert_array_equal(example(moons, 3)["image"], example(source(), 3)["image"])
    for other in (source("validation"), source(seed=1)):
        assert np.any(example(other, 3)["image"] != example(moons, 3)["image"])
    assert source("validation").held_out


def test_it_mixes_with_the_world():
    domains = DomainConfig(source="new_object"), DomainConfig(source="shapes")
    mixed = build_source(DataConfig(mixture=domains), "train")
    assert "moon" in example(mixed, 9)["caption"] and "moon" not in example(mixed, 10)["caption"]


def test_without_examples_there_is_no_config():
    with pytest.raises(ValueError, match="examples is 0"):
        NewObjectConfig(examples=0)
