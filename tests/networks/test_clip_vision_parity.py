"""The CLIP image encoder is that of transformers at every layer, and its two published layouts are one network."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.module import apply, build, count_parameters
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import reference_shapes, to_reference
from snapgen_jax.weights.maps import clip as text_maps
from snapgen_jax.weights.maps import clip_vision as maps
from tests.parity import GOLDENS, TOLERANCE, load_checkpoint, published_shapes, relative_error

pytestmark = pytest.mark.usefixtures("quick_to_compile")

NAMES = ("clip_vision_l", "clip_vision_g")
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def every_layer(config, params, images):
    """The embedding by encoders that end after each of the layers."""
    found = []
    for depth in range(1, config.layers + 1):
        shallow = {f"block_{i:02d}": params["layers"][f"block_{i:02d}"] for i in range(depth)}
        network, _ = build(dataclasses.replace(config, layers=depth))
        found.append(apply(network, {**params, "layers": shallow}, images))
    return found


def assert_equals_reference(network, params, example, tolerance):
    found = jax.jit(functools.partial(every_layer, network.config))(params, example["images"])
    for layer, embedding in enumerate(found):
        assert embedding.dtype == jnp.float32
        assert relative_error(embedding, example[f"layer_{layer:02d}"]) <= tolerance, layer
    assert relative_error(found[-1], example["embedding"]) <= tolerance


@pytest.mark.parametrize(("name", "dtype"), [(name, "float32") for name in NAMES] + [("clip_vision_l", "bfloat16")])
def test_every_layer_equals_what_transformers_computed(name, dtype):
    network, params = load_checkpoint(GOLDENS / name, maps, dtype=dtype)
    config = network.config
    assert (config.activation, config.hidden_width) == {"l": ("quick_gelu", 96), "g": ("gelu", 104)}[name[-1]]
    assert_equals_reference(network, params, np.load(GOLDENS / name / "images.npz"), TOLERANCE[dtype])


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("clip_vision_g", {"image_size": 42, "num_hidden_layers": 1, "intermediate_size": 33}),
        ("clip_vision_l", {"patch_size": 14, "num_attention_heads": 2, "projection_dim": 7}),
    ],
)
def test_live_checkpoints_of_transformers_load_and_run_alike(name, changes, tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import clip_vision as oracle

    model = oracle.make(name, seed=7, **changes)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    example = oracle.run(model, batch=3, seed=8)
    for dtype, tolerance in TOLERANCE.items():
        assert_equals_reference(*load_checkpoint(tmp_path, maps, dtype=dtype), example, tolerance)


def openclip(tensors):
    """The tensors of an image encoder by OpenCLIP's names and in its layout."""
    new = {
        "visual.class_embedding": tensors["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": tensors["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": tensors["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": tensors["visual_projection.weight"].T,
    }
    layers = {name.split(".")[3] for name in tensors if ".encoder.layers." in name}
    names = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    for i in layers:
        ours, theirs = f"vision_model.encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
        names[f"{theirs}.ln_1"], names[f"{theirs}.ln_2"] = f"{ours}.layer_norm1", f"{ours}.layer_norm2"
        names[f"{theirs}.attn.out_proj"] = f"{ours}.self_attn.out_proj"
        names[f"{theirs}.mlp.c_fc"], names[f"{theirs}.mlp.c_proj"] = f"{ours}.mlp.fc1", f"{ours}.mlp.fc2"
        for part in ("weight", "bias"):
            new[f"{theirs}.attn.in_proj_{part}"] = np.concatenate(
                [tensors[f"{ours}.self_attn.{which}_proj.{part}"] for which in "qkv"]
            )
    return {**new, **{f"{a}.{part}": tensors[f"{b}.{part}"] for a, b in names.items() for part in ("weight", "bias")}}


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_openclip_loads_as_the_same_network(name, tmp_path):
    network, params = load_checkpoint(GOLDENS / name, maps)
    held = openclip(load_file(GOLDENS / name / "model.safetensors"))
    text = {"token_embedding.weight": np.zeros((3, 2), np.float32), "logit_scale": np.float32([1.0])}
    save_file({key: np.ascontiguousarray(x) for key, x in {**held, **text}.items()}, tmp_path / "model.safetensors")
    assert maps.layout_of(held) == "openclip" and maps.layout_of(["vision_model.encoder.layers.0.x"]) == "transformers"
    weight_map = maps.weight_map(network.config, "openclip")
    again = load(tmp_path, weight_map, build(network.config)[1], HERE, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    written = to_reference(weight_map, params)
    assert written.keys() == held.keys()
    assert all(np.array_equal(written[key], held[key].astype(np.float32)) for key in held)


# Millions of parameters of both halves as OpenCLIP's docs/model_profile.csv has them; names of the text halves here.
PUBLISHED = {
    "l_14": (303.97, 123.65, "clip_l"),
    "l_14_336": (304.29, 123.65, "clip_l"),
    "h_14": (632.08, 354.03, "clip_h"),
    "g_14": (1012.65, 354.03, "clip_little_g"),
    "big_g_14": (1844.91, 694.66, "clip_g"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_encoders_expect_the_published_tensors(name):
    image, text, text_name = PUBLISHED[name]
    config, text_config = ClipVisionConfig.preset(name), ClipTextConfig.preset(text_name)
    (_, spec), (_, text_spec) = build(config), build(text_config)
    assert round(count_parameters(spec) / 1e6, 2) == image
    assert round((count_parameters(text_spec) + 1) / 1e6, 2) == text  # the scale of the scores is counted with the text
    assert reference_shapes(maps.weight_map(config), spec) == published_shapes(f"clip_vision_{name}")

    whole = published_shapes(f"openclip_{name}")
    halves = maps.weight_map(config, "openclip"), text_maps.weight_map(text_config, "openclip")
    expected = {**reference_shapes(halves[0], spec), **reference_shapes(halves[1], text_spec), "logit_scale": ()}
    assert expected == whole
    for weight_map in halves:  # each half leaves the other's tensors in the file, and no more
        own = {tensor for rule in weight_map.rules for tensor in rule.names}
        assert {tensor for tensor in whole if weight_map.is_ignored(tensor)} == whole.keys() - own
    assert count_parameters(spec) + count_parameters(text_spec) + 1 == sum(map(math.prod, whole.values()))


def test_the_text_half_of_clip_h_expects_the_published_tensors():
    config = ClipTextConfig.preset("clip_h")
    assert reference_shapes(text_maps.weight_map(config), build(config)[1]) == published_shapes("clip_h")


def test_config_files_are_read_and_other_kinds_are_refused():
    published = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16}
    values = {**published, "patch_size": 14, "hidden_act": "gelu", "projection_dim": None}
    whole = {"vision_config": {**values, "projection_dim": 512}, "projection_dim": 1280}
    assert maps.read_config(whole) == ClipVisionConfig.preset("big_g_14")
    values = json.loads((GOLDENS / "clip_vision_l" / "config.json").read_text())
    assert maps.read_config(values).ffn_width is None
    for change, message in (
        ({"hidden_act": "relu"}, "hidden_act = 'relu'; ClipVision can only read 'quick_gelu' or 'gelu'"),
        ({"num_channels": 4}, "num_channels = 4; ClipVision can only read 3"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.read_config({**values, **change})
