"""The CLIP text encoder is that of transformers, at every layer and with both kinds of pooling."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.module import apply, build, count_parameters
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import clip as maps
from tests.parity import GOLDENS, TOLERANCE, load_checkpoint, published_shapes, relative_error


def run(config, params, example):
    return jax.jit(lambda *args: apply(build(config)[0], *args))(params, example["tokens"], example["mask"])


def every_state(config, params, tokens, mask):
    """What goes into the last layer of every shallower encoder, which is what the layer before returns; the context."""
    found = []
    for depth in range(2, config.layers + 1):
        shallow = {f"block_{i:02d}": params["layers"][f"block_{i:02d}"] for i in range(depth)}
        network, _ = build(dataclasses.replace(config, layers=depth))
        found.append(apply(network, {**params, "layers": shallow}, tokens, mask).sequence)
    return found, apply(build(dataclasses.replace(config, output="last"))[0], params, tokens, mask)


def assert_equals_reference(network, params, example, tolerance):
    """`example`: tokens, the last states, those after every layer, and the pooled projection."""
    found, context = jax.jit(functools.partial(every_state, network.config))(params, example["tokens"], example["mask"])
    for layer, states in enumerate(found):
        assert relative_error(states, example[f"layer_{layer:02d}"]) <= tolerance, layer
    assert relative_error(context.sequence, example["states"]) <= tolerance
    assert relative_error(context.pooled, example["pooled"]) <= tolerance


@pytest.mark.parametrize(("case", "dtype"), [("full", "float32"), ("short", "float32"), ("full", "bfloat16")])
@pytest.mark.parametrize(("name", "pooling"), [("clip_l", "argmax"), ("clip_g", "eos")])
def test_every_layer_and_the_pooled_vector_equal_what_transformers_computed(name, pooling, case, dtype):
    network, params = load_checkpoint(GOLDENS / name, maps, dtype=dtype)
    config = network.config
    assert config.pooling == pooling
    assert config.output == "penultimate"
    assert config.activation == {"clip_l": "quick_gelu", "clip_g": "gelu"}[name]
    assert_equals_reference(network, params, np.load(GOLDENS / name / f"{case}.npz"), TOLERANCE[dtype])


def test_the_golden_texts_tell_the_two_kinds_of_pooling_and_the_activations_apart():
    network, params = load_checkpoint(GOLDENS / "clip_g", maps)
    example = np.load(GOLDENS / "clip_g" / "full.npz")
    for wrong in ({"pooling": "argmax"}, {"activation": "quick_gelu"}):
        assert (
            relative_error(run(dataclasses.replace(network.config, **wrong), params, example).pooled, example["pooled"])
            > 1e-3
        )


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "changes", "lengths", "padded"),
    [
        ("clip_l", {"hidden_act": "gelu", "num_hidden_layers": 2}, (2, 2), 2),
        ("clip_g", {"hidden_act": "quick_gelu", "num_attention_heads": 2, "projection_dim": 24}, (12, 3), 12),
        ("clip_g", {"max_position_embeddings": 77, "num_hidden_layers": 4}, (77, 30, 9), 77),
    ],
)
def test_live_checkpoints_of_transformers_load_and_run_alike(name, changes, lengths, padded, tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import clip as oracle

    model = oracle.make(name, seed=7, **changes)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    example = oracle.run(model, lengths, padded, seed=8)
    for dtype, tolerance in TOLERANCE.items():
        assert_equals_reference(*load_checkpoint(tmp_path, maps, dtype=dtype), example, tolerance)


@pytest.mark.oracle
def test_the_text_half_of_a_whole_clip_is_found_in_its_files(tmp_path):
    pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    from tests.oracles import clip as oracle
    from tests.oracles.randomise import randomise

    text = oracle.make("clip_l").config.to_dict()
    image = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 8, "patch_size": 4}
    whole = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config={**image, **sizes}, projection_dim=20)), 3)
    whole.save_pretrained(tmp_path)
    tokens, mask = oracle.tokens_and_mask(48, (6, 6), 6, seed=1)
    network, params = load_checkpoint(tmp_path, maps)
    pooled = run(network.config, params, {"tokens": tokens, "mask": mask}).pooled
    features = whole.get_text_features(oracle.torch.from_numpy(tokens))
    features = features if isinstance(features, oracle.torch.Tensor) else features.pooler_output
    assert relative_error(pooled, features.detach().numpy()) <= 1e-5


@pytest.mark.parametrize(("preset", "count"), [("clip_l", 123_650_304), ("clip_g", 694_659_840)])
def test_full_size_encoders_expect_the_published_tensors(preset, count):
    config = ClipTextConfig.preset(preset)
    _, spec = build(config)
    assert count_parameters(spec) == count
    published = published_shapes(preset)
    assert reference_shapes(maps.weight_map(config), spec) == published


def test_the_config_file_of_stable_diffusion_is_the_preset_and_other_kinds_are_refused():
    values = {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "vocab_size": 49408,
    }
    assert maps.read_config(values) == ClipTextConfig.preset("clip_l")
    with pytest.raises(ValueError, match="hidden_act = 'relu'; ClipText can only read 'quick_gelu' or 'gelu'"):
        maps.read_config({**values, "hidden_act": "relu"})
    with pytest.raises(ValueError, match="intermediate_size = 1000; ClipText can only read 3072"):
        maps.read_config({**values, "intermediate_size": 1000})
