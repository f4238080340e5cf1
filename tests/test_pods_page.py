"""docs/pods.md: launchers and `snapgen` take its commands, at full size and in small; each step reads what an earlier
one wrote, as in the chain of configs/full_path.py, whose own test walks it."""

import argparse
import pathlib
import re
import shlex

import pytest

from launch import gke, job, local, slurm, tpu_vm
from snapgen_jax.chain import load_chain
from snapgen_jax.cli_parser import build_parser, split_overrides
from snapgen_jax.cli_prepare import collect_config
from snapgen_jax.config import load_experiment

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^    \S.*(?:\n    .*)*", re.sub(r"\\\n\s+", "", PAGE), flags=re.MULTILINE)
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]
LAUNCHERS = {f"launch.{module.__name__.rpartition('.')[2]}": module for module in (tpu_vm, gke, slurm, local)}
LAUNCHES = [line for line in LINES if line.startswith("python -m launch.")]
# The stage of the chain that trains what a config of the page trains.
STAGES = {
    "configs/pretrain/t2i_256.py": "t2i_256",
    "configs/pretrain/t2i_512.py": "t2i_512",
    "configs/pretrain/t2i_1024.py": "t2i_1024",
    "configs/distill/t2i_1024_sd35l.py": "distilled",
    "configs/fewstep/t2i_1024_4step.py": "four_steps",
    "configs/decoder/sd3_tiny.py": "tiny_decoder",
}
SIX = ("prepare collect", "prepare encode", "train", "weights export", "export")


def launched(line: str, capsys) -> str:
    """The `snapgen` command that a launcher starts on every host."""
    words = shlex.split(line)
    assert job.main_of(LAUNCHERS[words[2]].run, [*words[3:], "--dry-run"]) == 0
    return re.findall(r"snapgen (?:train|prepare encode) --config=[^|\n]*", capsys.readouterr().out)[0]


def parsed(command: str) -> tuple[argparse.Namespace, list[str]]:
    """What the parser makes of a command, and the overrides of its config."""
    words, overrides = split_overrides(shlex.split(command)[1:])
    options, others = build_parser().parse_known_args(words)
    assert not [word for word in others if "takes_options" not in options], f"unknown: {others}"
    options.overrides = overrides
    return options, overrides


def small(config: str) -> str:
    """The config that runs on a laptop what `config` runs on a pod."""
    if config in STAGES:
        return f"configs/full_path.py:runlocal.{STAGES[config]}"
    return config if ":" in config else f"{config}:runlocal"


@pytest.fixture
def commands(capsys):
    """Every `snapgen` command of the page, in order, also those that launchers start."""
    loops = [re.sub(r"^for w in (\S+) .*?; do (.*); done$", r"\2", line).replace("$w", "4.5") for line in LINES]
    ours = [launched(line, capsys) if line in LAUNCHES else line for line in loops]
    return [line for line in ours if line.startswith("snapgen ")]


def words_of(options: argparse.Namespace) -> str:
    """ "prepare encode", "train"."""
    step = getattr(options, "step", None) if options.command == "prepare" else getattr(options, "action", None)
    return f"{options.command} {step}" if isinstance(step, str) else options.command


def test_the_page_launches_all_that_is_trained():
    assert len(LAUNCHES) >= 9
    assert all("--topology=" in line or "launch.local" in line for line in LAUNCHES)


def test_every_command_is_understood_at_full_size_and_in_small(commands):
    for command in commands:
        options, overrides = parsed(command)
        if command.startswith("snapgen prepare collect"):
            collect_config(options)
        elif options.command == "chain":
            load_chain(options.config, overrides)
        elif config := getattr(options, "config", None) if "--config=" in command else None:
            for name in (config, small(config)):
                load_experiment(name, overrides)


def test_the_six_steps_are_those_of_the_chain_in_their_order(commands):
    chain, _ = load_chain("configs/full_path.py:runlocal")
    walked = []
    for stage in chain.stages:
        lines = stage.options["commands"] if stage.derive else [f"train {stage.name}"]
        walked += [next((step for step in SIX if line.startswith(step)), line.split()[0]) for line in lines]
    walked = [step for step in dict.fromkeys(walked) if step != "prepare"]
    assert walked == [*SIX, "python"]
    described = PAGE[: PAGE.index("## Launch")]
    places = [described.index(text) for text in (*(f"snapgen {step}" for step in SIX), "verify.py")]
    assert places == sorted(places)
    trained = [parsed(c)[0].config for c in commands if c.startswith("snapgen train ")]
    stages = [STAGES[config] for config in trained if config in STAGES]
    assert list(dict.fromkeys(stages)) == [stage.name for stage in chain.stages if stage.config]


def test_each_training_reads_what_an_earlier_command_wrote(commands):
    chain, _ = load_chain("configs/full_path.py:runlocal")
    stages = {stage.name: stage for stage in chain.stages}
    shards, runs = {}, {}  # of the page: {folder: inputs that it was encoded for}, {workdir: stage}
    for command in commands:
        options, overrides = parsed(command)
        given = dict(override.split("=", 1) for override in overrides)
        if command.startswith("snapgen prepare encode") and options.out:
            shards[options.out.replace("gs://BUCKET", "/data")] = load_experiment(options.config).recipe
        if options.command != "train" or options.config not in STAGES or "data.source" in given:
            continue
        name = STAGES[options.config]
        recipe = load_experiment(options.config).recipe
        assert runs.get(given.get("init_from"), "") == stages[name].earlier.get("init_from", "")
        if name != "tiny_decoder":
            assert shards[given["data.path"]].inputs.image_sizes == recipe.inputs.image_sizes
            assert hasattr(shards[given["data.path"]], "teacher") or not hasattr(recipe, "teacher")
        runs[options.workdir] = name
    last = {words_of(o): o for o in (parsed(c)[0] for c in commands)}
    assert runs[last["weights export"].workdir] == "four_steps"
    assert last["export"].workdir == last["weights export"].out
    assert runs[last["export"].decoder] == "tiny_decoder"
    assert f"python {last['export'].out}/verify.py" in LINES
