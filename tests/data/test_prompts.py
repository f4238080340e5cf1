"""Prompts with a known right answer: drawn deterministically, met by true scenes, failed by changed ones."""

import dataclasses
import json

import numpy as np
import pytest

from snapgen_jax.data.prompts import CATEGORIES, Demand, Prompt, Requirement, make_prompts, requirement
from snapgen_jax.data.shapes import SceneObject
from snapgen_jax.data.shapes_grammar import sample_scene

A = SceneObject("circle", "red", 0.3, 0.2, 0.5)
B = SceneObject("square", "blue", 0.3, 0.8, 0.5)


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("category", CATEGORIES)
def test_thirty_two_different_prompts_exist_in_every_category(category, heldout: bool) -> None:
    prompts = make_prompts(category, heldout, 32)
    assert len({p.prompt for p in prompts}) == 32
    assert all(p.category == category and p.heldout == heldout for p in prompts)
    assert prompts == make_prompts(category, heldout, 32)
    assert prompts != make_prompts(category, heldout, 32, seed=1)
    assert [Prompt.from_json(json.loads(json.dumps(p.to_json()))) for p in prompts] == prompts


def test_more_prompts_than_the_grammar_has_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts were found, and 9000 are wanted"):
        make_prompts("single_object", False, 9000)


def test_a_scene_meets_the_requirement_of_its_own_caption_and_no_changed_scene_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        demanded = requirement(scene)
        assert demanded.met_by(scene.objects)
        assert demanded.met_by(scene.objects[::-1]), "the order in which objects are found does not matter"
        assert not demanded.met_by(scene.objects[1:])
        assert not demanded.met_by((*scene.objects, scene.objects[0]))
        other = dataclasses.replace(scene.objects[0], kind="cross" if scene.objects[0].kind != "cross" else "star")
        assert not demanded.met_by((other, *scene.objects[1:]))


def test_a_requirement_looks_at_colour_count_and_relation() -> None:
    both = Requirement((Demand("circle", 1, "red"), Demand("square", 1, "blue")))
    assert both.met_by([A, B])
    assert not both.met_by([dataclasses.replace(A, colour="blue"), dataclasses.replace(B, colour="red")])
    left = dataclasses.replace(both, relation="left of")
    assert left.met_by([B, A])
    assert not dataclasses.replace(both, relation="right of").met_by([A, B])
    assert not left.met_by([dataclasses.replace(A, x=0.79, y=0.1), B]), "hardly to the left, and far above"


def test_a_prompt_file_with_an_unknown_word_is_refused() -> None:
    data = Requirement((Demand("circle"),)).to_json()
    data["demands"][0]["kind"] = "hexagon"
    with pytest.raises(ValueError, match="hexagon"):
        Requirement.from_json(data)
