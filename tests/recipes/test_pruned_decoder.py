"""A decoder with half of its channels learns from the whole one, on latents that a generator draws."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.inputs._export import decoder_unit
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import count_parameters, flatten
from snapgen_jax.networks.pruned import PrunedDecoderConfig, pruned
from snapgen_jax.recipes._reconstruction import ReconstructionLoss
from snapgen_jax.recipes.decoder_distillation import DecoderDistillation, DecoderDistillationConfig
from snapgen_jax.recipes.flow_matching import FlowMatchingConfig, SamplingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.step import make_step
from tests.networks.tiny import drawn
from tests.recipes_for_tests import GREY_TOKENS, greys

WHOLE = AutoencoderConfig(
    channels=(8, 8), layers=0, latent_channels=4, groups=4, normalisation="measured", tile=64, tile_overlap=8
)
HALF = PrunedDecoderConfig(autoencoder=WHOLE)
CODEC = CodecConfig("autoencoder", autoencoder=WHOLE)
GENERATOR = FlowMatchingConfig(
    batch_size=4,
    network=MMDiTConfig.preset("smoke", latent_channels=4, depth=2, dual=0),
    inputs=CaptionsConfig(
        image_sizes=((16, 16),), text=ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS, layers=1), codec=CODEC
    ),
    sampling=SamplingConfig(steps=2, guidance=2.0),
)
CONFIG = DecoderDistillationConfig(
    batch_size=4,
    train_steps=120,
    inputs=ImagesConfig(image_sizes=((16, 16),), codec=CODEC),
    decoder=HALF,
    target="large",
    generator=GENERATOR,
    generator_workdir="a run",
    generated_share=1.0,
    loss=ReconstructionLoss(l2=1.0, perceptual=0.0, adversarial=0.0),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1),
    ema_decay=0.0,
)
BATCH = greys(0, 4, side=16)


@pytest.fixture(scope="module")
def recipe():
    return DecoderDistillation(CONFIG, "cpu")


@pytest.fixture(scope="module")
def frozen(recipe):
    networks = recipe.networks()
    held = {role: drawn(networks[role], i) for i, role in enumerate(recipe.frozen_spec())}
    held["codec"]["statistics"] = {"bias": 0.1 * np.arange(4, dtype=np.float32), "scale": np.full(4, 1.5, np.float32)}
    return held


@pytest.fixture(scope="module")
def started(recipe, frozen):
    """As with `init_from`, a run of the recipe "autoencoder"."""
    return recipe.warm_start(recipe.init(key(0, 0, "init")), {"model": {"autoencoder": frozen["codec"]}})


def test_it_starts_from_the_largest_channels_of_the_autoencoder(recipe, frozen, started):
    made, expected = (
        flatten(started.players["model"].params["decoder"]),
        flatten(pruned(HALF, frozen["codec"])),
    )
    assert made.keys() == expected.keys()
    for path, leaf in made.items():
        np.testing.assert_array_equal(leaf, expected[path])
    again = recipe.warm_start(recipe.init(key(1, 0, "init")), {"model": started.players["model"].params})
    jax.tree.map(np.testing.assert_array_equal, again.players["model"].params, started.players["model"].params)


def test_it_comes_near_to_the_whole_decoder_on_drawn_latents(recipe, frozen, started):
    """Latents of validation are drawn from other noise than those of training."""
    draw = jax.jit(recipe.draw)
    held_out = draw(frozen, BATCH, jax.random.key(99))
    assert held_out["latent"].shape == (4, 8, 8, 4)
    other = draw(frozen, BATCH, jax.random.key(98))
    assert not np.allclose(held_out["latent"], other["latent"], atol=0.1), "of one prompt other noise draws another"

    @jax.jit
    def psnr(params):
        made = recipe.make({**frozen, **params}, held_out)[0]
        return 10 * np.log10(4) - 10 * jnp.log10(jnp.mean((made - held_out["image"]) ** 2))

    step, state = jax.jit(make_step(recipe, 0)), started
    found = [float(psnr(state.players["model"].params))]
    for _ in range(3):
        for _ in range(CONFIG.train_steps // 3):
            state, _ = step(state, frozen, BATCH)
        found.append(float(psnr(state.players["model"].params)))
    assert found == sorted(found) and found[-1] > found[0] + 6, found
    before, after = (s.players["model"].params["decoder"]["statistics"] for s in (started, state))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_an_export_decodes_as_the_pruned_decoder(recipe, frozen, started):
    codec = dataclasses.replace(CODEC, decoder="tiny", tiny_decoder=HALF)
    unit = decoder_unit(codec, (8, 8, 4))
    latent = np.asarray(jax.random.normal(jax.random.key(0), (1, 8, 8, 4)))
    params = started.players["model"].params
    made = jax.jit(unit.function)({"codec/decoder": params["decoder"]}, latent=latent)["image"]
    expected = jax.jit(recipe.make)({**frozen, **params}, {"latent": latent})[0]
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_a_pruned_decoder_of_another_autoencoder_is_refused(recipe, frozen):
    other = dataclasses.replace(WHOLE, layers=1)
    with pytest.raises(ConfigError, match=r"decoder.autoencoder differs from inputs.codec.autoencoder"):
        DecoderDistillation(dataclasses.replace(CONFIG, decoder=PrunedDecoderConfig(autoencoder=other)), "cpu")
    wrong = {**frozen["codec"], "encoder": {}}
    with pytest.raises(ConfigError, match=r"init_from holds another network than the config describes"):
        recipe.warm_start(recipe.init(key(0, 0, "init")), {"model": {"autoencoder": wrong}})


@pytest.mark.parametrize(
    "file", ["shapes/pruned_decoder.py", "shapes/pruned_decoder.py:quick", "snapfusion/decoder.py"]
)
def test_the_configs_keep_a_quarter_of_the_parameters_and_draw_all_latents(file):
    config = load_experiment(f"configs/{file}")
    made: Any = config.start("cpu")
    assert made.generated == config.recipe.batch_size
    assert made.generator.config.inputs.codec == config.recipe.inputs.codec
    student = jax.eval_shape(made.init, key(0, 0, "init")).players["model"].params
    whole = made.frozen_spec()["codec"]["decoder"]
    assert count_parameters(student) / count_parameters(whole) == pytest.approx(0.25, abs=0.005)
