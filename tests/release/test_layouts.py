"""What other libraries load of a run: CLIP's text encoder and the autoencoder, as they were trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from snapgen_jax.coding import codec_of_weights
from snapgen_jax.generation import load_recipe
from snapgen_jax.networks.autoencoder import AutoencoderCodec, AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.module import apply, build, flatten
from snapgen_jax.release.layouts import write_counterparts
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.maps import clip, sd3_autoencoder
from snapgen_jax.weights.published import read_config_file
from tests.parity import relative_error
from tests.recipes_for_tests import random_like
from tests.released_for_tests import PROMPTS

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
TEXTS = {
    "its end token has the id 2": ClipTextConfig.preset("smoke", max_tokens=8),
    "no projection": ClipTextConfig.preset("smoke", max_tokens=8, projection=None, eos_id=5),
    "as published": ClipTextConfig.preset("smoke", eos_id=31, bos_id=30, pooling="argmax", key_bias=True),
    "the exact GELU": ClipTextConfig.preset("smoke", eos_id=9, activation="gelu", output="penultimate"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A recipe's, as far as it matters here."""

    networks: tuple = ()
    text: ClipTextConfig | None = None
    autoencoder: AutoencoderConfig | None = None


def random(config):
    return random_like(build(config)[1], 3)


def tokens_of(config, lengths=(8, 5, 2)):
    """`[N, 8]` framed ids and their mask."""
    rng = np.random.default_rng(0)
    tokens = rng.choice([i for i in range(3, 30) if i not in (config.eos_id, config.bos_id)], (len(lengths), 8))
    mask = np.zeros(tokens.shape, np.float32)
    for row, length in enumerate(lengths):
        tokens[row, 0], tokens[row, length - 1], tokens[row, length:] = config.bos_id, config.eos_id, config.pad_id
        mask[row, :length] = 1
    return tokens.astype(np.int32), mask


def exchanged(tokens, config, values):
    """The ids that the written encoder knows."""
    if config.pooling == "eos" and config.eos_id == 2:
        last = values["vocab_size"] - 1
        return np.where(tokens == 2, last, np.where(tokens == last, 2, tokens)).astype(np.int32)
    return tokens


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_encoder_comes_back_through_the_map_of_published_ones(name, tmp_path):
    config = TEXTS[name]
    params = random(config)
    (made,) = write_counterparts(tmp_path, Config(text=config), {"model": {"text": params}}, 10**9)
    assert made.folder == "text_encoder" and made.role == "model/text"
    folder = tmp_path / made.folder
    values = json.loads((folder / "config.json").read_text())
    assert values["eos_token_id"] == {"its end token has the id 2": 31, "as published": 2}.get(name, config.eos_id)
    read = read_config_file(folder / "config.json", clip.read_config)
    read = dataclasses.replace(read, output=config.output, projection=config.projection)
    assert (read.eos_id, read.pooling) == (31 if config.eos_id == 2 else config.eos_id, config.pooling)
    network, spec = build(read)
    loaded = load(folder, clip.weight_map(read), spec, HERE, dtype=jnp.float32)
    same = {path for path in flatten(params) if path != ("token_embedding",)}
    for path in same:
        assert flatten(loaded)[path].tobytes() == np.asarray(flatten(params)[path]).tobytes(), path
    tokens, mask = tokens_of(config)
    ours = apply(build(config)[0], params, tokens, mask)
    theirs = apply(network, loaded, exchanged(tokens, config, values), mask)
    for array in ("sequence", "pooled"):
        np.testing.assert_allclose(getattr(theirs, array), getattr(ours, array), rtol=1e-6, atol=1e-6)


def test_what_transformers_has_no_encoder_for_is_not_written_and_says_why(tmp_path):
    for changes in ({"attention": "full"}, {"neighbours": 2}):
        config = ClipTextConfig.preset("smoke", **changes)
        (made,) = write_counterparts(tmp_path, Config(text=config), {"model": {"text": random(config)}}, 10**9)
        assert not made.folder and "is causal, with none" in made.note
    assert not list(tmp_path.iterdir())


def test_two_text_encoders_go_to_two_folders(tmp_path):
    first, second = (ClipTextConfig.preset("smoke", projection=width) for width in (4, 6))
    both = {"model": {"text": random(first), "other": random(second)}}
    made = write_counterparts(tmp_path, Config(text=first, networks=Config(text=second)), both, 10**9)
    assert [part.folder for part in made] == ["text_encoder", "text_encoder_2"]


def test_the_tokenizer_beside_a_text_encoder_gives_the_ids_that_it_knows(released):
    """By transformers itself, which needs no torch for it."""
    from transformers import AutoTokenizer

    folder = released.folders["clip"]
    theirs = AutoTokenizer.from_pretrained(folder / "text_encoder")
    recipe = load_recipe(folder)
    from snapgen_jax.data.tokenizer_specs import load_tokenizers

    ours = load_tokenizers(recipe.tokenizers(), folder / "tokenizer.json").arrays(
        [*PROMPTS, "<eos> " + 30 * "a ring ", ""], {"tokens": 20, "mask": 20}
    )
    given = theirs(
        [*PROMPTS, "<eos> " + 30 * "a ring ", ""], padding="max_length", truncation=True, return_tensors="np"
    )
    values = json.loads((folder / "text_encoder" / "config.json").read_text())
    np.testing.assert_array_equal(given["input_ids"], exchanged(ours["tokens"], recipe.config.inputs.text, values))
    np.testing.assert_array_equal(given["attention_mask"], ours["mask"])


@pytest.mark.parametrize("quantisation", ["none", "convolutions"])
def test_an_autoencoder_comes_back_as_published_weights(quantisation, tmp_path):
    config = AutoencoderConfig.preset("smoke", scale=1.25, shift=0.5, quantisation=quantisation)
    params = random(config)
    (made,) = write_counterparts(tmp_path, Config(autoencoder=config), {"model": {"autoencoder": params}}, 4_000)
    assert (tmp_path / made.folder / "diffusion_pytorch_model.safetensors.index.json").is_file()
    codec = codec_of_weights(tmp_path / made.folder)
    assert (codec.network.config.scale, codec.network.config.shift) == (1.25, 0.5)
    for path, leaf in flatten(params).items():
        assert np.asarray(flatten(codec.params)[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_a_measured_normalisation_goes_into_the_config(released):
    folder = released.folders["autoencoder"] / "vae"
    statistics = released.states["autoencoder"].players["model"].ema["autoencoder"]["statistics"]
    values = json.loads((folder / "config.json").read_text())
    np.testing.assert_array_equal(np.float32(values["latents_mean"]), statistics["bias"])
    np.testing.assert_array_equal(np.float32(values["latents_std"]), statistics["scale"])
    assert not any("statistics" in name for name in load_file(folder / "diffusion_pytorch_model.safetensors"))


# --- by the libraries themselves --------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("name", TEXTS)
def test_transformers_loads_and_runs_a_text_encoder_alike(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    config = TEXTS[name]
    params = random(config)
    (made,) = write_counterparts(tmp_path, Config(text=config), {"model": {"text": params}}, 6_000)
    model, told = getattr(transformers, made.loader).from_pretrained(tmp_path / made.folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    tokens, mask = tokens_of(config)
    values = json.loads((tmp_path / made.folder / "config.json").read_text())
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(exchanged(tokens, config, values)))
    ours = apply(build(dataclasses.replace(config, output="last"))[0], params, tokens, mask)
    pooled = out.text_embeds if config.projection else out.pooler_output
    assert relative_error(ours.sequence, out.last_hidden_state.numpy()) <= 1e-5
    assert relative_error(ours.pooled, pooled.numpy()) <= 1e-5


@pytest.mark.oracle
def test_transformers_embeds_prompts_as_the_contrastive_run_did(released):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    folder = released.folders["clip"] / "text_encoder"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), CLIPTextModelWithProjection.from_pretrained(folder)
    with torch.no_grad():
        found = model.eval()(**tokenizer(PROMPTS, padding=True, return_tensors="pt")).text_embeds.numpy()
    assert relative_error(released.embeddings, found / np.linalg.norm(found, axis=-1, keepdims=True)) <= 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("normalisation", "quantisation"), [("constant", "none"), ("measured", "none"), ("constant", "convolutions")]
)
def test_diffusers_loads_and_runs_an_autoencoder_alike(normalisation, quantisation, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    config = AutoencoderConfig.preset("smoke", normalisation=normalisation, quantisation=quantisation)
    params = random(config)
    write_counterparts(tmp_path, Config(autoencoder=config), {"model": {"autoencoder": params}}, 10_000)
    model, told = AutoencoderKL.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    mean = config.latent_channels * [config.shift], config.latent_channels * [1 / config.scale]
    if normalisation == "measured":
        mean = model.config.latents_mean, model.config.latents_std
    shift, deviation = (np.float32(values) for values in mean)
    codec = AutoencoderCodec(build(config)[0], params)
    latents = codec.encode(images)
    with torch.no_grad():
        moments = model.eval().encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist.mean
        found = (moments.permute(0, 2, 3, 1).numpy() - shift) / deviation
        decoded = model.decode(torch.from_numpy(np.array(latents * deviation + shift)).permute(0, 3, 1, 2)).sample
    assert relative_error(latents, found) <= 1e-5
    assert relative_error(codec.decode(latents), decoded.permute(0, 2, 3, 1).numpy()) <= 1e-5


def test_the_written_config_of_published_weights_is_that_which_was_read():
    for config in map(AutoencoderConfig.preset, ("sd1", "sdxl", "sd3")):
        assert sd3_autoencoder.read_config(sd3_autoencoder.write_config(config)) == config
    for preset in ("clip_l", "clip_h", "clip_g"):
        config = ClipTextConfig.preset(preset)
        read = clip.read_config(clip.write_config(config))
        assert dataclasses.replace(read, pad_id=config.pad_id) == config
