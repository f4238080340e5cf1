"""Large units: an encoder that is several files, conversion in a process of its own, and the memory that files take."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.export import convert, memory
from snapgen_jax.export.client import litert_unit
from snapgen_jax.export.compat import Requirements, check
from snapgen_jax.export.older import from_schema_2
from snapgen_jax.export.program import SCHEMA, BundleError, parse
from snapgen_jax.export.verify import relative_l2
from snapgen_jax.inputs._published_export import UNIT_PARAMETERS, layer_ranges, text_units
from snapgen_jax.networks.clip import ClipTextConfig, gelu
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.module import apply, build
from tests.networks.tiny import drawn

from .conftest import QUICK, ToyRecipe
from .toys import flow

CLIP = ClipTextConfig.preset("smoke", layers=4, output="penultimate", activation="gelu", key_bias=True)
GEMMA = Gemma2Config.preset("smoke", vocab_size=32)
LENGTHS = {"clip_g": CLIP.max_tokens, "language": 7}


def whole(name, config):
    """An encoder's parameters, one text's arrays, and what it makes of them."""
    network, params, random = build(config)[0], drawn(build(config)[0]), np.random.default_rng(0)
    ids = random.integers(0, 32, (1, LENGTHS[name])).astype(np.int32)
    mask = np.ones(ids.shape, np.float32)
    if name == "language":
        mask[:, 5:] = 0
    context = jax.jit(functools.partial(apply, network))(params, ids, mask)
    return {name: jax.tree.map(jnp.asarray, params)}, {name: ids, f"{name}_mask": mask}, context


@pytest.mark.parametrize(("name", "config"), [("clip_g", CLIP), ("language", GEMMA)])
def test_consecutive_units_equal_the_whole_encoder(name, config):
    weights, arrays, expected = whole(name, config)
    (one,), two = text_units(name, config, LENGTHS[name]), None
    sizes = sum(leaf.size for leaf in jax.tree.leaves(one.select(weights)))
    two = text_units(name, config, LENGTHS[name], most=int(0.7 * sizes))
    assert [unit.name for unit in two] == [f"{name}_1", f"{name}_2"]
    held = [sum(leaf.size for leaf in jax.tree.leaves(unit.select(weights))) for unit in two]
    assert sum(held) == sizes and max(held) <= 0.7 * sizes, "each has its own layers alone"
    for units in ([one], two):
        made = dict(arrays)
        for unit in units:
            made |= jax.jit(unit.function)(unit.select(weights), **{n: made[n] for n in unit.inputs})
        assert relative_l2(made[f"{name}_states"], expected.sequence) <= 1e-6
        if name == "clip_g":
            assert relative_l2(made["clip_g_pooled"], expected.pooled) <= 1e-6


def test_at_full_size_clip_g_is_three_units_and_gemmas_token_table_is_too_large():
    assert layer_ranges(ClipTextConfig.preset("clip_l"), UNIT_PARAMETERS) == [(0, 12)]
    assert layer_ranges(ClipTextConfig.preset("clip_g"), UNIT_PARAMETERS) == [(0, 8), (8, 20), (20, 32)]
    with pytest.raises(ValueError, match="667,689,984 parameters; a unit holds 350,000,000 at most"):
        layer_ranges(Gemma2Config(), UNIT_PARAMETERS)


def test_gelu_is_that_of_jax_and_has_no_operator_that_a_gpu_lacks():
    x = jnp.linspace(-12, 12, 100_001)
    assert relative_l2(jax.jit(gelu)(x), jax.nn.gelu(x, approximate=False)) < 2e-7
    assert gelu(jnp.bfloat16(1)).dtype == jnp.bfloat16


def test_a_unit_is_converted_in_a_process_of_its_own(tmp_path):
    weights, arrays, _ = whole("clip_g", CLIP)
    first, second = text_units("clip_g", CLIP, LENGTHS["clip_g"], most=8_000)
    f32, f16 = tmp_path / "f32.tflite", tmp_path / "f16.tflite"
    hidden = jax.jit(first.function)(first.select(weights), clip_g=arrays["clip_g"])
    given = {name: np.asarray({**arrays, **hidden}[name]) for name in second.inputs}
    peak = convert.to_tflite_apart(
        second.function, second.select(weights), second.inputs, "s", f32, QUICK, {"f16": f16}
    )
    assert 50e6 < peak < 4e9 and {path.name for path in tmp_path.iterdir()} == {"f32.tflite", "f16.tflite"}
    expected = jax.jit(second.function)(second.select(weights), **given)
    for path, limit in ((f32, 1e-5), (f16, 2e-3)):
        made = litert_unit(path, "s")(**given)
        assert max(relative_l2(made[name], expected[name]) for name in expected) <= limit
    assert check(f32, Requirements(gpu=False)).max_rank <= 4


def test_what_fails_in_that_process_is_named(tmp_path):
    unit = ToyRecipe().exports().units[0]
    with pytest.raises(TypeError, match="net: its function does not travel to another process"):
        convert.to_tflite_apart(lambda weights, **a: a, {}, unit.inputs, "net", tmp_path / "x.tflite", QUICK)
    with pytest.raises(convert.ConversionError, match=r"the process that converts it failed(.|\n)*net"):
        convert.to_tflite_apart(ToyRecipe.denoise, {}, unit.inputs, "x", tmp_path / "x.tflite", QUICK)
    assert not list(tmp_path.iterdir())


def test_parameters_beyond_the_formats_end_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(convert, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"a \.tflite file ends at 2 GiB; split it into consecutive units"):
        convert.to_tflite(lambda w, *, x: {"y": x}, np.zeros(26, "f"), {"x": jax.ShapeDtypeStruct((1,), "f")}, "s", "s")


def test_memory_of_a_file_that_does_not_run_is_refused(tmp_path):
    (tmp_path / "bad.tflite").write_bytes(b"nothing")
    files = {"f32": {"bad": {"path": str(tmp_path / "bad.tflite"), "signature": "bad", "inputs": {}}}}
    with pytest.raises(memory.MeasurementError, match="ValueError"):
        memory.measure(files)


def test_memory_counts_what_is_held_together_and_in_turn(tmp_path):
    weights = np.random.default_rng(0).standard_normal((1024, 8192)).astype("f")  # 32 MB
    files = {}
    for name in ("a", "b", "c"):
        path = convert.to_tflite(
            lambda w, *, x: {"y": x @ w}, weights, {"x": jax.ShapeDtypeStruct((1, 1024), "float32")}, name,
            tmp_path / f"{name}.tflite", QUICK,
        )  # fmt: skip
        files[name] = {"path": str(path), "signature": name, "inputs": {"x": ((1, 1024), "float32")}}
    found = memory.measure({"f32": files})
    process, peaks = found["process"], found["f32"]
    one, size = max(peaks["units"].values()) - process, weights.nbytes
    assert size < one < 4 * size
    assert peaks["together"] - process > 2.5 * one > 1.5 * (peaks["in_turn"] - process)


# --- programs of schema 2 --------------------------------------------------------------------------------------------


def test_a_program_of_schema_2_says_what_it_said():
    program = json.loads(json.dumps(ToyRecipe().exports().program))
    (entry,) = program.pop("tokenizers")
    before = {**program, "schema": 2, "tokenizer": {"tokens": "tokens", "mask": "mask"}}
    assert from_schema_2(before) == {**program, "tokenizers": [entry], "schema": SCHEMA}
    assert parse(from_schema_2({**flow(), "schema": 2})).tokenizers == ()
    del before["inputs"]["tokens"]["null"]
    with pytest.raises(BundleError, match="the tokenizer makes no input with a null of its own"):
        from_schema_2(before)
    with pytest.raises(BundleError, match="has schema 3, and the manifest 2"):
        from_schema_2(flow())
