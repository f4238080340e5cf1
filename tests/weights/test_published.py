"""The `config.json` of published weights: null is the default, and what is wrong with the file is one error."""

import json
import pathlib

import pytest

from snapgen_jax.coding import codec_of_weights
from snapgen_jax.networks.codec import CodecConfig, build_codec
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.frozen import load_codec
from snapgen_jax.weights.maps import clip, gemma2, sd3_autoencoder, sd3_mmdit, t5
from snapgen_jax.weights.published import read_config_file

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
AUTOENCODER = json.loads((GOLDENS / "autoencoder" / "config.json").read_text())
KINDS = {"autoencoder": sd3_autoencoder, "mmdit_large": sd3_mmdit, "clip_l": clip, "t5": t5, "gemma2": gemma2}


def test_an_autoencoder_without_a_shift_has_none():
    """Stable Diffusion 1.5's file leaves `shift_factor` out, and others write null."""
    left_out = {key: value for key, value in AUTOENCODER.items() if key != "shift_factor"}
    for values in (left_out, {**AUTOENCODER, "shift_factor": None}):
        config = sd3_autoencoder.read_config(values)
        assert config.shift == 0 and config.scale == AUTOENCODER["scaling_factor"]
    assert sd3_autoencoder.read_config({**AUTOENCODER, "scaling_factor": None}).scale == 0.18215


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_is_null_is_one_that_is_left_out(kind):
    values = json.loads((GOLDENS / kind / "config.json").read_text())

    def outcome(changed):
        try:
            return KINDS[kind].read_config(changed)
        except KeyError as error:
            return error.args
        except ValueError as error:
            return str(error)

    for key in values:
        left_out = {other: value for other, value in values.items() if other != key}
        assert outcome({**values, key: None}) == outcome(left_out), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.0] * 4}, r"latents_mean = \[0.0, 0.0, 0.0, 0.0\]; Autoencoder can only read None"),
        ({"latents_std": [1.0] * 4}, "latents_std = .*; Autoencoder can only read None"),
        ({"use_quant_conv": True}, "use_post_quant_conv = False; Autoencoder can only read True"),
        ({"block_out_channels": None}, "lacks 'block_out_channels'; is it that of the right network?"),
        ({"block_out_channels": 7}, "'int' object is not iterable"),
    ],
)
def test_another_kind_of_autoencoder_is_refused_by_what_differs(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**AUTOENCODER, **changes}))
    with pytest.raises(WeightsError, match=message):
        read_config_file(tmp_path / "config.json", sd3_autoencoder.read_config)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON: .*; fetch it again"), ("[]", "holds no JSON object"), (None, "is not there")],
)
def test_a_file_that_is_damaged_or_missing_is_named(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.json {message}"):
        codec_of_weights(tmp_path)


def test_a_run_that_names_a_folder_with_a_damaged_file_is_told_so(tmp_path):
    (tmp_path / "config.json").write_text("{")
    config = CodecConfig("autoencoder", workdir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.json is no JSON"):
        load_codec(config, build_codec(config))
