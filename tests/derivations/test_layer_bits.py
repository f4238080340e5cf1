"""Bits by layer as a stage of a chain: every layer measured alone, by one program, each once."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from snapgen_jax.chain import load_chain
from snapgen_jax.chain_run import _Chain
from snapgen_jax.config import build_dataclass, load_experiment
from snapgen_jax.derivations import layer_bits
from snapgen_jax.derivations.layer_bits import Drawing, Options, derive
from snapgen_jax.experiment import Experiment
from snapgen_jax.networks.bit_assignment import assign
from snapgen_jax.networks.quantise import quantisable
from snapgen_jax.recipes.flow_matching import FlowMatching
from snapgen_jax.training.exits import ConfigError

ONE_STAGE = (
    "channels=(8,)", "down_depth=(1,)", "up_depth=(0,)", "mid_depth=0", "self_attention=(False,)",
    "cross_attention=(True,)",
)  # fmt: skip
OPTIONS = {"target_bits": 2.2, "per_category": 4, "categories": ("single_object",), "generation": {"steps": 1}}


@pytest.fixture(scope="module", autouse=True)
def networks_are_quick_to_compile(quick_to_compile):
    """See `quick_to_compile`."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A run of two updates."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / "base")
    changes = [*(f"network.{change}" for change in ONE_STAGE), "train_steps=2", "evaluation.final=()"]
    Experiment(load_experiment("configs/shapes/adapters_base.py:runlocal", changes), workdir).train()
    return {"base": workdir}


@pytest.fixture(scope="module")
def derived(stages, tmp_path_factory):
    """The folder of the stage, its result, and how often the sampler was traced."""
    workdir, traced, generate = epath.Path(tmp_path_factory.mktemp("bits")), [], FlowMatching.generate

    def counted(self, *args):
        traced.append(args)
        return generate(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowMatching, "generate", counted)
        return workdir, derive(stages, workdir, OPTIONS), len(traced)


@pytest.fixture(scope="module")
def drawing(stages):
    return Drawing(stages, Options(**OPTIONS))


def free(drawing):
    return {name: layer for name, layer in drawing.layers.items() if layer.fixed is None}


def items(workdir):
    return [json.loads(line) for line in (workdir / "items.jsonl").read_text().splitlines()]


def test_every_layer_is_measured_in_one_two_and_three_bits_by_one_program(derived, drawing):
    workdir, found, traced = derived
    assert traced == 1
    assert set(found["bits"]) == set(free(drawing)) and len(items(workdir)) == 1 + 3 * len(free(drawing))
    assert found["average"] <= 2.2 < found["stored"]  # the fixed layers have eight bits
    errors = np.array([item["value"]["error"] for item in items(workdir)[1:]]).reshape(-1, 3)
    assert (errors[:, 0] > 0).any() and errors[:, 0].sum() > errors[:, 2].sum()


def test_the_bits_are_those_of_the_errors_and_fit_the_network(derived, drawing):
    workdir, found, _ = derived
    errors = {}
    for item in items(workdir)[1:]:
        name, _, rest = item["name"].partition(" in ")
        errors.setdefault(name, {})[int(rest[0])] = item["value"]["error"]
    sizes = {name: layer.size for name, layer in free(drawing).items()}
    assert found["raised"] == {}  # a network of two updates shows nothing that a layer could spoil
    assert dict(assign(errors, sizes, 2.2).bits) == found["bits"]
    assert set(found["bits"]) <= set(quantisable(drawing.generator.recipe.config.network))
    with Image.open(workdir / "bits.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
    bars = {layer_bits.COLOURS[b - 1] for b in (*found["bits"].values(), 8)}
    assert {tuple(bytes.fromhex(bar[1:])) for bar in bars} <= colours


def test_a_stage_that_was_stopped_measures_no_layer_twice(derived, stages, tmp_path, monkeypatch):
    workdir, found, _ = derived
    lines = (workdir / "items.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "items.jsonl").write_text("".join(lines[:-2]) + lines[-2][:10])  # a crash in the last line but one
    measured, measure = [], Drawing.measure
    monkeypatch.setattr(Drawing, "measure", lambda self, *item: measured.append(item) or measure(self, *item))
    assert derive(stages, epath.Path(tmp_path), OPTIONS) == found
    assert [bits for _, bits in measured] == [2, 3]


def test_what_images_show_is_compared_by_the_detector_or_not_at_all(drawing, stages):
    assert drawing.reference.shape == (4, 32, 32, 3) and drawing.similarity(drawing.reference) in (
        0,
        0.25,
        0.5,
        0.75,
        1,
    )
    other = dataclasses.replace(drawing.options, prompts=("a red circle", "a ring"))
    own = Drawing(stages, other)
    assert len(own.reference) == 2 and own.measure("mid_residual/conv_1/pointwise", 1)["similarity"] is None


def test_one_layer_alone_changes_and_the_generator_stays(drawing):
    name = next(iter(free(drawing)))
    first, again = drawing.measure(name, 1), drawing.measure(name, 1)
    assert first == again
    np.testing.assert_array_equal(drawing._draw(drawing.generator), drawing.reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 2.0}, "target"),
        ({**OPTIONS, "target_bits": 1.2}, "target_bits: an average of 1.2 bits is less than"),
        ({**OPTIONS, "categories": ("cats",)}, "there is no cats; there are single_object"),
    ],
)
def test_options_that_mean_nothing_are_refused(stages, derived, options, message):
    with pytest.raises(ConfigError, match=message):
        derive(stages, derived[0], options)


@pytest.mark.parametrize("arg", ["", ":quick", ":runlocal"])
def test_the_chain_fills_what_was_derived_into_both_stages(arg, tmp_path):
    chain, overrides = load_chain(f"configs/shapes/bits.py{arg}", ["bits.target_bits=1.8"])
    assert [stage.name for stage in chain.stages] == ["base", "bits", "stage_one", "stage_two", "bundle"]
    assert build_dataclass(Options, dict(chain.stages[1].options)).target_bits == 1.8
    run = _Chain(chain, overrides, epath.Path(tmp_path))  # with the example in the place of what is derived
    run.derived["bits"] = {"bits": {"mid_residual/conv_1/pointwise": 1, "upsamplers/block_00/conv": 3}}
    one, two = (run._config(run.stages[name]).recipe for name in ("stage_one", "stage_two"))
    assert one.bits == two.bits == run.derived["bits"]["bits"]
    assert (one.learns_from, two.learns_from) == ("network", "data")
    assert (one.base, two.base) == (str(tmp_path / "base"),) * 2
    assert run.configs["stage_two"].experiment.init_from == str(tmp_path / "stage_one")
