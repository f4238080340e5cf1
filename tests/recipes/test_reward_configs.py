"""The full-size configs of reward tuning: the paper's numbers, and that an update of the small forms fits its parts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from snapgen_jax.chain import load_chain
from snapgen_jax.chain_run import _Chain, run_chain
from snapgen_jax.conditions import prompt_arrays
from snapgen_jax.config import load_experiment
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizers, StandInTokenizer
from snapgen_jax.data.shapes_demands import DemandTokenizer
from snapgen_jax.networks.module import build
from snapgen_jax.training.exits import ConfigError
from tests.recipes_for_tests import random_like

SD15, SNAPGEN = "configs/reward/sd15.py", "configs/reward/t2i_1024_4step.py"


@functools.cache
def recipe(spec, *overrides) -> Any:
    return load_experiment(spec, overrides).build("cpu")


def test_rewards_and_sampler_of_stable_diffusion_are_those_of_the_authors_script():
    config = recipe(SD15).config
    weights = {name: source.weight for name, source in config.used().items()}
    assert weights == {"aesthetic": 3, "pickscore": 1, "hpsv2": 100, "constraint": 50}
    sampling, optimizer = config.sampling, config.optimizer
    assert (sampling.steps, sampling.guidance, sampling.tuned_steps, config.backprop_steps) == (25, 7.5, 15, 5)
    assert (optimizer.learning_rate, config.batch_size, config.train_steps) == (1e-6, 256, 10_000)
    assert config.constraint.network.vision.layers == 40 and config.constraint.published == "clip_little_g"


def test_after_the_text_encoder_the_network_learns_and_the_encoder_stays():
    made = recipe(f"{SD15}:network")
    assert made.trains == {"model": ("sd_unet",)}
    assert {"clip_l", "original/clip_l", "original/sd_unet"} < set(made.frozen_spec()) and made.config.tuned_text


def test_snapgen_tunes_clip_l_through_all_four_steps():
    made = recipe(SNAPGEN)
    assert made.trains == {"model": ("clip_l",)} and made.config.backprop_steps == made.config.sampling.steps == 4
    assert made.config.sampling.guidance == 1 and made.config.sampling.last_steps == 4
    adapted = recipe(f"{SNAPGEN}:adapters")
    assert adapted.trains == {"model": ("adapters",)} and adapted.tuned == ("unet",)


def test_an_update_fits_its_parts():
    """Shapes of a whole update in two microbatches, through sampler, decoder and rewards, without a byte of them."""
    made = recipe(f"{SNAPGEN}:runlocal", "microbatches=2")
    (batch,) = made.batch_specs().values()
    state = jax.eval_shape(made.init, jax.random.key(0))
    after, metrics = jax.eval_shape(made.update, state, made.frozen_spec(), batch, jax.random.key(0))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert {"reward", "reward/drawn", "reward/constraint", "grad_norm"} <= set(metrics)


def test_gradients_reach_an_encoder_that_runs_with_the_inputs():
    inputs = recipe(f"{SD15}:runlocal").inputs
    tokens = {"clip_l": jnp.arange(14, dtype=jnp.int32).reshape(2, 7)}

    def total(text):
        networks = {"clip_l": text}
        told = inputs.draw_condition(networks, tokens, jax.random.key(0), {})
        return jnp.sum(inputs.condition(networks, told).sequence ** 2)

    grads = jax.jit(jax.grad(total))(random_like(build(inputs.networks()["clip_l"].config)[1]))
    assert jnp.abs(grads["layers"]["block_00"]["attention"]["query"]["kernel"]).max() > 0


def test_the_chain_of_the_shapes_world_fills_in_what_its_stages_made():
    chain, _ = load_chain("configs/shapes/reward_chain.py:runlocal")
    assert [stage.name for stage in chain.stages] == ["base", "detection", "clip", "text", "network"]
    for stage in chain.stages[-2:]:
        made = recipe(stage.config, *(f"{key}={value}" for key, value in stage.earlier.items()))
        sources = {name: source.workdir for name, source in made.config.used().items()}
        assert sources == {"detection": "detection", "constraint": "clip"} and made.config.init_from == "base"
        assert made.trains == {"model": ("text",) if stage.name == "text" else ("unet",)}


def test_a_finished_run_is_improved_by_one_command_and_one_that_is_not_there_is_refused_at_once(tmp_path):
    base = tmp_path / "base"
    overrides = [f"clip.data.tokenizer={base}", f"text.init_from={base}"]
    chain, said = load_chain("configs/shapes/reward_chain.py:improve", overrides)
    assert [stage.name for stage in chain.stages] == ["detection", "clip", "text"]
    with pytest.raises(ConfigError, match=r"the stage 'text' starts from .*base', which is not there; name a run"):
        run_chain(chain, said, tmp_path / "chain")
    assert not (tmp_path / "chain").exists()
    base.mkdir()
    filled = _Chain(chain, said, tmp_path / "chain")
    filled.check_starts()
    text = filled.configs["text"]
    assert text.experiment.init_from == str(base) and filled.configs["clip"].config.data.tokenizer == str(base)
    assert text.recipe.rewards["detection"].workdir == str(tmp_path / "chain" / "detection")


def test_the_shapes_world_is_rewarded_by_what_captions_demand():
    text = load_chain("configs/shapes/reward_chain.py")[0].stages[3]
    made = recipe(text.config, *(f"{key}={value}" for key, value in text.earlier.items()))
    (batch,) = made.batch_specs().values()
    assert batch["detection_tokens"].shape == (16, 10) and made.tokenizers()["detection_tokens"].kind == "demands"
    state = jax.eval_shape(made.init, jax.random.key(0))
    _, metrics = jax.eval_shape(made.update, state, made.frozen_spec(), batch, jax.random.key(0))
    assert {"reward/detection", "reward/constraint"} <= set(metrics)


def test_a_wish_is_compared_with_every_image_of_the_shapes_world():
    made = recipe("configs/shapes/reward.py:runlocal", "rewards.detection.text='a red circle'")
    spec = made.tokenizers()["detection_tokens"]
    assert (spec.kind, spec.text) == ("demands", "a red circle")


def test_a_model_that_demands_rewarded_draws_any_prompt():
    made = recipe("configs/shapes/reward.py")
    tokenizer = PretrainedTokenizers({"tokens": StandInTokenizer(512), "detection_tokens": DemandTokenizer()})
    assert set(prompt_arrays(made, tokenizer, ["a moon"], made.conditions())) == {"tokens", "mask"}
    with pytest.raises(DataError, match="'a moon' is no caption"):
        prompt_arrays(made, tokenizer, ["a moon"])


def test_captions_of_the_whole_world_have_demands_and_the_detector_is_that_of_its_config():
    for spec in ("configs/shapes/reward.py", "configs/shapes/detection.py"):
        assert load_experiment(spec).config.data.shapes.dense_share == 0
    network = load_experiment("configs/shapes/detection.py").build("cpu").network
    assert recipe("configs/shapes/reward.py").rewards.networks()["reward/detection"].config == network.config
