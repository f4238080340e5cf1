"""Drawing in stages: what each takes, in which dtype, and one program for a stream of prompts."""

import functools
import io
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import generation, timing
from snapgen_jax.cli import main
from snapgen_jax.config import load_config, load_experiment
from snapgen_jax.data.tokenizer import train
from snapgen_jax.generation import Generator, load_drawing
from snapgen_jax.networks.module import apply, build, count_parameters, flatten, narrowed, stand_in
from snapgen_jax.networks.registry import DenoiserConfig, TextEncoderConfig
from snapgen_jax.networks.tiny_decoder import TinyDecoderConfig
from snapgen_jax.training.exits import ExitCode
from snapgen_jax.workdir import prepare_workdir
from tests.generators_for_tests import by_prompt

pytestmark = pytest.mark.usefixtures("quick_to_compile")
PROMPTS = ("a red circle left of a blue square", "two green stars")
QUICKSTART = "configs/shapes/quickstart.py:runlocal"


@pytest.fixture(scope="module")
def generator():
    """The quickstart at its smallest, with networks that draw something."""
    recipe = load_experiment(QUICKSTART, ["sampling.steps=3"]).build("cpu")
    params = {"model": {role: stand_in(network, 1) for role, network in recipe.networks().items()}}
    params = {"model": {role: params["model"][role] for role in recipe.trains["model"]}}
    return Generator(recipe, params, {}, train(PROMPTS * 3, 512))


def test_each_stage_is_timed_and_the_whole_as_one_program(generator):
    found = timing.time_generator(generator, list(PROMPTS), seed=3, runs=2, steps=2)
    assert list(found.parts) == ["encoders", "steps", "decoder"] and (found.steps, found.examples) == (2, 2)
    assert 0 < found.whole < 60_000 and found.tokenizer > 0 and found.compile_seconds > 0
    lines = found.table().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "part", "tokenizer", "encoders", "2 steps", "decoder", "whole, one program",
    ]  # fmt: skip
    assert re.search(r"2 steps +[\d.]+ +\d+%   [\d.]+ a step", found.table())


def test_the_stages_make_what_is_drawn(generator):
    batch = generator.staged(list(PROMPTS), seed=3)
    value = batch.given
    for stage in batch.stages.values():
        value = jax.jit(stage)(batch.networks, value)
    expected = generator.run(list(PROMPTS), seed=3)
    assert expected["latent"].std() > 0.1
    np.testing.assert_allclose(value["latent"], expected["latent"], rtol=1e-4, atol=1e-5)


def test_what_does_not_draw_in_stages_says_so():
    with pytest.raises(ValueError, match="a run of Greys does not draw in stages"):
        by_prompt().staged(["1"])


USED = (*typing.get_args(DenoiserConfig), *typing.get_args(TextEncoderConfig), TinyDecoderConfig)


@pytest.mark.parametrize("config", USED, ids=lambda config: config.kind)
def test_weights_kept_in_the_dtype_of_the_network_make_the_same_bit_for_bit(config):
    network, _ = build(config.preset("smoke", dtype="bfloat16"))
    params, rng = stand_in(network, 1), np.random.default_rng(0)
    half = narrowed(network, params)
    kernels = {path: leaf.dtype for path, leaf in flatten(half).items() if path[-1] == "kernel"}
    assert set(kernels.values()) == {jnp.dtype("bfloat16")}
    assert sum(flatten(half)[path].size for path in kernels) > 0.5 * count_parameters(half)
    given = jax.tree.map(functools.partial(_drawn, rng), network.config.input_spec(2))
    run = jax.jit(lambda params: apply(network, params, *given))
    for one, other in zip(jax.tree.leaves(run(params)), jax.tree.leaves(run(half)), strict=True):
        np.testing.assert_array_equal(one, other)


def _drawn(rng, spec):
    if jnp.issubdtype(spec.dtype, jnp.integer):
        return np.ones(spec.shape, spec.dtype)
    return rng.uniform(0, 1, spec.shape).astype(np.float32).astype(spec.dtype)


def test_a_run_is_drawn_in_the_dtype_that_is_asked_for(tmp_path, monkeypatch):
    prepare_workdir(load_config(QUICKSTART, ["data.source=synthetic"]), tmp_path)
    recipes = {dtype: load_drawing(tmp_path, dtype=dtype) for dtype in (None, "bfloat16")}
    assert {str(d): r.denoiser.network.config.dtype for d, r in recipes.items()} == {
        "None": "float32",
        "bfloat16": "bfloat16",
    }
    recipe = recipes["bfloat16"]
    params = {"model": {role: stand_in(recipe.networks()[role], 1) for role in recipe.trains["model"]}}
    monkeypatch.setattr(generation, "load_weights", lambda *_: params)
    monkeypatch.setattr(generation, "load_tokenizers", lambda *_: None)
    kept = flatten(generation.load(tmp_path, dtype="bfloat16").params)
    assert {leaf.dtype for path, leaf in kept.items() if path[-1] == "kernel"} == {jnp.dtype("bfloat16")}
    kept = flatten(generation.load(tmp_path).params)
    assert {leaf.dtype for leaf in kept.values()} == {jnp.dtype("float32")}


# --- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, generator):
    monkeypatch.setattr(generation, "load", lambda *_, **__: generator)


def test_the_command_prints_what_each_part_takes(run, tmp_path, capsys):
    line = ["sample", "--workdir=run", f"--prompt={PROMPTS[0]}", f"--out={tmp_path}/star.png", "--time", "--steps=2"]
    assert main(line) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "2 steps" in said and "whole, one program" in said and "an image, of 1 at once" in said


def test_a_stream_of_prompts_is_drawn_by_one_program(run, generator, tmp_path, monkeypatch, capsys):
    program = generator._jitted(generator.recipe.options)
    before = program._cache_size()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[1]}\n\n{PROMPTS[0]}\n"))
    assert main(["sample", "--workdir=run", f"--out={tmp_path}/", "--loop", "--seed=5"]) == ExitCode.DONE
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" ms  ")[1] for line in said] == [PROMPTS[1], PROMPTS[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.png", "001.png"]
    assert program._cache_size() <= before + 1


def test_a_line_that_is_no_text_costs_itself_alone(run, tmp_path, monkeypatch, capsys):
    lines = b"a \xff star\n" + PROMPTS[0].encode() + b"\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["sample", "--workdir=run", f"--out={tmp_path}/", "--loop"]) == ExitCode.DONE
    said = capsys.readouterr()
    assert "UTF-8" in said.err and PROMPTS[0] in said.out
    assert [path.name for path in tmp_path.iterdir()] == ["001.png"]


def test_a_stream_of_which_nothing_can_be_drawn_does_not_end_well(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPTS[1]}\n{PROMPTS[0]}\n"))
    line = ["sample", "--workdir=run", f"--out={tmp_path}/", "--loop", "--nonsense=1"]
    assert main(line) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert "unknown option 'nonsense'" in said and "none of these prompts could be drawn" in said


@pytest.mark.parametrize("below", ["{index}.png", "sheet.png", "folder/", "folder/sheet.png"])
def test_a_file_where_the_folder_of_images_would_be_is_refused_before_drawing(below, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert main(["sample", "--workdir=run", "--prompt=x", f"--out={tmp_path}/file/{below}"]) == ExitCode.BAD_CONFIG
    assert f"{tmp_path}/file is a file, and no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workdir=run", "--loop"], "--loop writes a file an image"),
        (["--workdir=run", "--loop", "--prompt=x", "--out=x/"], "--loop reads its prompts from standard input"),
        (["--bundle=b", "--prompt=x", "--time"], "--time goes with --workdir or --weights; `snapgen bench`"),
        (["--bundle=b", "--prompt=x", "--dtype=float32"], "--dtype goes with --workdir; a bundle has --precision"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, capsys):
    assert main(["sample", *options]) == ExitCode.BAD_CONFIG
    assert message in capsys.readouterr().err
