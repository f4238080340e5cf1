"""What the pages say is there, is there: files, commands with their options, config keys, code."""

import dataclasses
import functools
import pathlib
import re
import shlex

import jax
import pytest

from snapgen_jax.chain import load_chain
from snapgen_jax.cli_parser import build_parser, split_beam, split_overrides
from snapgen_jax.cli_prepare import collect_config
from snapgen_jax.config import load_config
from snapgen_jax.recipes._reward_config import RewardSamplingConfig
from snapgen_jax.recipes.lazy_gates import LazySamplingConfig
from snapgen_jax.training.exits import ExitCode

ROOT = pathlib.Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in FILES}
PROSE = {name: re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE) for name, text in PAGES.items()}
CODE = [(name, span) for name, text in PROSE.items() for span in re.findall(r"`([^`\n]+)`", text)]
WHOLE = [re.sub(r"\\\n\s+", "", text) for text in PROSE.values()]  # a command that goes on in the next line is one
LINES = [line.split("#")[0].strip() for text in WHOLE for line in text.splitlines() if line.startswith("    ")]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)

# Named in the pages, and made by a command rather than kept here.
MADE = re.compile(
    r"""\.venv(-oracle)? | (quickstart/)?report\.html | photo\.\w+ | metadata\.\w+  # environments, reports, one's own
    | (OUT/)?\.collecting  # while images are collected
    | sd35/ | unet/ | scheduler/scheduler_config\.json  # published weights
    | config\.json | run\.json | (checkpoints|metrics|samples|export)/[\w.]*     # of a workdir
    | items\.jsonl | derived\.json | evolve/[\w/]+  # of a chain, or of a stage of one that derives
    | transformer/ | moon/[\w/.]+ | adapter_model\.safetensors | text/token_embedding  # of adapters
    | draw\.json | \d+\.png | drawn\.npz | imagenet_classes\.txt | LOC_synset_mapping\.txt   # of docs/imagenet.md
    | weights\.json | (text_encoder|vae|runs)/[\w/]* | model\.safetensors  # of a folder of weights
    | manifest\.json | tokenizer\.json | program\.json | programs/[\w.]+ | golden/[\w./]*  # of a bundle
    | SPEC\.md | spec\.json | npu/ | scheduler\.json | benchmarks/results/gpu-CARD\.jsonl
    | (client|noise|program|sampler|verify)\.py | PACKING\.md
    """,
    flags=re.VERBOSE,
)


def _paths() -> list[tuple[str, str]]:
    names = r"[\w.-]+(/[\w.-]*)+|[\w-]+\.(py|md|json|jsonl|csv|txt|html|lock|ipynb)|\.[\w-]+|Makefile"
    links = [(name, link) for name, text in PROSE.items() for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    code = [(name, span) for name, span in CODE if re.fullmatch(names, span)]
    return [(name, path) for name, path in dict.fromkeys(links + code) if not MADE.fullmatch(path)]


def _commands(program: str) -> list[str]:
    lines = [*LINES, *(span for _, span in CODE)]
    return list(dict.fromkeys(line for line in lines if re.match(rf"{program} \w", line)))


def test_the_pages_name_files_and_commands():
    """So that a change of their form does not leave the tests below with nothing to look at."""
    assert len(_paths()) > 15
    assert {"make quickstart", "make test"} <= set(_commands("make"))
    assert len(_commands("snapgen")) >= 5


@pytest.mark.parametrize(("page", "path"), _paths())
def test_a_file_that_is_named_exists(page, path):
    """From the root, from the package where the text is about the package, or from the page."""
    assert any((folder / path).exists() for folder in (ROOT, ROOT / "snapgen_jax", (ROOT / page).parent))


@pytest.mark.parametrize("command", _commands("make"))
def test_a_make_target_that_is_named_exists(command):
    assert command.split()[1] in TARGETS


@pytest.mark.parametrize("command", _commands("snapgen"))
def test_a_snapgen_command_that_is_named_is_understood(command):
    """An example on a line of its own is whole, config keys included; inline code may stop after the first words."""
    arguments, _ = split_beam(shlex.split(command)[1:])
    arguments, overrides = split_overrides(arguments)
    commands = next(action.choices for action in build_parser()._actions if action.dest == "command")
    assert arguments[0] in commands
    if command not in LINES:
        options = commands[arguments[0]]._option_string_actions
        assert all(a.split("=")[0] in options for a in arguments if a.startswith("-"))
        return
    parsed, others = build_parser().parse_known_args(arguments)
    # Gates and tuned models have the options of every flow, and some of their own.
    drawing = (LazySamplingConfig, RewardSamplingConfig) if "takes_options" in parsed else ()
    options = {f"--{field.name}" for config in drawing for field in dataclasses.fields(config)}
    assert {a.split("=")[0] for a in others} <= options
    if arguments[:2] == ["prepare", "collect"]:
        parsed.overrides = overrides
        collect_config(parsed)
    elif overrides or arguments[:2] == ["prepare", "encode"]:
        load = load_chain if arguments[0] == "chain" else load_config
        load(str(ROOT / parsed.config), overrides)


def test_the_exit_codes_are_the_documented_ones():
    rows = re.findall(r"^\| (\d+) \| ([a-z ]+) \|", PAGES["README.md"], flags=re.MULTILINE)
    assert {int(code): name for code, name in rows} == {
        code.value: code.name.lower().replace("_", " ") for code in ExitCode
    }


def test_the_extras_are_the_documented_ones():
    named = set(re.findall(r"\.\[([a-z]+)\]", PAGES["README.md"]))
    assert named <= set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), flags=re.MULTILINE))


def test_the_notebook_example_runs(monkeypatch):
    """Every line of it, with arrays that have a shape and no values: compiling would take most of a minute."""
    monkeypatch.setattr(jax, "jit", lambda function: functools.partial(jax.eval_shape, function))
    example = next(b for b in re.findall(r"```python\n(.*?)```", PAGES["README.md"], flags=re.DOTALL) if "denoise" in b)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["latents"].shape == (1, 8, 8, 4)
