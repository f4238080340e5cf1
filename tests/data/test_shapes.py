"""The shapes world draws exactly what it says, and never shows in training what it holds out."""

import dataclasses
import itertools

import numpy as np
import pytest

from snapgen_jax.data.shapes import COLOURS, KINDS, RELATIONS, Scene, SceneObject, holds, render
from snapgen_jax.data.shapes_captions import caption, dense
from snapgen_jax.data.shapes_grammar import CategoryShares, ShapesConfig, sample_category, sample_scene
from snapgen_jax.data.shapes_heldout import (
    heldout_colour,
    heldout_combinations,
    heldout_number,
    heldout_pair,
    heldout_relation,
    is_heldout,
)
from snapgen_jax.data.shapes_source import ShapesSource

CATEGORIES = tuple(CategoryShares.__dataclass_fields__)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(1)
    return [sample_scene(rng) for _ in range(6000)]


def _one(kind: str, colour: str = "blue", size: float = 0.5) -> Scene:
    return Scene((SceneObject(kind, colour, size, 0.5, 0.5),), (), "colours")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", ["red", "black"])
def test_an_object_is_drawn_in_its_own_colour_inside_its_own_box(kind: str, colour: str) -> None:
    picture = render(_one(kind, colour), 64).astype(int)
    painted = np.abs(picture - 240).sum(axis=-1) > 0
    assert (picture == COLOURS[colour]).all(axis=-1).sum() > 100
    rows, columns = np.nonzero(painted)
    assert rows.min() >= 15 and rows.max() <= 48 and columns.min() >= 15 and columns.max() <= 48
    assert np.array_equal(picture, picture[:, ::-1]), "every kind is symmetric about its vertical axis"


def test_the_kinds_differ_at_the_smallest_size_by_many_grey_levels() -> None:
    pictures = {kind: render(_one(kind, "black", 0.28), 32).astype(float) for kind in KINDS}
    for a, b in itertools.combinations(KINDS, 2):
        assert np.abs(pictures[a] - pictures[b]).max() > 100, (a, b)
        assert np.abs(pictures[a] - pictures[b]).mean() > 2, (a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_anti_aliased_to_the_true_area(kind: str) -> None:
    def ink(size: int) -> float:
        return float((240 - render(_one(kind, "black", 0.3), size)[..., 0].astype(float)).mean())

    assert ink(32) == pytest.approx(ink(256), rel=0.05)


def test_a_picture_is_a_pure_function_of_its_scene(scenes: list[Scene]) -> None:
    for scene in scenes[:20]:
        assert np.array_equal(render(scene, 32), render(dataclasses.replace(scene), 32))


def test_objects_stay_inside_the_picture_and_never_overlap(scenes: list[Scene]) -> None:
    for scene in scenes:
        for item in scene.objects:
            assert item.size >= 0.28
            assert item.x - item.size / 2 > 0 and item.x + item.size / 2 < 1
            assert item.y - item.size / 2 > 0 and item.y + item.size / 2 < 1
        for a, b in itertools.combinations(scene.objects, 2):
            reach = (a.size + b.size) / 2 + 0.049
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > reach


def test_a_scene_shows_exactly_what_its_groups_say(scenes: list[Scene]) -> None:
    for scene in scenes:
        items = iter(scene.objects)
        shown = [[next(items) for _ in range(group.count)] for group in scene.groups]
        assert next(items, None) is None
        for group, members in zip(scene.groups, shown, strict=True):
            assert all(item.kind == group.kind for item in members)
            assert all(item.colour == (group.colour or members[0].colour) for item in members)
        if scene.relation is not None:
            assert all(holds(scene.relation, (a.x, a.y), (b.x, b.y)) for a in shown[0] for b in shown[1])


def test_training_never_shows_a_held_out_combination(scenes: list[Scene]) -> None:
    # Checked here from the definitions, not through `is_heldout`.
    for scene in scenes:
        kinds = [item.kind for item in scene.objects]
        assert not any(heldout_colour(item.colour, item.kind) for item in scene.objects)
        assert not any(heldout_number(kinds.count(kind), kind) for kind in kinds)
        for a, b in itertools.permutations(scene.objects, 2):
            if a.kind != b.kind:
                assert not heldout_pair(a.kind, b.kind)
                for relation in RELATIONS:
                    if holds(relation, (a.x, a.y), (b.x, b.y)):
                        assert not heldout_relation(relation, a.kind, b.kind)
        assert not is_heldout(scene)


def test_training_shows_every_combination_that_is_not_held_out(scenes: list[Scene]) -> None:
    pairs = {(item.colour, item.kind) for scene in scenes for item in scene.objects}
    assert pairs == {(c, k) for c in COLOURS for k in KINDS if not heldout_colour(c, k)}
    numbers = {(group.count, group.kind) for scene in scenes for group in scene.groups if group.count > 1}
    assert numbers == {(n, k) for n in (2, 3, 4) for k in KINDS if not heldout_number(n, k)}
    related = {(s.relation, s.groups[0].kind, s.groups[1].kind) for s in scenes if s.relation is not None}
    assert related == {
        (r, a, b)
        for r in RELATIONS
        for a, b in itertools.permutations(KINDS, 2)
        if not heldout_pair(a, b) and not heldout_relation(r, a, b)
    }


def test_a_relation_is_held_out_in_both_its_wordings() -> None:
    for a, b in itertools.permutations(KINDS, 2):
        assert heldout_relation("left of", a, b) == heldout_relation("right of", b, a)
        assert heldout_relation("above", a, b) == heldout_relation("below", b, a)


@pytest.mark.parametrize("category", CATEGORIES)
def test_heldout_scenes_of_every_category_show_a_held_out_combination(category) -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = sample_scene(rng, "heldout", category=category)
        assert scene.category == category
        assert heldout_combinations(scene)


def test_categories_are_drawn_by_their_shares() -> None:
    shares = CategoryShares(1, 0, 3, 0, 0, 0, 0)
    drawn = [sample_category(np.random.default_rng(i), shares) for i in range(2000)]
    assert set(drawn) == {"single_object", "counting"}
    assert drawn.count("counting") == pytest.approx(1500, rel=0.1)


def test_captions_are_grammatical_and_vary() -> None:
    rng = np.random.default_rng(3)
    said = {category: set() for category in CATEGORIES}
    for category, texts in said.items():
        texts |= {caption(sample_scene(rng, category=category), rng) for _ in range(400)}
    everything = set().union(*said.values())
    plurals = {"crosses", "circles", "squares", "triangles", "stars", "rings"}
    for text in everything:
        words = text.replace(",", "").split()
        for word, following in itertools.pairwise(words):
            if word in ("a", "an"):
                assert (word == "an") == (following[0] in "aeiou"), text
            if word in ("two", "three", "four"):
                assert any(noun in words for noun in plurals), text
        if words[0] == "there":
            assert words[1] == ("are" if words[2] in ("two", "three", "four") else "is"), text
        assert "crosss" not in text
    assert {"a star", "a small square"} & said["single_object"]
    assert any(text.startswith("three ") for text in said["counting"])
    assert any(" to the left of " in text for text in said["position"])
    assert any(", a" in text and " and a" in text for text in said["mixed"])
    assert len(everything) > 1000


def test_dense_captions_say_the_colour_and_place_of_each_object() -> None:
    two = (SceneObject("ring", "orange", 0.3, 0.2, 0.2), SceneObject("star", "blue", 0.3, 0.8, 0.5))
    scene = Scene(two, (), "two_objects")
    said = {dense(scene, np.random.default_rng(i)) for i in range(200)}
    for text in said:
        assert "an orange ring top left" in text and "a blue star right" in text
    assert {"an orange ring top left and a blue star right", "a blue star right with an orange ring top left"} <= said
    middle = Scene((SceneObject("ring", "red", 0.3, 0.5, 0.5),), (), "single_object")
    assert dense(middle, np.random.default_rng(0)).endswith("a red ring centre")


def test_a_share_of_the_captions_is_dense_and_none_of_three_objects() -> None:
    source = ShapesSource(ShapesConfig(dense_share=0.5), "train")
    few, many = [], []
    for index in range(400):
        text = source.example(index, np.random.default_rng(index), ("caption",))["caption"]
        is_dense = any(word in text.split() for word in ("top", "bottom", "centre"))
        (few if len(source.scene(index).objects) <= 2 else many).append(is_dense)
    assert 0.3 < np.mean(few) < 0.5 and not any(many)  # some dense captions say "left" or "right" alone


def test_the_scenes_of_a_config_follow_its_background() -> None:
    scene = sample_scene(np.random.default_rng(0), config=ShapesConfig(background=200))
    assert (render(scene, 32)[0, 0] == 200).all()
