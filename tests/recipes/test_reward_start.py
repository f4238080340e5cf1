"""What a run of reward tuning begins with: an earlier run of the recipe is gone on with, or refused."""

import json

import pytest

from snapgen_jax.networks.lora import LoraConfig
from snapgen_jax.training.exits import ConfigError
from tests.recipes.test_reward_tuning import tuning

LORA = LoraConfig(2, 4.0, ("attention/",))


def earlier(workdir, **config):
    """The workdir of an earlier run of the recipe."""
    (workdir / "config.json").write_text(json.dumps({"recipe": "reward_tuning", "init_from": "runs/base", **config}))
    return workdir


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("text", "network_adapters", "a tuned text encoder, 'text' .* set tuned_text to it and init_from to the base"),
        ("text_adapters", "network", "a tuned text encoder, 'text' .* set tuned_text to it and init_from to the base"),
        ("text_adapters", "text", "set trains='text_adapters' and encoder='text' to go on with it, or set init_from"),
        ("text", "text_adapters", "set trains='text' and encoder='text' to go on with it, or set init_from to the ba"),
        ("network", "network_adapters", "a tuned network .* set trains='network' to go on with it"),
        ("network_adapters", "text", "a tuned network .* set trains='network_adapters' to go on with it"),
    ],
)
def test_a_run_that_tuned_something_else_is_no_start(tmp_path, was, now, message):
    recipe = tuning(earlier(tmp_path, trains=was), trains=now, lora=LORA)
    with pytest.raises(ConfigError, match=message):
        recipe.warm_start(None, {})


def test_a_run_that_tuned_another_encoder_is_no_start(tmp_path):
    recipe = tuning(earlier(tmp_path, encoder="clip_g"))
    with pytest.raises(ConfigError, match="set trains='text' and encoder='clip_g' to go on with it"):
        recipe.warm_start(None, {})


@pytest.mark.parametrize("trains", ["text", "network", "text_adapters", "network_adapters"])
def test_a_run_that_tuned_the_same_is_gone_on_with_and_any_base_is_a_start(tmp_path, trains):
    tuning(earlier(tmp_path, trains=trains), trains=trains, lora=LORA)._check_start()
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "flow_matching"}))
    tuning(tmp_path, trains=trains, lora=LORA)._check_start()
    tuning("runs/moved", trains=trains, lora=LORA)._check_start()
