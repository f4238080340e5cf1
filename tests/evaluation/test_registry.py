"""Evaluators by name, with errors that teach."""

import dataclasses

import pytest

from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.evaluation.registry import EVALUATORS, create
from snapgen_jax.evaluation.sample_grid import SampleGrid

OF_RECIPES = (
    "validation_loss",
    "reconstruction",
    "exposure",
    "similarity",
    "unchanged",
    "matching",
)  # what they measure is a function of the recipe


def loss(params, frozen, batch, key):
    return {}


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_registered_evaluator_is_made_from_its_name(name):
    function = loss if name in OF_RECIPES else None
    assert callable(create(EvaluatorSpec(name, function=function)))


@pytest.mark.parametrize("name", EVALUATORS)
def test_the_defaults_of_an_evaluator_may_be_given_as_options(name):
    function = loss if name in OF_RECIPES else None
    evaluator = create(EvaluatorSpec(name, function=function))
    defaults = {field.name: getattr(evaluator, field.name) for field in dataclasses.fields(evaluator)}
    defaults.pop("function", None)
    assert create(EvaluatorSpec(name, function=function, options=defaults)) == evaluator


def test_options_reach_the_evaluator():
    evaluator = create(EvaluatorSpec("sample_grid", options={"prompts": ["a star"], "columns": 4}))  # as from a config
    assert evaluator == SampleGrid(prompts=("a star",), columns=4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EvaluatorSpec("compositonal"), "did you mean 'compositional'"),
        (EvaluatorSpec("sample_grid", options={"colums": 3}), "did you mean 'columns'"),
        (EvaluatorSpec("sample_grid", options={"function": loss}), "unknown option"),
        (EvaluatorSpec("frechet", options={"examples": "many"}), "'examples' is 'many' .* expected int"),
        (EvaluatorSpec("frechet", options={"examples": 2.0}), "'examples' is 2.0 .* expected int"),
        (
            EvaluatorSpec("compositional", options={"categories": "colours"}),
            r"is 'colours' .* expected .*Sequence\[str\]",
        ),
        (EvaluatorSpec("validation_loss"), "set EvaluatorSpec.function"),
        (EvaluatorSpec("sample_grid", function=loss), "takes no function"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        create(spec)


@pytest.mark.parametrize("name", [name for name in EVALUATORS if name not in OF_RECIPES])
def test_every_evaluator_that_draws_names_the_output_that_it_reads(name):
    assert create(EvaluatorSpec(name)).output == "image"
    assert create(EvaluatorSpec(name, options={"output": "edited"})).output == "edited"
