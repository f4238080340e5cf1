"""False captions of the shapes world: false in one fact, and no less likely words than true ones."""

import collections

import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.prompts import requirement
from snapgen_jax.data.shapes import Group, Scene, SceneObject
from snapgen_jax.data.shapes_captions import place
from snapgen_jax.data.shapes_changes import CHANGES, ShapesChanges, changed
from snapgen_jax.data.shapes_grammar import CategoryShares, ShapesConfig, sample_scene
from snapgen_jax.data.shapes_heldout import is_heldout, said_heldout
from snapgen_jax.data.shapes_source import ShapesSource
from snapgen_jax.data.sources import build_source

CONFIG = ShapesConfig(dense_share=0.4)


def drawn(source, index):
    return source.example(index, np.random.default_rng((0, index)))


def test_the_true_side_is_that_of_the_scenes_alone_and_the_draws_after_it_too():
    pairs, scenes = ShapesChanges(CONFIG, "train"), ShapesSource(CONFIG, "train")
    for index in range(40):
        rngs = [np.random.default_rng((0, index)) for _ in range(2)]
        both, alone = pairs.example(index, rngs[0]), scenes.example(index, rngs[1])
        assert both["caption"] == alone["caption"] != both["other_caption"]
        np.testing.assert_array_equal(both["image"], alone["image"])
        assert rngs[0].random() == rngs[1].random()
        unseen = pairs.example(index, np.random.default_rng((0, index)), ("other_caption",))
        assert unseen == {name: both[name] for name in ("caption", "other_caption", "changed")}


def test_every_change_is_drawn_and_a_config_names_the_source():
    source = build_source(DataConfig(source="shapes_changes", shapes=CONFIG))
    counts = collections.Counter(CHANGES[int(drawn(source, index)["changed"])] for index in range(400))
    assert set(counts) == set(CHANGES) and min(counts.values()) > 5
    assert set(source.spec()) == {"image", "caption", "other_caption", "changed", "objects", "places"}
    assert len(source) == CONFIG.train_examples and source.name(7) == "shapes scene 7"


def said(scene):
    return sorted((item.colour, item.kind, place(item)) for item in scene.objects)


@pytest.mark.parametrize("what", ["words", "objects"])
def test_what_is_changed_is_false_and_no_held_out_combination(what):
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng, "seen", CONFIG)
        if what == "objects" and len(scene.objects) > 2:
            continue
        _, other = changed(scene, rng, what)
        if what == "words":
            assert not requirement(other).met_by(scene.objects) and not said_heldout(other.groups, other.relation)
        else:
            assert said(other) != said(scene) and not is_heldout(other)


def test_one_fact_is_changed_and_the_rest_stays():
    red, blue = SceneObject("ring", "red", 0.3, 0.2, 0.5), SceneObject("star", "blue", 0.3, 0.8, 0.5)
    groups = (Group("ring", colour="red"), Group("star", colour="blue"))
    scene, rng = Scene((red, blue), groups, "position", "left of"), np.random.default_rng(0)
    found = collections.defaultdict(list)
    for _ in range(300):
        name, other = changed(scene, rng)
        found[name].append(other)
    assert set(found) == {"colour", "kind", "position", "binding", "objects"}  # one of each is never counted
    assert all(len(other.groups) == 1 and other.groups[0] in groups for other in found["objects"])
    assert {tuple(g.colour for g in other.groups) for other in found["binding"]} == {("blue", "red")}
    for other in found["position"]:
        assert set(other.groups) == set(groups)
        assert (other.groups == groups) != (other.relation == "left of")
    for name, field in (("colour", "kind"), ("kind", "colour")):
        for other in found[name]:
            assert [getattr(g, field) for g in other.groups] == [getattr(g, field) for g in groups]
            assert sum(a != b for a, b in zip(other.groups, groups, strict=True)) == 1


def test_numbers_are_changed_where_a_true_caption_counts():
    shares = {**dict.fromkeys(CategoryShares.__dataclass_fields__, 0.0), "counting": 1.0}
    source, numbers = ShapesSource(ShapesConfig(shares=CategoryShares(**shares)), "train"), []
    rng = np.random.default_rng(0)
    for index in range(60):
        scene = source.scene(index)
        name, other = changed(scene, rng)
        if name == "number":
            numbers.append((scene.groups[0].count, other.groups[0].count))
    assert len(numbers) > 20 and all(a != b and 1 <= b <= 4 for a, b in numbers)
