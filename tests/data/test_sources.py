"""The built-in sources: shapes and digits are pure functions of index and draw."""

import dataclasses
import pickle

import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.shapes_grammar import ShapesConfig
from snapgen_jax.data.shapes_heldout import is_heldout
from snapgen_jax.data.sources import build_source, hold_out
from snapgen_jax.data.words import class_caption


@pytest.mark.parametrize("name", ["shapes", "digits"])
def test_an_example_depends_on_its_index_and_draw_alone_even_in_a_copy(name) -> None:
    source = build_source(DataConfig(source=name))
    copy = pickle.loads(pickle.dumps(source))
    for index in (0, 7, len(source) - 1):
        a, b = (s.example(index, np.random.default_rng(3)) for s in (source, copy))
        assert a.keys() == b.keys() == source.spec().keys()
        for entry, value in a.items():
            np.testing.assert_array_equal(value, b[entry])
            assert np.array_equal(value, source.example(index, np.random.default_rng(3), (entry,))[entry])
    said = {source.example(5, np.random.default_rng(i), ("caption",))["caption"] for i in range(40)}
    assert len(said) > 2, "phrasings vary with the draw"


def test_shapes_validation_scenes_are_others_and_seen_combinations_only() -> None:
    config = DataConfig(shapes=ShapesConfig(size=64))
    train, validation = (build_source(config, split) for split in ("train", "validation"))
    assert train.example(0, np.random.default_rng(0))["image"].shape == (64, 64, 3)
    scenes = {train.scene(i) for i in range(300)}
    assert len(scenes) == 300
    for index in range(300):
        scene = validation.scene(index)
        assert scene not in scenes
        assert not is_heldout(scene)


def test_digits_are_all_there_once_and_say_what_they_are() -> None:
    train, validation = (build_source(DataConfig(source="digits"), split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 1797 and len(validation) == 89
    names = {s.name(i) for s in (train, validation) for i in range(len(s))}
    assert len(names) == 1797
    # An upright stroke in the middle is a one and an empty middle a zero, if captions belong to their images.
    ink = {"zero": [], "one": []}
    for index in range(len(train)):
        example = train.example(index, np.random.default_rng(index))
        for label, (word, values) in enumerate(ink.items()):
            if word in example["caption"].split():
                values.append(example["image"][3:5, 3:5].mean())
                assert example["label"] == label
    assert len(ink["one"]) > 100
    assert np.mean(ink["one"]) > 150 > 60 > np.mean(ink["zero"])


def test_random_batches_are_no_source() -> None:
    with pytest.raises(DataError, match=r"random batches hold no examples; train with another data\.source"):
        build_source(DataConfig(source="synthetic"), "validation")


def test_hold_out_divides_the_examples() -> None:
    train, validation = hold_out(100, "train", 0.2), hold_out(100, "validation", 0.2)
    assert len(validation) == 20
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(100))


def test_a_validation_split_says_whether_it_is_held_out() -> None:
    digits = DataConfig(source="digits")
    assert build_source(digits, "validation").held_out and build_source(DataConfig(), "validation").held_out
    assert not build_source(dataclasses.replace(digits, validation_share=0.0001), "validation").held_out
    assert build_source(dataclasses.replace(digits, validation_share=0.0001), "train").held_out


def test_class_labels_become_captions() -> None:
    assert class_caption("tabby_cat") == "a photo of a tabby cat"
    assert class_caption("Afghan hound") == "a photo of an Afghan hound"
