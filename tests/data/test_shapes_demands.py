"""What a caption demands is read off its words, and is what its scene says."""

import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.prompts import CATEGORIES, Demand, Requirement, requirement
from snapgen_jax.data.shapes import COLOURS, KINDS, RELATIONS
from snapgen_jax.data.shapes_captions import caption, dense, layout
from snapgen_jax.data.shapes_changes import CHANGES, ShapesChanges
from snapgen_jax.data.shapes_demands import DemandTokenizer, demanded, numbers
from snapgen_jax.data.shapes_grammar import ShapesConfig, sample_scene
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tokenizer_specs import load_tokenizers
from snapgen_jax.inputs.interfaces import TokenizerSpec

LENGTH = 10


@pytest.mark.parametrize("category", (*CATEGORIES, "mixed"))
@pytest.mark.parametrize("combinations", ["seen", "heldout"])
def test_the_demand_of_a_caption_is_that_of_its_scene(category, combinations):
    rng = np.random.default_rng(0)
    for _ in range(150):
        scene = sample_scene(rng, combinations, category=category)
        text = caption(scene, rng)
        assert demanded(text) == requirement(scene), text
        assert demanded(f" {text.upper()}\n") == requirement(scene)
        DemandTokenizer().encode([text], LENGTH)  # no two of its groups overlap


def test_the_false_captions_of_the_data_are_read_too():
    source = ShapesChanges(ShapesConfig(), "train")
    for index in range(200):
        example = source.example(index, np.random.default_rng(index))
        true, false = demanded(example["caption"]), demanded(example["other_caption"])
        assert true is not None and false is not None and true != false
        DemandTokenizer().encode([example["caption"], example["other_caption"]], LENGTH)
        objects = source._scenes.scene(index).objects
        assert true.met_by(objects) and not false.met_by(objects), CHANGES[int(example["changed"])]


def test_a_row_of_numbers_says_kind_colour_and_count_of_each_group_and_the_relation():
    row = numbers(Requirement((Demand("star", 2, "blue"), Demand("ring")), "above"), LENGTH)
    star, ring, blue = 1 + KINDS.index("star"), 1 + KINDS.index("ring"), 1 + list(COLOURS).index("blue")
    assert row.tolist() == [star, blue, 2, ring, 0, 1, 0, 0, 0, 1 + RELATIONS.index("above")]
    tokens, mask = DemandTokenizer().encode(["a ring", "", "two blue stars over a ring"], LENGTH)
    assert tokens.dtype == np.int32 and mask.dtype == np.float32
    assert tokens[0].tolist() == [ring, 0, 1, *[0] * 7] and not tokens[1].any()
    assert tokens[2].tolist() == row.tolist()
    assert mask.tolist() == [[1] * 3 + [0] * 7, [0] * 10, [1] * 6 + [0] * 3 + [1]]


def test_other_texts_are_refused_by_name():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, category="binding")
    texts = [dense(scene, rng), layout(scene), "a moon", "two star", "a stars", "a red", "stars", "a ring and", "ring"]
    for text in texts:
        with pytest.raises(DataError, match="is no caption whose demands can be read") as error:
            DemandTokenizer().encode(["a star", text], LENGTH)
        assert repr(text) in str(error.value) and "data.shapes.dense_share=0" in str(error.value)
    with pytest.raises(DataError, match="demands 3 different groups of objects, and there is room for 2"):
        DemandTokenizer().encode(["a star, a ring and a cross"], 7)


@pytest.mark.parametrize(
    "text",
    ["a red circle left of a red circle", "a circle and a red circle", "two red stars, a ring and a star"],
)
def test_groups_of_which_one_object_fits_two_are_refused(text):
    with pytest.raises(DataError, match="is met by no image"):
        DemandTokenizer().encode([text], LENGTH)
    DemandTokenizer().encode(["a red circle left of a blue circle"], LENGTH)


def test_a_run_names_it_as_the_tokenizer_of_an_array():
    specs = {"demands": TokenizerSpec("demands", LENGTH, 9)}
    tokenizer = load_tokenizers(specs, None)
    assert tokenizer is not None and tokenizer.names == ("demands", "demands_mask")
    found = tokenizer.arrays(["four crosses"], {"demands": LENGTH})["demands"]
    assert found.tolist() == [[1 + KINDS.index("cross"), 0, 4, *[0] * 7]] and found.max() < 9


def test_the_source_lists_the_objects_of_its_scenes():
    config = ShapesConfig()
    source = build_source(DataConfig(source="shapes_changes", shapes=config))
    example = source.example(3, np.random.default_rng(0), ("objects", "places"))
    scene = source._scenes.scene(3)
    assert "image" not in example
    for row, item in enumerate(scene.objects):
        kind, colour = example["objects"][row]
        assert (KINDS[kind - 1], tuple(COLOURS)[colour - 1]) == (item.kind, item.colour)
        np.testing.assert_allclose(0.5 * (example["places"][row] + 1), (item.x, item.y), atol=1e-6)
    assert not example["objects"][len(scene.objects) :].any()
