"""Which precisions there are, what the quantiser makes of a file, and what is refused."""

import contextlib
import dataclasses
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from ai_edge_quantizer import qtyping, quantizer

from snapgen_jax.export import compare, verify
from snapgen_jax.export.bench_process import undelegated
from snapgen_jax.export.bundle import export_bundle
from snapgen_jax.export.client import LiteRTGenerator, litert_unit
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.judging import Judge, Limits, VariantError, fidelity
from snapgen_jax.export.mixed import Budget, BudgetError, search
from snapgen_jax.export.precision import QuantisationError, checked, layers, quantise, weights_of
from snapgen_jax.export.variants import Variants

from .conftest import PROMPTS, QUICK, resign


@pytest.fixture(scope="module")
def unet(small_bundle) -> pathlib.Path:
    """A float32 file with all kinds of layers."""
    return small_bundle / "unet_f32.tflite"


@pytest.fixture(scope="module")
def inputs(unet) -> list[dict]:
    """Four calls of it."""
    rng, described = np.random.default_rng(0), describe(unet).inputs["unet"]
    calls = [{n: rng.standard_normal(t.shape).astype(np.float32) for n, t in described.items()} for _ in range(4)]
    return [{**call, "mask": np.ones_like(call["mask"])} for call in calls]


def outputs(path: pathlib.Path, inputs: list[dict]) -> np.ndarray:
    run = litert_unit(path, "unet")
    return np.stack([run(**call)["prediction"][0] for call in inputs])


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int8_blocks64", "eight bits have no blocks"),
        ("int2", "NaN, or something that is half error"),
        ("static_int8", "int8 in place of float32 inputs"),
        ("int4", "a seventh of the score"),
        ("bf16", "give some of f32, f16, int8, mixed"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_reason(name, reason):
    with pytest.raises(ValueError, match=f"no precision '{name}'.*{reason}"):
        checked(["f32", name])


def test_precisions_come_in_their_own_order_and_once():
    assert checked(["mixed", "f32"]) == ("f32", "mixed")
    for bad in ([], ["f16", "f16"]):
        with pytest.raises(ValueError, match="each once"):
            checked(bad)


def quantised(source: pathlib.Path, target: pathlib.Path, bits: int, granularity: qtyping.QuantGranularity) -> None:
    job = quantizer.Quantizer(str(source))
    job.add_dynamic_config(".*", qtyping.TFLOperationName.ALL_SUPPORTED, bits, granularity)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        job.quantize().export_model(str(target), overwrite=True)


def test_the_reasons_are_those_of_this_quantiser_and_this_runtime(unet, inputs, tmp_path):
    """Should these ever fail, the installed versions can do more than we say."""
    quantised(unet, tmp_path / "blocks.tflite", 8, qtyping.QuantGranularity.BLOCKWISE_64)
    assert "int8" not in weights_of(describe(tmp_path / "blocks.tflite"))
    quantised(unet, tmp_path / "two.tflite", 2, qtyping.QuantGranularity.CHANNELWISE)
    error = verify.relative_l2(outputs(tmp_path / "two.tflite", inputs[:1]), outputs(unet, inputs[:1]))
    assert error > 0.4


# --- the quantiser ----------------------------------------------------------------------------------------------------


def test_eight_bits_are_all_weights_of_products(unet, inputs, tmp_path):
    count = quantise(unet, tmp_path / "int8.tflite")
    before, after = weights_of(describe(unet)), weights_of(describe(tmp_path / "int8.tflite"))
    assert after["int8"] == count > 0.8 * before["float32"]
    assert after["int8"] + after["float32"] == before["float32"]
    assert (tmp_path / "int8.tflite").stat().st_size < 0.8 * unet.stat().st_size
    error = verify.relative_l2(outputs(tmp_path / "int8.tflite", inputs), outputs(unet, inputs))
    assert 1e-4 < error < compare.LIMITS["int8"]
    kinds = {op.name: op.inputs[1].dtype for op in describe(tmp_path / "int8.tflite").operators if len(op.inputs) == 3}
    assert (kinds["CONV_2D"], kinds["FULLY_CONNECTED"], kinds["DEPTHWISE_CONV_2D"]) == ("int8", "int8", "float32")


def test_eight_bits_leave_xnnpack_at_no_node_more_than_float32(unet, tmp_path):
    quantise(unet, tmp_path / "int8.tflite")
    assert undelegated(str(tmp_path / "int8.tflite")) == undelegated(str(unet)) == {"RESIZE_NEAREST_NEIGHBOR": 1}


def test_four_bits_are_where_they_were_asked_for(unet, tmp_path):
    every = layers(unet)
    assert len(every) == 8 and {layer.kind for layer in every} == {"CONV_2D", "FULLY_CONNECTED"}
    chosen = every[::3]
    quantise(unet, tmp_path / "some.tflite", chosen)
    stored, wanted = describe(tmp_path / "some.tflite"), {scope for layer in chosen for scope in layer.scopes}
    bits = {f"{op.outputs[0].name};": op.inputs[1].dtype for op in stored.operators if len(op.inputs) > 1}
    assert {scope for scope, dtype in bits.items() if dtype == "int4"} == wanted
    assert weights_of(stored)["int4"] == sum(layer.size for layer in chosen)
    quantise(unet, tmp_path / "alone.tflite", chosen[:1], others="f32")
    assert "int8" not in weights_of(describe(tmp_path / "alone.tflite"))


def test_a_layer_that_is_not_in_the_file_is_an_error(unet, tmp_path):
    stray = dataclasses.replace(layers(unet)[0], scopes=("nowhere;",))
    with pytest.raises(QuantisationError, match="were to take four bits, and the quantiser gave them to 0"):
        quantise(unet, tmp_path / "x.tflite", [stray])


def test_both_arithmetics_have_the_same_weights_and_differ_by_the_rounding_of_activations(unet, inputs, tmp_path):
    quantise(unet, tmp_path / "integer.tflite")
    quantise(unet, tmp_path / "float.tflite", arithmetic="float")
    exact = outputs(unet, inputs)
    integer, floating = (
        verify.relative_l2(outputs(tmp_path / f"{kind}.tflite", inputs), exact) for kind in ("integer", "float")
    )
    assert 1e-4 < floating < integer


# --- the search -------------------------------------------------------------------------------------------------------


class Calls:
    """Outputs of single calls, in place of whole trajectories."""

    def __init__(self, unet, inputs, folder):
        self.inputs, self.sources, self.targets = inputs, {"unet": unet}, {"unet": folder / "unet_mixed.tflite"}
        self.expected, self.draws = {"y": outputs(unet, inputs)}, 0

    def draw(self, files, count):
        self.draws += 1
        return {"y": outputs(files["unet"], self.inputs[:count])}

    def search(self, **budget):
        return search(self.sources, self.targets, self.draw, self.expected, Budget(**budget))


@pytest.fixture
def calls(unet, inputs, tmp_path, monkeypatch) -> Calls:
    """A search over a few layers: the largest."""
    few = sorted(layers(unet), key=lambda layer: -layer.size)[:4]
    monkeypatch.setattr("snapgen_jax.export.mixed.layers", lambda path: few)
    return Calls(unet, inputs, tmp_path)


def test_the_search_keeps_to_decibels_with_as_few_bits_as_it_can(calls, tmp_path):
    every, none = calls.search(decibels=0.1), calls.search(bytes=1e9)
    assert len(every.four["unet"]) == len(none.eight["unet"]) == 4 and every.decibels < none.decibels
    budget = (every.decibels + none.decibels) / 2
    found = calls.search(decibels=budget)
    assert found.decibels >= budget and 0 < len(found.four["unet"]) < 4
    assert found.bytes == calls.targets["unet"].stat().st_size < none.bytes
    file = calls.targets["unet"].read_bytes()
    assert calls.search(decibels=budget) == found and calls.targets["unet"].read_bytes() == file
    assert weights_of(describe(calls.targets["unet"]))["int4"] == sum(layer.size for layer in found.four["unet"])
    # One layer more, in the order that the search put them in, is too much.
    order = [*found.four["unet"], *found.eight["unet"]]
    quantise(calls.sources["unet"], tmp_path / "more.tflite", order[: len(found.four["unet"]) + 1])
    assert np.median(fidelity(calls.draw({"unet": tmp_path / "more.tflite"}, 4), calls.expected)) < budget
    described = json.loads(json.dumps(found.describe()))
    bits = {tuple(row["operators"]): row["bits"] for row in described["layers"]["unet"]}
    assert bits == {layer.scopes: 4 if layer in found.four["unet"] else 8 for layer in order}
    # The same files keep to their own bytes, too.
    assert calls.search(bytes=found.bytes).four == found.four
    assert described["budget"] == {"bytes": None, "decibels": budget}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bytes": 1000}, "budget is 1000 bytes, and the files are .* with four bits in all 4 layers"),
        ({"decibels": 98.0}, "asks for 98.0 dB; 0 of 4 layers in four bits are .* bytes and"),
        ({"decibels": 98.0, "bytes": 1e9}, "asks for 98.0 dB in 1000000000 bytes"),
    ],
)
def test_a_budget_that_nothing_keeps_to_is_an_error_that_says_what_can_be_had(calls, budget, message):
    with pytest.raises(BudgetError, match=message):
        calls.search(**budget)


# --- in a bundle ------------------------------------------------------------------------------------------------------


def export_toy(toy, tokenizer_json, folder, **options):
    return export_bundle(toy.recipe, toy.params, {}, tokenizer_json, folder, backend=QUICK, gpu_check="skip", **options)


def strict(toy) -> Judge:
    """Passes a picture that is float32's to one grey level, which float16's are and those of eight bits are not."""
    prompts = PROMPTS * 30
    exact = LiteRTGenerator(toy.folder).generate(prompts)
    same = [lambda image, x=x: bool(verify.grey_levels(image, x).max() <= 1) for x in exact]
    return Judge("strict", prompts, range(60), lambda i, image: same[i](image))


def test_a_default_precision_that_draws_less_well_is_left_out_and_named(toy, tokenizer_json, tmp_path, caplog):
    report = export_toy(toy, tokenizer_json, tmp_path / "bundle", judge=strict(toy))
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["precisions"] == ["f32", "f16"] and list(manifest["refused"]) == ["int8"] == list(report.refused)
    assert "verdicts of the strict score" in manifest["refused"]["int8"]
    assert "the bundle goes without int8" in caplog.text
    paired = manifest["variants"]["f16"]["paired"]
    assert (paired["prompts"], paired["gained"], paired["lost"]) == (60, 0, 0) and paired["low"] < 0
    assert list((tmp_path / "bundle").glob("*int8*")) == [] and "int8" not in json.dumps(manifest["units"])
    assert not any("int8" in name for name in report.numbers)
    assert all(check.passed for check in verify.checks(tmp_path / "bundle"))


def test_one_that_was_asked_for_by_name_is_an_error_and_nothing_is_written(toy, tokenizer_json, tmp_path):
    with pytest.raises(VariantError, match=r"int8 is refused: of 60 prompts it gains 0 .* Nothing was written"):
        export_toy(toy, tokenizer_json, tmp_path / "bundle", judge=strict(toy), precisions=("f32", "int8"))
    with pytest.raises(VariantError, match=r"int8 is refused: its median example is .* dB .*no exact score is known"):
        limits = Limits(decibels=90)
        export_toy(toy, tokenizer_json, tmp_path / "bundle", limits=limits, precisions=("f32", "int8"))
    with pytest.raises(VariantError, match="mixed is refused: there is no layer that could take four bits"):
        export_toy(toy, tokenizer_json, tmp_path / "bundle", precisions=("f32", "mixed"))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_eight_bits_has_tolerances_that_notice_other_weights(toy, tokenizer_json, tmp_path):
    folder = tmp_path / "bundle"
    export_toy(toy, tokenizer_json, folder, precisions=("f32", "int8"), limits=Limits(decibels=20))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["units"]["net"]["weights"]["int8"]["int8"] > 0
    assert "int8" not in manifest["units"]["text"]["weights"]["int8"]  # its table is read by a gather
    assert manifest["variants"]["int8"]["judged_by"] == "decibels, since no exact score is known of the run"
    assert all(check.passed for check in verify.checks(folder, ["int8"]))
    # Weights that are off by a tenth are noticed, though all is rounded to eight bits.
    params = {"net": {**toy.params["net"], "conv": toy.params["net"]["conv"] * 1.1}}
    unit = toy.recipe.exports().units[0]
    to_tflite(unit.function, params, unit.inputs, unit.name, tmp_path / "other.tflite", QUICK)
    quantise(tmp_path / "other.tflite", folder / "net_int8.tflite")
    resign(folder)
    assert any("int8 golden" in check.name for check in verify.checks(folder, ["int8"]) if not check.passed)


def test_where_no_unit_has_a_product_of_weights_there_are_no_eight_bits(toy, tokenizer_json, tmp_path):
    table = toy.folder / "text_f32.tflite"
    assert quantise(table, tmp_path / "text_int8.tflite") == 0
    variants: Any = Variants(("f32", "int8"), ("int8",), None, Limits(), Budget())
    with pytest.raises(QuantisationError, match="no weight in any unit that it could change"):
        variants.write("int8", {"text": table}, {"text": tmp_path / "text_int8.tflite"}, None, {"text": {}})
