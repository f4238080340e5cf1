"""Reward tuning refuses what does not fit, before a weight is read."""

import dataclasses
import json

import pytest

from snapgen_jax.evaluation.interfaces import EvaluationConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.detection import DetectionConfig
from snapgen_jax.networks.rewards import RewardConfig
from snapgen_jax.recipes._encoder_mix import shares_of
from snapgen_jax.recipes._reward_config import RewardSamplingConfig
from snapgen_jax.recipes._rewards import Rewards, RewardSourceConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.typed import plain
from tests.recipes.test_reward_tuning import REWARD, tuning


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backprop_steps": 5}, "backprop_steps=5 of sampling.steps=4"),
        ({"backprop_steps": 0}, "backprop_steps is 0; give 1 or more"),
        ({"stop_input_gradient": True, "form": "direct"}, "form='direct' samples none; leave it out"),
        ({"leave_out": ("beauty",)}, "there is no reward 'beauty'; there are taste, constraint"),
        ({"leave_out": ("taste", "constraint")}, "there is no reward; name one"),
        ({"rewards": {"constraint": REWARD}}, "is the name of the field `constraint`"),
        ({"tuned_text": "runs/text"}, "beside trains='text'; go on with its encoder by init_from"),
        ({"encoder": "clip_l"}, "encoder='clip_l'; the inputs bring text"),
        ({"others": {"tuned": "runs/text"}}, "'tuned' has its meaning already"),
        ({"evaluation": EvaluationConfig()}, "evaluation names validation_loss, which reads images"),
        (
            {
                "rewards": {
                    "far": RewardSourceConfig(
                        network=RewardConfig.preset("smoke", text=ClipTextConfig.preset("smoke", max_tokens=4))
                    )
                }
            },
            "the reward 'far' reads 4 tokens of 32 ids, and 'tokens' of the inputs are 6 of 32",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tuning(**changes)


def test_a_reward_that_reads_demands_takes_no_tokens():
    for changes in ({"tokens": "tokens"}, {"tokenizer": "folder"}):
        with pytest.raises(ValueError, match="a reward of the kind 'detection' reads what a caption demands"):
            RewardSourceConfig(network=DetectionConfig.preset("smoke"), stand_in=True, **changes)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("original:0.5,tuned:0.4", "the shares sum to 0.9; let them sum to 1"),
        ("tuned", "give the share of the tuned encoder, such as 0.5"),
        ("tuned:1,tuned:0", "names an encoder twice"),
        (1.5, "1.5 is no share; give numbers from 0 to 1"),
    ],
)
def test_shares_that_are_none_are_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        RewardSamplingConfig(encoder_mix=mix)


def test_shares_are_read_off_a_number_or_names():
    assert shares_of(1.0) == {"tuned": 1.0} and shares_of(0.25) == {"tuned": 0.25, "original": 0.75}
    assert shares_of("original:0.1, pick:0.9") == {"original": 0.1, "pick": 0.9}


def test_more_tuned_steps_than_steps_are_refused():
    with pytest.raises(ValueError, match="tuned_steps=15 of steps=10; give as many at most"):
        RewardSamplingConfig(steps=10, tuned_steps=15)


def test_to_do_without_the_constraint_is_said(caplog):
    tuning(leave_out=("constraint",))
    assert "the constraint is left out" in caplog.text


def test_a_reward_of_another_network_than_its_runs_is_refused_though_the_shapes_are_the_same(tmp_path):
    trained, asked = (DetectionConfig.preset("smoke", image_size=size) for size in (8, 16))
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "detection", "network": plain(trained)}))
    source = RewardSourceConfig(network=asked, workdir=str(tmp_path))
    says = "rewards.eye.workdir: the run was trained with network.image_size=8, and the config says 16; set it to the"
    with pytest.raises(ConfigError, match=says):
        Rewards({"eye": source}, {}, "cpu").load(None, {"eye_tokens": TokenizerSpec("demands", 10, 9)})


def test_a_run_of_another_recipe_is_no_reward(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "flow_matching"}))
    source = RewardSourceConfig(network=DetectionConfig.preset("smoke"), workdir=str(tmp_path))
    with pytest.raises(ConfigError, match="a run of 'flow_matching', and a network of the kind 'detection' is that"):
        Rewards({"constraint": source}, {}, "cpu").load(None, {"constraint_tokens": TokenizerSpec("demands", 10, 9)})


def test_a_published_reward_beside_ids_of_a_trained_tokenizer_needs_its_own():
    network = RewardConfig.preset("smoke")
    spec = TokenizerSpec("trained", network.text.max_tokens, network.text.vocab_size)
    source = RewardSourceConfig(network=network, published="clip_l", folder="clip")
    with pytest.raises(ConfigError, match="'tokens' of the inputs are ids of a trained one; set its `tokenizer` to"):
        Rewards({"taste": source}, {"tokens": spec}, "cpu")
    own = dataclasses.replace(source, tokenizer="clip/tokenizer")
    assert Rewards({"taste": own}, {"tokens": spec}, "cpu").arrays() == ("taste_tokens",)
    published = dataclasses.replace(spec, kind="pretrained", folder="other")
    assert Rewards({"taste": source}, {"tokens": published}, "cpu").arrays() == ("tokens",)
    sees = dataclasses.replace(source, network=RewardConfig.preset("aesthetic"), published="aesthetic")
    assert Rewards({"taste": sees}, {"tokens": spec}, "cpu").arrays() == ("tokens",)  # it reads no text


def test_a_run_with_a_tokenizer_of_its_own_reads_no_ids_of_a_published_one(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    network = RewardConfig.preset("smoke")
    spec = TokenizerSpec("pretrained", network.text.max_tokens, network.text.vocab_size, folder="clip")
    source = RewardSourceConfig(network=network, workdir=str(tmp_path))
    trained = dataclasses.replace(spec, kind="trained", folder="")
    says = "would read those of the published tokenizer 'clip'; leave its `tokenizer` out"
    for inputs, one in ((spec, source), (trained, dataclasses.replace(source, tokenizer="clip"))):
        rewards = Rewards({"taste": one}, {"tokens": inputs}, "cpu")
        with pytest.raises(ConfigError, match=says):
            rewards.load(None, {"tokens": inputs, **rewards.tokenizers()})
