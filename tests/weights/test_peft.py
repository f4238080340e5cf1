"""Adapters in peft's files: what peft computes unmerged we compute merged, and what we write peft reads."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.lora import LoraConfig, init_adapters, merge
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import apply, build, flatten
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.maps import clip, sd3_mmdit
from snapgen_jax.weights.peft import module_names, read_peft, write_peft
from tests.parity import GOLDENS, TOLERANCE, load_checkpoint, relative_error
from tests.recipes_for_tests import ONE_STAGE

MAPS = {"clip_l": clip, "mmdit_medium": sd3_mmdit}


def run(name, network, params):
    """As `tests.oracles.adapters.run`."""
    case = np.load(GOLDENS / name / ("full.npz" if name == "clip_l" else "tall.npz"))
    if name == "clip_l":
        return apply(network, params, case["tokens"], case["mask"]).pooled
    context = TextContext(case["sequence"], jnp.ones(case["sequence"].shape[:2]), case["pooled"])
    return Denoiser(network, "velocity")(params, case["x"], case["t"], context)[0]


@pytest.mark.parametrize("name", MAPS)
def test_the_merged_network_computes_what_peft_computes_unmerged(name):
    network, params = load_checkpoint(GOLDENS / name, MAPS[name])
    adapters, scale = read_peft(GOLDENS / "peft" / name, network.config)
    expected = np.load(GOLDENS / "peft" / name / "out.npy")
    merged = merge({"net": params}, {"net": adapters}, scale)["net"]
    assert relative_error(run(name, network, merged), expected) <= TOLERANCE["float32"]
    assert relative_error(run(name, network, params), expected) > 0.05


def random_adapters(config, lora, seed=0):
    _, spec = build(config)
    drawn = init_adapters(lora, {"net": spec}, jax.random.key(seed))["net"]
    return jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), drawn)


EVERYTHING = LoraConfig(rank=3, alpha=1.5, targets=("",))
CONFIGS = [UNetConfig.preset("smoke", **ONE_STAGE), ClipTextConfig.preset("smoke"), MMDiTConfig.preset("smoke")]


@pytest.mark.parametrize("config", CONFIGS, ids=["unet", "clip", "mmdit"])
def test_what_is_written_is_read_bit_for_bit(config, tmp_path):
    adapters = random_adapters(config, EVERYTHING)
    write_peft(tmp_path, adapters, config, rank=3, alpha=1.5)
    found, scale = read_peft(tmp_path, config)
    assert scale == 0.5
    before, after = flatten(adapters), flatten(found)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_published_modules_have_their_published_names_and_ours_have_their_paths():
    names = module_names(MMDiTConfig.preset("smoke", depth=3, dual=0))
    assert names["joint_blocks", "image", "attention", "query", "kernel"] == (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
    )
    assert names["last_block", "text", "attention", "value", "kernel"] == ("transformer_blocks.2.attn.add_v_proj",)
    unet = module_names(UNetConfig.preset("smoke"))
    assert unet["time", "inner", "kernel"] == ("time.inner",)


def copied(tmp_path, **changes):
    folder = tmp_path / "adapters"
    shutil.copytree(GOLDENS / "peft" / "clip_l", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def clip_config(**changes):
    return clip.read_config(json.loads((GOLDENS / "clip_l" / "config.json").read_text()), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; only 'LORA' is read"),
        ({"use_dora": True}, "use_dora=True; only plain LoRA is read"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\]; only plain LoRA"),
        ({"bias": "all"}, "bias='all'; only 'none' is read"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        read_peft(copied(tmp_path, **changes), clip_config())


def test_adapters_of_another_network_are_refused_by_name(tmp_path):
    folder = copied(tmp_path)
    with pytest.raises(WeightsError, match=r"this ClipTextConfig does not have: .*layers\.2\.mlp\.fc2\.lora_A"):
        read_peft(folder, clip_config(layers=2))
    with pytest.raises(WeightsError, match=r"token_embedding has the shapes \[3, 50\] .* takes \[3, 60\]"):
        read_peft(folder, clip_config(vocab_size=60))
    (folder / "adapter_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        read_peft(folder, clip_config())


def test_rank_stabilised_adapters_have_their_scale(tmp_path):
    plain, scale = read_peft(copied(tmp_path), clip_config())
    shutil.rmtree(tmp_path / "adapters")
    stable, other = read_peft(copied(tmp_path, use_rslora=True), clip_config())
    assert scale == other == 1.0  # several scales: they are in the matrices
    fc2 = "layers", "block_01", "outer", "kernel", "lora_B"
    np.testing.assert_allclose(flatten(stable)[fc2], flatten(plain)[fc2] * np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_peft_reads_what_we_write(name, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    oracle = pytest.importorskip("tests.oracles.adapters", reason="the extra oracle is not installed")
    network, params = load_checkpoint(GOLDENS / name, MAPS[name])
    adapters = random_adapters(network.config, LoraConfig(3, 1.5, ("query$", "outer$", "token_embedding$|patch$")))
    adapters = jax.tree.map(lambda x: 0.3 * x, adapters)
    write_peft(tmp_path, adapters, network.config, rank=3, alpha=1.5)
    expected = oracle.run(oracle.read(GOLDENS, name, tmp_path), name)
    merged = merge({"net": params}, {"net": adapters}, 0.5)["net"]
    assert relative_error(run(name, network, merged), expected) <= TOLERANCE["float32"]
    assert relative_error(run(name, network, params), expected) > 0.05
