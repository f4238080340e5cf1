"""A run starts from a published network: a UNet of Stable Diffusion, or an autoencoder whose decoder is pruned."""

from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from snapgen_jax.config import read_one, resolve
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from snapgen_jax.experiment import Experiment
from snapgen_jax.networks.pruned import PrunedDecoderConfig, pruned
from snapgen_jax.recipes._base import load_base
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.typed import plain
from snapgen_jax.weights.frozen import load_network
from snapgen_jax.weights.maps import clip, sd3_autoencoder, sd_unet
from snapgen_jax.weights.published import read_config_file
from tests.parity import GOLDENS

SD15 = GOLDENS / "pipeline_sd15"


@pytest.fixture(scope="module")
def unet():
    return load_network(SD15 / "unet")["sd_unet"]


def started_from(config):
    experiment = Experiment(resolve(config), epath.Path("nowhere"))
    recipe: Any = experiment.recipe
    state = jax.eval_shape(recipe.init, key(0, 0, "init"))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    return recipe, recipe.warm_start(state, experiment.earlier_weights()).players["model"].params


def test_robust_training_starts_from_a_published_unet(unet):
    config: Any = read_one("configs/snapfusion/robust.py:runlocal")
    config.init_from = str(SD15 / "unet")
    with pytest.raises(ConfigError, match="the run that init_from names holds another network than the config"):
        started_from(config)
    network = read_config_file(SD15 / "unet" / "config.json", sd_unet.read_config)
    config.network = plain(network)
    config.inputs.clip_l.width = config.inputs.clip_l.projection = network.context_width
    recipe, params = started_from(config)
    jax.tree.map(np.testing.assert_array_equal, params["sd_unet"], unet)
    frozen = load_base(str(SD15 / "unet"), recipe, None)
    jax.tree.map(np.testing.assert_array_equal, frozen["sd_unet"], unet)


def test_a_pruned_decoder_starts_from_a_published_autoencoder():
    whole = read_config_file(SD15 / "vae" / "config.json", sd3_autoencoder.read_config)
    config: Any = read_one("configs/snapfusion/decoder.py:runlocal")
    config.init_from = str(SD15 / "vae")
    config.inputs.codec.autoencoder = plain(whole)
    config.decoder.autoencoder = plain(whole)
    _, params = started_from(config)
    made = pruned(PrunedDecoderConfig(autoencoder=whole), load_network(SD15 / "vae")["autoencoder"])
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], made)


def test_what_no_run_starts_from_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"its config.json does not name; a run starts from an earlier run"):
        load_network(SD15 / "text_encoder")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ConfigError, match="holds no safetensors file"):
        load_network(tmp_path)


def test_rewards_tune_the_published_text_encoder_which_speaks_without_a_caption_too():
    config: Any = read_one("configs/reward/sd15.py:runlocal")
    network = read_config_file(SD15 / "unet" / "config.json", sd_unet.read_config)
    text = read_config_file(SD15 / "text_encoder" / "config.json", clip.read_config)
    config.init_from, config.prediction = str(SD15 / "unet"), "eps"
    config.network = plain(network)
    config.inputs.stand_ins = False
    config.inputs.clip_l = {**plain(text), "projection": None, "output": "last"}
    config.inputs.clip_l_folder, config.inputs.clip_l_tokenizer = str(SD15 / "text_encoder"), str(SD15 / "tokenizer")
    whole = read_config_file(SD15 / "vae" / "config.json", sd3_autoencoder.read_config)
    config.inputs.codec = {"kind": "autoencoder", "autoencoder": plain(whole), "workdir": str(SD15 / "vae")}
    for reward in (config.rewards.drawn, config.constraint):
        reward.network.text.update({"vocab_size": text.vocab_size, "max_tokens": text.max_tokens})
    recipe, params = started_from(config)
    assert set(params) == {"clip_l"}
    frozen = recipe.load_frozen(None)
    jax.tree.map(np.testing.assert_array_equal, params["clip_l"], frozen["original/clip_l"])
    (empty,) = PretrainedTokenizer.load(SD15 / "tokenizer").encode([""], text.max_tokens)[0]
    inputs, networks = recipe.inputs, recipe.weights({"model": params}, frozen)
    null, told = inputs.null_condition(networks), inputs.text.encode(networks, {"clip_l": empty[None]})["clip_l"]
    jax.tree.map(np.testing.assert_array_equal, null, told)
    assert np.ptp(null.sequence) > 0.1
