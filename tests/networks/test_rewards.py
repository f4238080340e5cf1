"""Rewards and their gradients by the image are those of the references, preprocessing included."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from snapgen_jax.networks.module import apply, build, count_parameters, flatten
from snapgen_jax.networks.rewards import DEVIATION, MEAN, RewardConfig, preprocess
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.frozen import load_reward
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import clip as text_maps
from snapgen_jax.weights.maps import clip_vision as image_maps
from snapgen_jax.weights.maps import rewards as maps
from tests.networks.test_clip_vision_parity import openclip
from tests.networks.tiny import drawn
from tests.parity import GOLDENS, published_shapes, relative_error

pytestmark = pytest.mark.usefixtures("quick_to_compile")

FOLDER = GOLDENS / "rewards"
FIELDS = {
    "cosine": {},
    "pickscore": {"score": "scaled"},
    "hpsv2": {"preprocessing": "hpsv2"},
    "aesthetic": {"score": "linear", "hidden": (12, 10, 8, 6), "preprocessing": "torchvision"},
}
NAMES = {"cosine": "clip_h"}  # under which a reward is published


def config_of(name, folder):
    values = json.loads((pathlib.Path(folder) / "config.json").read_text())
    text = None if name == "aesthetic" else text_maps.read_config(values)
    return RewardConfig(vision=image_maps.read_config(values), text=text, **FIELDS[name])


def loaded(name, folder, head="head"):
    network, _ = build(config_of(name, folder))
    return network, load_reward(network, NAMES.get(name, name), str(folder), str(pathlib.Path(folder) / head))


def assert_equals_reference(network, params, name, example):
    tokens = jnp.asarray(example["tokens"], jnp.int32)

    def total(images):
        rewards = apply(network, params, images, tokens)
        return rewards.sum(), rewards

    gradient, rewards = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(example["images"]))
    assert rewards.shape == (len(tokens),) and rewards.dtype == jnp.float32
    assert relative_error(rewards, example[name]) <= 1e-5
    assert relative_error(gradient, example[f"{name}_gradient"]) <= 1e-4


@pytest.mark.parametrize("name", FIELDS)
def test_rewards_and_gradients_equal_what_torch_computed(name):
    network, params = loaded(name, FOLDER)
    for case in ("wide", "tall", "small", "same") if name in ("cosine", "hpsv2") else ("tall",):
        assert_equals_reference(network, params, name, np.load(FOLDER / f"{case}.npz"))


def test_the_cases_tell_the_preprocessings_apart():
    """Rests of a crop that are odd, borders, and overshoots that are clipped."""
    images = jnp.asarray(np.load(FOLDER / "wide.npz")["images"])
    forms = {form: preprocess(images, 28, form) for form in ("transformers", "torchvision", "hpsv2")}
    assert all(x.shape == (2, 28, 28, 3) for x in forms.values())
    assert not jnp.allclose(forms["transformers"], forms["torchvision"])
    assert not jnp.allclose(forms["transformers"], forms["hpsv2"])
    unclipped = forms["hpsv2"] * np.asarray(DEVIATION) + np.asarray(MEAN)
    assert unclipped.max() > 1.01 and jnp.abs(unclipped[:, 0]).max() < 1e-6


@pytest.mark.oracle
@pytest.mark.parametrize("sizes", [(1, 30, 97), (2, 224, 33), (3, 29, 28)])
def test_live_rewards_and_gradients_equal_those_of_torch(sizes, tmp_path):
    pytest.importorskip("torch")
    from tests.oracles import rewards as oracle

    clip, predictor = oracle.make(seed=5, activation="quick_gelu")
    clip.save_pretrained(tmp_path)
    (tmp_path / "head").mkdir()
    save_file({name: value.numpy() for name, value in predictor.state_dict().items()}, tmp_path / "head/h.safetensors")
    example = oracle.run(clip, predictor, *sizes, seed=6)
    for name in oracle.REWARDS:
        assert_equals_reference(*loaded(name, tmp_path), name, example)


def test_a_reward_in_the_layout_of_openclip_is_the_same(tmp_path):
    held = load_file(FOLDER / "model.safetensors")
    network, params = loaded("pickscore", FOLDER)
    text = {
        "token_embedding.weight": held["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": held["text_model.embeddings.position_embedding.weight"],
        "text_projection": held["text_projection.weight"].T,
        "logit_scale": held["logit_scale"],
    }
    # The same renaming as of the image half, whose names it is given.
    as_image = {
        name.replace("text_model", "vision_model").replace("final_layer_norm", "post_layernorm"): value
        for name, value in held.items()
        if name.startswith("text_model") and "embeddings" not in name
    }
    stand_ins = {name: held[name] for name in held if "vision_model.embeddings" in name or "pre_layrnorm" in name}
    renamed = openclip({**as_image, **stand_ins, "visual_projection.weight": held["visual_projection.weight"]})
    for name, value in renamed.items():
        if "resblocks" in name or "ln_post" in name:
            text[name.removeprefix("visual.").replace("ln_post", "ln_final")] = value
    image = {name: value for name, value in held.items() if not name.startswith("text") and name != "logit_scale"}
    tensors = {name: value.copy(order="C") for name, value in {**openclip(image), **text}.items()}
    save_file(tensors, tmp_path / "reward.safetensors")
    again = load_reward(network, "hpsv2", str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_pixels_are_those_of_the_references_eight_bits():
    """The references resize with Pillow, which rounds to 8 bits after either axis."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (61, 40, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((28, 42), Image.Resampling.BICUBIC), np.float32)[7:35]
    given = preprocess(jnp.asarray(image[None] / 255, jnp.float32), 28) * np.asarray(DEVIATION) + np.asarray(MEAN)
    assert np.abs(255 * given[0] - expected).max() < 1.6


@pytest.mark.parametrize("form", ["transformers", "torchvision", "hpsv2"])
def test_white_and_black_areas_have_their_gradient(form):
    def brightness(value):
        images = jnp.full((1, 50, 40, 3), value)
        return jax.grad(lambda x: jnp.sum(preprocess(x, 28, form)))(images)

    white, grey, black = map(brightness, (1.0, 0.5, 0.0))
    assert jnp.abs(grey).max() > 0
    np.testing.assert_array_equal(white, grey)
    np.testing.assert_array_equal(black, grey)


@pytest.mark.parametrize("name", ["smoke", "linear"])
def test_every_parameter_changes_the_reward(name):
    fields = {"score": "linear", "text": None, "hidden": (5,)} if name == "linear" else {"score": "scaled"}
    network, _ = build(RewardConfig.preset("smoke", **fields))
    params = drawn(network)
    images = jax.random.uniform(jax.random.key(0), (2, 40, 36, 3))
    tokens = jnp.array([[1, 5, 6, 2, 0, 0, 0, 0], [1, 7, 2, 0, 0, 0, 0, 0]])
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(apply(network, p, images, tokens) ** 2)))(params)
    for path, leaf in flatten(gradients).items():
        assert jnp.abs(leaf).max() > 0, "/".join(path)


@pytest.mark.parametrize(
    ("preset", "shapes", "count"),
    [
        ("clip_l", "openclip_l_14", 427_616_512),
        ("hpsv2", "openclip_h_14", 986_109_440),
        ("pickscore", "openclip_h_14", 986_109_441),
    ],
)
def test_full_size_rewards_expect_the_published_tensors(preset, shapes, count):
    config = RewardConfig.preset(preset)
    _, spec = build(config)
    assert count_parameters(spec) == count
    weight_map = maps.weight_map(config, "openclip")
    published, expected = published_shapes(shapes), reference_shapes(weight_map, spec)
    assert expected.items() <= published.items()
    assert {name for name in published if weight_map.is_ignored(name)} == {"logit_scale"}
    assert published.keys() - expected.keys() <= {"logit_scale"}


def test_the_published_predictor_expects_its_tensors():
    config = RewardConfig.preset("aesthetic")
    _, spec = build(config)
    widths = (768, 1024, 128, 64, 16, 1)
    expected = {}
    for layer, before, after in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        expected |= {f"layers.{layer}.weight": (after, before), f"layers.{layer}.bias": (after,)}
    assert reference_shapes(maps.head_map(config), {"head": spec["head"]}) == expected
    assert count_parameters(spec["head"]) == 927_969
    assert reference_shapes(maps.weight_map(config), {"vision": spec["vision"]}) == published_shapes("clip_vision_l_14")


@pytest.mark.parametrize(
    ("name", "folders", "message"),
    [
        ("pickscore", ("", ""), r"yuvalkirstain/PickScore_v1 \(its licence is not verified: see its page\)"),
        ("hpsv2", ("", ""), r"xswu/HPSv2 \(Apache-2.0\)\n.*HPS_v2.1_compressed.pt.*\nIt is a pickle"),
        ("aesthetic", ("", ""), "openai/clip-vit-large-patch14"),
        ("aesthetic", (str(FOLDER), ""), "https://github.com/christophschuhmann/improved-aesthetic-predictor"),
        ("pickscore", ("/absent", ""), "/absent is not a folder"),
        ("pickscore", (str(GOLDENS / "clip_l"), ""), "missing: vision_model"),
    ],
)
def test_missing_weights_say_where_to_get_them_and_on_which_terms(name, folders, message):
    network, _ = build(config_of(name, FOLDER))
    with pytest.raises(ConfigError, match=message):
        load_reward(network, name, *folders)


def test_encoders_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="the image's embedding is 1024 wide and the text's 768"):
        RewardConfig.preset("clip_l", vision=RewardConfig.preset("clip_h").vision)
    with pytest.raises(ValueError, match="'linear' reads the image alone"):
        RewardConfig(score="linear")
