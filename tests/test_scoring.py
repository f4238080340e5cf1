"""Evaluators on runs of few photographs: what is not held out is not called so."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from snapgen_jax.cli import main
from snapgen_jax.config import load_config, resolve
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.experiment import Experiment
from snapgen_jax.scoring import _asked_for, _with_options
from snapgen_jax.training.exits import ExitCode
from snapgen_jax.workdir import prepare_workdir


class Noise:
    """Draws noise from prompts."""

    recipe = types.SimpleNamespace(evaluators=list)

    def generate(self, prompts, *, seed=0, indices=None, **options):
        return np.random.default_rng(seed).integers(0, 256, (len(prompts), 24, 24, 3)).astype(np.uint8)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys, caplog):
    """Scores a run of so many photographs; returns the exit code, the numbers, and all that was said beside them."""
    monkeypatch.setattr("snapgen_jax.scoring.load", lambda *_, **__: Noise())
    means = "snapgen_jax.evaluation.frechet_score.image_features"  # nothing to compile
    monkeypatch.setattr(means, lambda images: images.mean((1, 2)))

    def run(photographs: int, *arguments: str, **changes):
        folder = tmp_path / str(photographs)
        folder.mkdir()
        rng = np.random.default_rng(0)
        for n in range(photographs):
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / f"{n}.png")
            (folder / f"{n}.txt").write_text(f"noise number {n}")
        values = {"data.path": folder, "inputs.image_sizes": "((24,24),)", **changes}
        config = load_config("configs/folder.py:runlocal", [f"{name}={value}" for name, value in values.items()])
        workdir = tmp_path / f"run_of_{photographs}"
        prepare_workdir(config, workdir)
        capsys.readouterr()
        caplog.clear()
        code = main(["evaluate", f"--workdir={workdir}", *arguments])
        printed = capsys.readouterr()
        return code, json.loads(printed.out or "{}"), printed.err + caplog.text

    return run


@pytest.mark.parametrize(("photographs", "found"), [(19, "repeats the 19 training images"), (24, "and found 1;")])
def test_frechet_says_how_many_photographs_it_needs(evaluate, photographs, found) -> None:
    code, numbers, said = evaluate(photographs, "--names=frechet")
    assert code == ExitCode.BAD_CONFIG and not numbers
    assert found in said and "give 80 images, or a larger share (0.2 of 20 images)" in said


def test_frechet_of_as_many_as_it_asks_for_is_a_number(evaluate) -> None:
    code, numbers, said = evaluate(20, "--names=frechet", **{"data.validation_share": 0.2})
    assert code == ExitCode.DONE and set(numbers) == {"frechet.distance", "frechet.real"}
    assert "NOT HELD OUT" not in said


def test_numbers_of_a_validation_split_that_repeats_training_say_so(evaluate) -> None:
    code, numbers, said = evaluate(6, "--names=diversity,sample_grid")
    assert code == ExitCode.DONE and numbers["validation.held_out"] == 0.0
    assert said.count("NOT HELD OUT: diversity and the other evaluators read training examples") == 1
    code, numbers, said = evaluate(40, "--names=diversity,sample_grid")
    assert code == ExitCode.DONE and "validation.held_out" not in numbers and "NOT HELD OUT" not in said


def test_without_names_the_evaluators_of_the_runs_own_config_are_asked(evaluate) -> None:
    own = {"evaluation.during": "('sample_grid',)", "evaluation.final": "('diversity', 'sample_grid')"}
    code, numbers, _ = evaluate(40, "--set=diversity.images=2", **own)
    assert code == ExitCode.DONE
    assert set(numbers) == {f"diversity.pairwise{end}" for end in ("", ".low", ".high")}, "and no score of shapes"


def test_an_option_of_an_evaluator_that_the_run_does_not_have_names_those_it_has(evaluate) -> None:
    own = {"evaluation.during": "()", "evaluation.final": "('diversity', 'sample_grid')"}
    code, numbers, said = evaluate(6, "--set=frechet.examples=20", **own)
    assert code == ExitCode.BAD_CONFIG and not numbers
    assert "'frechet' is not among --names=diversity,sample_grid" in said


def test_a_run_without_evaluators_is_told_to_choose_some(evaluate) -> None:
    code, numbers, said = evaluate(6, **{"evaluation.during": "()", "evaluation.final": "()"})
    assert code == ExitCode.BAD_CONFIG and not numbers
    assert "its config names no evaluators" in said and "by --names, of validation_loss, sample_grid" in said


def test_evaluators_that_read_no_example_say_nothing_of_the_split(evaluate) -> None:
    prompts = "--set=diversity.prompts=('a star',)"
    code, numbers, said = evaluate(5, "--names=diversity", prompts)
    assert code == ExitCode.DONE and "validation.held_out" not in numbers and "NOT HELD OUT" not in said


def test_options_of_the_generator_are_for_evaluators_that_draw() -> None:
    generation, options = {"steps": 4, "batch_size": 16}, {"compositional": {"seed": 3}, "validation_loss": {"seed": 5}}
    drawn = _with_options(EvaluatorSpec("compositional", options={"options": {"guidance": 2.0}}), generation, options)
    assert drawn.options == {"seed": 3, "options": {"guidance": 2.0, "steps": 4, "batch_size": 16}}
    measured = EvaluatorSpec("validation_loss", function=lambda params, frozen, batch, key: {})
    assert _with_options(measured, generation, options).options == {"seed": 5}


def test_options_of_the_generator_that_nothing_reads_are_refused(evaluate) -> None:
    code, numbers, said = evaluate(7, "--names=validation_loss", "--steps=4")
    assert code == ExitCode.BAD_CONFIG and not numbers
    assert "steps: said of drawing, and validation_loss reads the data and draws nothing; leave it out" in said


def test_a_run_is_measured_by_functions_of_its_recipe_that_its_config_does_not_name(tmp_path) -> None:
    config = load_config("configs/shapes/robust.py:runlocal", ["evaluation.during=()", "evaluation.final=()"])
    asked = _asked_for(config, ["validation_loss", "sample_grid", "frechet"])
    found = Experiment(resolve(asked), tmp_path).recipe.evaluators()
    assert [spec.name for spec in found] == ["validation_loss"] and found[0].function is not None
