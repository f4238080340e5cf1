"""A few new examples beside others: they take turns, are marked, and none of the world's scenes has the new object."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data.config import DataConfig, TuningConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.shapes import KINDS, UNSEEN_KINDS
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tuning_source import SHOWN_COLOURS
from snapgen_jax.evaluation.detector import DetectorConfig, detect

WITH_MOON = DetectorConfig(kinds=(*KINDS, "moon"))


def source(split="train", **changes):
    return build_source(DataConfig(source="tuning", tuning=TuningConfig(**{"new": "moon", **changes})), split)


def example(of, index, seed=0):
    return of.example(index, np.random.default_rng(seed))


def test_new_examples_and_those_of_the_world_take_turns_and_are_marked():
    both, alone = source(prior="shapes"), source()
    assert len(alone) == 10 and len(both) == 2 * DataConfig().shapes.train_examples
    assert [float(example(both, i)["prior"]) for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert not any(example(alone, i)["prior"] for i in range(10))
    world = build_source(DataConfig(source="shapes"), "train")
    for i in (0, 3, 77):
        np.testing.assert_array_equal(example(both, 2 * i + 1)["image"], example(world, i)["image"])
        np.testing.assert_array_equal(example(both, 2 * i)["image"], example(alone, i % 10)["image"])
    assert "moon" in example(both, 20)["caption"] and "moon" not in example(both, 21)["caption"]
    assert both.name(20) == "new object 0" and both.name(21) == "shapes scene 10"


def test_the_new_object_is_seen_alone_in_the_colour_that_is_said_and_is_none_of_the_world():
    moons, colours = source(word="blick"), set()
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


def folder(path, count):
    path.mkdir()
    for i in range(count):
        Image.new("RGB", (8 + i, 8), (i, 0, 0)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"a picture of my dog number {i}")
    return str(path)


def test_own_pictures_and_pictures_drawn_before_come_from_folders(tmp_path):
    new, prior = folder(tmp_path / "new", 3), folder(tmp_path / "prior", 5)
    tuning = TuningConfig(prior="folder", prior_path=prior)
    config = DataConfig(source="tuning", path=new, tuning=tuning, validation_share=0.0)
    both = build_source(config, "train")
    assert len(both) == 10
    assert [int(example(both, i)["image"][0, 0, 0]) for i in range(10)] == [0, 0, 1, 1, 2, 2, 0, 3, 1, 4]
    np.testing.assert_array_equal(both.sizes()[:4], [[8, 8], [8, 8], [8, 9], [8, 9]])
    assert "prior" in both.spec() and both.example(0, np.random.default_rng(0), ("prior",))["prior"] == 0


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"new": "folder"}, "", "'folder' needs data.path"),
        ({"new": "moon"}, "pictures", r"data.path is 'pictures' and data.tuning.new='moon' renders"),
        ({"new": "moon", "prior": "folder"}, "", "needs data.tuning.prior_path; `snapgen adapters prior` writes one"),
    ],
)
def test_what_is_missing_is_named(changes, path, message):
    config = DataConfig(source="tuning", path=path, tuning=TuningConfig(**changes))
    with pytest.raises(DataError, match=message):
        build_source(config, "train")


def test_without_examples_there_is_no_config():
    with pytest.raises(ValueError, match="examples is 0"):
        dataclasses.replace(TuningConfig(), examples=0)
