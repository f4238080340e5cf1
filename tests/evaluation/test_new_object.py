"""The score of a new object: its pictures pass, those of other objects and of other colours do not."""

import numpy as np
import pytest

from snapgen_jax.data.shapes import COLOURS, Scene, SceneObject, render
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.evaluation.new_object import PHRASES, NewObjectScore
from snapgen_jax.evaluation.registry import create


class Draws:
    """A generator that draws one object for each prompt, as a function of the prompt says."""

    def __init__(self, scene):
        self.scene = scene

    def generate(self, prompts, *, seed=0, indices=None, **options):
        self.prompts = prompts
        return np.stack([render(Scene(self.scene(text), (), "single_object"), 32) for text in prompts])


def colour_of(text):
    return next((colour for colour in COLOURS if colour in text), "red")


def one(kind, colour):
    return (SceneObject(kind, colour, 0.4, 0.5, 0.5),)


@pytest.mark.parametrize(
    ("scene", "score", "shape"),
    [
        (lambda text: one("moon", colour_of(text)), 1, 1),
        (lambda text: one("circle", colour_of(text)), 0, 0),
        (lambda text: one("moon", "red"), 2 / 9, 1),
        (lambda text: (*one("moon", colour_of(text)), SceneObject("star", "blue", 0.28, 0.8, 0.15)), 0, 0),
    ],
    ids=["right", "another object", "one colour", "something beside it"],
)
def test_what_passes(scene, score, shape):
    generator = Draws(scene)
    found = create(EvaluatorSpec("new_object", options={"word": "blick"}))(generator)
    assert len(set(generator.prompts)) == 9 * len(PHRASES)
    assert {"a blick", "a photo of an orange blick"} <= set(generator.prompts)
    assert found.numbers["new_object.score"] == pytest.approx(score)
    assert found.numbers["new_object.shape"] == pytest.approx(shape)
    assert found.values["new_object.score"].mean() == pytest.approx(score)
    assert found.pictures["new_object"].ndim == 3


def test_an_object_of_the_world_is_none_that_is_new():
    with pytest.raises(ValueError, match="kind is 'circle'; choose from moon"):
        NewObjectScore(kind="circle")
