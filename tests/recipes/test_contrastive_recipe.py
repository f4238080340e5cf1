"""Contrastive learning as a recipe: it tells captions apart, and hands its text encoder to a later stage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import inference_weights, train
from snapgen_jax.evaluation import clip_score
from snapgen_jax.generation import Generator
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.contrastive import Contrastive, ContrastiveConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training import loop
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import ONE_STAGE, ByPosition

TEXT = ClipTextConfig.preset("smoke", max_tokens=6)
CONFIG = ContrastiveConfig(
    batch_size=8,
    train_steps=100,
    image=ClipVisionConfig.preset("smoke", image_size=8, patch=4),
    inputs=CaptionsConfig(image_sizes=((8, 8),), text=TEXT, codec=CodecConfig("identity"), caption_dropout=0.0),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    ema_decay=0.0,
)


def batch(seed):
    """Eight greys, each with the grey as the caption."""
    grey = np.random.default_rng(seed).permutation(8)
    tokens = np.zeros((8, 6), np.int32)
    tokens[:, :3] = np.stack([np.full(8, 1), 3 + grey, np.full(8, 2)], axis=1)
    image = np.broadcast_to((grey * 36).astype(np.uint8)[:, None, None, None], (8, 8, 8, 3))
    return {"image": np.ascontiguousarray(image), "tokens": tokens, "mask": (tokens > 0).astype(np.float32)}


def test_it_learns_which_caption_belongs_to_which_image_and_scores_by_it(monkeypatch):
    made = Contrastive(CONFIG, "cpu")
    assert isinstance(made, Recipe)
    state = train(made, (batch(n) for n in range(1000)), steps=100, quiet=True)
    weights = inference_weights(state)
    losses = jax.jit(made.validation_losses)(weights, {}, batch(99), jax.random.key(0))
    assert losses["accuracy"].mean() == 1.0 and losses["mean"].mean() < 0.5 * np.log(8)
    found = made.generate(weights, {}, batch(99), jax.random.split(jax.random.key(0), 8), made.options)
    np.testing.assert_allclose(jnp.linalg.norm(found["text"], axis=-1), 1.0, rtol=1e-5)
    similar = found["image"] @ found["text"].T
    assert (jnp.argmax(similar, axis=1) == jnp.arange(8)).all()

    class Words:
        names = ("tokens", "mask")

        def arrays(self, prompts, lengths):
            order = [int(prompt) for prompt in prompts]
            return {name: batch(99)[name][order] for name in lengths}

    class Draws:
        def generate(self, prompts, seed):
            return batch(99)["image"][[int(prompt) for prompt in prompts]]

    clip = Generator(made, weights, {}, Words())
    monkeypatch.setattr(clip_score, "load", lambda workdir: clip)
    score = clip_score.ClipScore("run", prompts=tuple("01234567"))(Draws()).numbers
    np.testing.assert_allclose(score["clip.score"], np.mean(np.diag(similar)), rtol=1e-4)
    assert score["clip.score"] > score["clip.chance"] + 0.5


def test_a_later_stage_conditions_on_its_text_encoder_which_stays_as_it_was(tmp_path):
    made = Contrastive(CONFIG, "cpu")
    config = LoopConfig(train_steps=2, log_every_steps=1, tensorboard=False)
    state = loop.train(made, ByPosition("8x8", batch), config, workdir=tmp_path, quiet=True)
    later = FlowMatching(
        FlowMatchingConfig(
            batch_size=8,
            network=UNetConfig.preset("smoke", latent_channels=12, **ONE_STAGE),
            inputs=CaptionsConfig(
                image_sizes=((8, 8),), text=TEXT, text_workdir=str(tmp_path), codec=CodecConfig(patch=2)
            ),
        ),
        "cpu",
    )
    frozen = later.load_frozen(None)
    jax.tree.map(np.testing.assert_array_equal, frozen["text"], state.players["model"].params["text"])
    assert jax.tree.map(lambda x: x.shape, frozen) == jax.tree.map(lambda x: x.shape, later.frozen_spec())
    assert later.tokenizers() == {"tokens": TokenizerSpec("trained", 6, TEXT.vocab_size, workdir=str(tmp_path))}
    first = jax.jit(later.init)(key(0, 0, "init"))
    assert set(first.players["model"].params) == {"unet"}
    _, metrics = jax.jit(make_step(later, 0))(first, frozen, batch(0))
    assert bool(metrics["finite"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": dataclasses.replace(CONFIG.image, projection=8)}, "make them equal"),
        ({"microbatches": 2}, "microbatches=2"),
        (
            {"inputs": dataclasses.replace(CONFIG.inputs, image_sizes=((16, 16),))},
            r"set inputs.image_sizes=\(\(8",
        ),
        ({"inputs": dataclasses.replace(CONFIG.inputs, text_workdir="run")}, "inputs.text_workdir .* leave it empty"),
    ],
)
def test_what_cannot_be_compared_and_parts_of_batches_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Contrastive(dataclasses.replace(CONFIG, **changes), "cpu")


def test_it_makes_no_latents_and_is_not_exported():
    made = Contrastive(CONFIG, "cpu")
    with pytest.raises(ConfigError, match="makes no latents"):
        made.codec({}, {})
    with pytest.raises(ConfigError, match="draws nothing"):
        made.exports()
