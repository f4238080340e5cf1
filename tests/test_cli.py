"""What the command line says of arguments before it does anything."""

import pytest

from snapgen_jax.cli import main
from snapgen_jax.training.exits import ExitCode


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("frechet.examples", "write --set frechet.examples=VALUE"),
        ("examples=2048", "write --set NAME.OPTION=VALUE"),
        ("freshet.examples=2048", "'freshet' is not among --names=frechet,diversity; did you mean 'frechet'"),
    ],
)
def test_an_option_of_no_evaluator_that_was_asked_for_is_named(assignment, message, tmp_path, capsys):
    code = main(["evaluate", f"--workdir={tmp_path}", "--names=frechet,diversity", f"--set={assignment}"])
    assert code == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err


def test_options_of_evaluators_come_from_the_command_line(monkeypatch, tmp_path, capsys):
    asked = {}
    monkeypatch.setattr("snapgen_jax.experiment.evaluate", lambda *run, **choices: asked.update(choices) or {})
    options = ["--set=frechet.examples=2048", "--set=frechet.seed=1", "--set=diversity.prompts=('a star',)"]
    assert main(["evaluate", f"--workdir={tmp_path}", "--names=frechet,diversity", *options]) == ExitCode.DONE
    assert asked["options"] == {"frechet": {"examples": 2048, "seed": 1}, "diversity": {"prompts": ("a star",)}}
