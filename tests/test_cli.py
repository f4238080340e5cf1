"""What the command line says of arguments before it does anything."""

import json
import pathlib

import pytest

from snapgen_jax import generation
from snapgen_jax.cli import COMMANDS, main
from snapgen_jax.config import load_config
from snapgen_jax.data.tokenizer import train
from snapgen_jax.evaluation.frechet_score import DiversityScore, FrechetScore
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.evaluation.registry import create
from snapgen_jax.export.older import from_schema_1
from snapgen_jax.export.program import parse
from snapgen_jax.export.sampler import with_options
from snapgen_jax.training.exits import ExitCode
from snapgen_jax.workdir import prepare_workdir
from tests.generators_for_tests import Options, by_label, by_prompt

BUNDLE = pathlib.Path(__file__).parent / "export" / "scheduler_schema_1.json"


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
    monkeypatch.setattr("snapgen_jax.generation.load_config", lambda workdir: None)
    monkeypatch.setattr("snapgen_jax.scoring.evaluate", lambda *run, **choices: asked.update(choices) or {})
    options = ["--set=frechet.examples=2048", "--set=frechet.seed=1", "--set=diversity.prompts=('a star',)"]
    assert main(["evaluate", f"--workdir={tmp_path}", "--names=frechet,diversity", *options]) == ExitCode.DONE
    frechet, diversity = (create(EvaluatorSpec(name, options=asked["options"][name])) for name in asked["options"])
    assert frechet == FrechetScore(examples=2048, seed=1) and diversity == DiversityScore(prompts=("a star",))


def test_a_prompt_that_is_not_utf_8_is_named(commands, tokenizing, capsys):
    arguments = [a.replace("--prompt=1", "--prompt=a \udcff") for a in commands["sample"]]
    assert main(arguments) == ExitCode.BAD_CONFIG
    assert r"'a \udcff' is no text" in capsys.readouterr().err


def test_a_prompt_of_an_evaluator_that_is_not_utf_8_is_named(commands, asked, capsys):
    arguments = [a.replace("'1'", "'a \udcff'") for a in commands["evaluate"]]
    assert main(arguments) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert r"'prompts' holds 'a \udcff', which is no text" in said and "Traceback" not in said and not asked


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("train", ["--config=~/a.py:b", "--workdir=~/run"], {"config": "/home/me/a.py:b", "workdir": "/home/me/run"}),
        ("sample", ["--weights=~/w", "--prompt=~/x", "--out=~/o.png"], {"weights": "/home/me/w", "prompt": ["~/x"]}),
        ("encode", ["--weights=~/vae", "~/a.png", "b.png"], {"images": ["/home/me/a.png", "b.png"]}),
        ("upgrade", ["~/run"], {"workdir": "/home/me/run"}),
    ],
)
def test_home_is_put_in_place_of_its_sign_in_every_flag(command, arguments, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {}
    monkeypatch.setitem(COMMANDS, command, lambda options: given.update(vars(options)))
    assert main([command, *arguments]) == ExitCode.DONE
    assert {name: given[name] for name in expected} == expected


# --- options of the generator ----------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The options that a run is asked for by the command line; the run draws from prompts that are numbers."""
    made, asked = by_prompt(), []
    generate = made.recipe.generate

    def recorded(params, frozen, conditions, keys, options):
        asked.append(options)
        return generate(params, frozen, conditions, keys, options)

    monkeypatch.setattr(made.recipe, "generate", recorded)
    monkeypatch.setattr(made.recipe, "evaluators", list, raising=False)
    monkeypatch.setattr("snapgen_jax.generation.load", lambda *_, **__: made)
    monkeypatch.setattr("snapgen_jax.scoring.load", lambda *_, **__: made)
    return asked


@pytest.fixture
def tokenizing(asked, monkeypatch):
    """The run has a tokenizer that was trained on captions."""
    made = generation.load("")
    trained = train(["a ring"], 259)
    trained.names = ("tokens",)
    monkeypatch.setattr(made, "tokenizer", trained)


@pytest.fixture
def commands(tmp_path):
    """{command: its arguments on a run}."""
    prepare_workdir(load_config("configs/shapes/quickstart.py:runlocal", ["data.source=synthetic"]), tmp_path)
    prompts = "--set=sample_grid.prompts=('1',)"
    return {
        "sample": ["sample", f"--workdir={tmp_path}", "--prompt=1", f"--out={tmp_path / 'samples.png'}"],
        "evaluate": ["evaluate", f"--workdir={tmp_path}", "--names=sample_grid", prompts],
    }


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_every_option_of_the_generator_is_one_of_the_command_line(asked, commands, command):
    assert main([*commands[command], "--method=heun"]) == ExitCode.DONE
    assert main([*commands[command], "--steps=6", "--interval=(0.2, 1)", "--guidance=2"]) == ExitCode.DONE
    assert main(commands[command]) == ExitCode.DONE
    assert asked == [Options(method="heun"), Options(steps=6, guidance=2.0, interval=(0.2, 1.0)), Options()]


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--metod=heun", "unknown option 'metod' of this run's generator; did you mean 'method'?"),
        ("--in-terval=(0, 1)", "unknown option 'in_terval' of this run's generator; did you mean 'interval'?"),
        ("--method=hen", "'method' is 'hen'; choose one of 'euler', 'heun'"),
        ("--interval=1", "'interval' is 1 (int); expected tuple[float, float]"),
        ("--steps=0", "steps is 0; give 1 or more"),
        ("--guidance=nan", "'guidance' is nan; give a finite number"),
    ],
)
def test_an_option_that_the_generator_does_not_take_is_refused(asked, commands, command, option, message, capsys):
    assert main([*commands[command], option]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not asked


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("sample", "--method", "override 'method' has no value; write --method=VALUE"),
        ("evaluate", "heun", "unrecognized argument 'heun'; an option of the generator is --NAME=VALUE"),
    ],
)
def test_what_is_no_option_at_all_is_refused_with_the_usage(asked, commands, command, option, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*commands[command], option])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not asked


@pytest.mark.parametrize(
    ("command", "option", "message"),
    [
        ("sample", "--seed", "the seed is {}; it must be a whole number from 0 to 4294967295"),
        ("evaluate", "--set=sample_grid.seed", "'sample_grid' 'seed' is {}; give a number from 0 to 2147483647"),
    ],
)
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_bounds_is_refused(asked, commands, command, option, message, seed, capsys):
    assert main([*commands[command], f"{option}={seed}"]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert message.format(seed) in said
    assert "Traceback" not in said and not asked


def test_an_option_of_the_generator_may_stand_apart_from_its_value(asked, commands):
    assert main([*commands["sample"], "--method", "heun", "--guidance=2"]) == ExitCode.DONE
    assert asked == [Options(method="heun", guidance=2.0)]


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def by_labels(monkeypatch, tmp_path):
    """The arguments that draw from a run whose picture is the grey of its label, or from a bundle of that."""

    class Bundle:
        def __init__(self, folder, unpacking):
            pass

        def run(self, inputs, seed):
            if max(inputs["label"]) > 9:
                raise RuntimeError("index out of bounds")
            return by_label().run(conditions=inputs)

    monkeypatch.setattr("snapgen_jax.generation.load", lambda *_, **__: by_label())
    monkeypatch.setattr("snapgen_jax.export.client.LiteRTGenerator", Bundle)
    out = f"--out={tmp_path / 'labels.png'}"
    return {"workdir": ["sample", "--workdir=run", out], "bundle": ["sample", "--bundle=bundle", out]}


@pytest.mark.parametrize("source", ["workdir", "bundle"])
@pytest.mark.parametrize(("condition", "count"), [("label=3", "1 image "), ("label=[3,7]", "2 images ")])
def test_a_run_that_takes_labels_draws_from_the_command_line(by_labels, source, condition, count, capsys):
    assert main([*by_labels[source], "--condition", condition]) == ExitCode.DONE
    assert f"wrote {count}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("workdir", [], "there is nothing to draw; give --prompt, or --condition"),
        ("workdir", ["--condition=label"], "has no value; write --condition label=VALUE"),
        ("workdir", ["--condition=lable=3"], "unknown condition 'lable'; did you mean 'label'?"),
        ("workdir", ["--condition=label=three"], "expected label int32 [N]"),
        ("workdir", ["--prompt=three"], "give `conditions` (--condition) with label int32 [N]"),
        ("bundle", ["--condition=label=12"], "the bundle does not run on label=12: index out of bounds"),
    ],
)
def test_conditions_that_a_run_does_not_take_are_one_line(by_labels, source, arguments, message, capsys):
    assert main([*by_labels[source], *arguments]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_command_that_draws_nothing_takes_no_options_of_a_generator(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["status", f"--workdir={tmp_path}", "--method=heun"])
    assert stopped.value.code == 2 and "unrecognized arguments: --method=heun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "option", "message"),
    [
        ("bundle", "--metod=heun", "a bundle has no option metod; it takes steps, guidance, method, guidance_interval"),
        ("bundle", "--method=hen", "unknown sampling method 'hen'; expected one of euler, heun"),
        ("weights", "--stebs=4", "unknown config key 'stebs'; did you mean 'steps'?"),
    ],
)
def test_bundles_and_published_systems_refuse_options_of_others(monkeypatch, tmp_path, source, option, message, capsys):
    class Bundle:
        program = parse(from_schema_1(json.loads(BUNDLE.read_text())))

        def __init__(self, folder, unpacking):
            assert folder == str(tmp_path)

        def generate(self, prompts, seed, **options):
            with_options(self.program, **options)

    monkeypatch.setattr("snapgen_jax.export.client.LiteRTGenerator", Bundle)
    assert main(["sample", f"--{source}={tmp_path}", "--prompt=1", option]) == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["evaluate", "--names=frechet"], ["export"], ["draw", "--out=x", "--count=1"]])
def test_a_run_that_is_not_there_is_said_before_anything_compiles(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--workdir=nowhere"]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert "nowhere is not a workdir" in said and "compiling" not in said
