"""Autoencoders from nothing: every term teaches by itself, players keep to their turns, resuming changes no bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.codec import from_uint8
from snapgen_jax.networks.lpips import LPIPSConfig
from snapgen_jax.networks.module import apply, flatten
from snapgen_jax.networks.patch_discriminator import PatchDiscriminatorConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes._reconstruction import ReconstructionLoss
from snapgen_jax.recipes.autoencoder import AutoencoderTraining, AutoencoderTrainingConfig
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import CheckpointConfig
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.optimizer import OptimizerConfig, step_player
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import ByPosition

ADAM = OptimizerConfig(learning_rate=3e-3, warmup_steps=0)
CONFIG = AutoencoderTrainingConfig(
    batch_size=8,
    train_steps=30,
    inputs=ImagesConfig(image_sizes=((8, 8),)),
    autoencoder=AutoencoderConfig.preset("smoke", normalisation="measured"),
    perceptual=LPIPSConfig.preset("smoke"),
    discriminator=PatchDiscriminatorConfig.preset("smoke"),
    optimizer=ADAM,
    discriminator_optimizer=ADAM,
    ema_decay=0.9,
)
OFF = ReconstructionLoss(l1=0.0, l2=0.0, perceptual=0.0, adversarial=0.0)


def recipe(loss=None, **changes):
    return AutoencoderTraining(dataclasses.replace(CONFIG, **({"loss": loss} if loss else {}), **changes), "cpu")


def batch(position, size=8):
    """Pictures of two colours each, split somewhere."""
    rng = np.random.default_rng(position)
    images = np.empty((size, 8, 8, 3), np.uint8)
    for image in images:
        where = rng.integers(2, 7)
        image[:where], image[where:] = rng.integers(0, 256, (2, 3))
    return {"image": images}


@functools.cache
def started(made):
    return jax.jit(made.init)(key(0, 0, "init"))


def test_it_fulfils_the_protocol():
    made = recipe()
    assert isinstance(made, Recipe)
    roles = made.weights({name: p.params for name, p in started(made).players.items()}, made.load_frozen(None))
    assert roles.keys() == made.networks().keys() == {"autoencoder", "discriminator", "perceptual"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve updates without a break, the discriminator from the sixth on; with the state after each."""
    made = recipe(ReconstructionLoss(l1=1.0, l2=0.0, adversarial=0.5, adversarial_from_steps=6))
    step, frozen, state, history = jax.jit(make_step(made, 0)), made.load_frozen(None), started(made), []
    for position in range(12):
        state, metrics = step(state, frozen, batch(position))
        history.append((state, jax.device_get(metrics)))
    return made, history


def test_the_discriminator_neither_learns_nor_judges_before_its_time(run):
    made, history = run
    first = started(made).players["discriminator"]
    for n, (state, metrics) in enumerate(history):
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), state.players["discriminator"], first)
        if n < 6:
            assert all(jax.tree.leaves(same)), "its optimizer too is as fresh as at the start"
        else:
            assert not jax.tree.all(same.params)
        assert (metrics["adaptive_weight"] == 0) == (n < 6)
        assert bool(metrics["finite"])


def test_the_statistics_follow_the_latents_and_nothing_else_moves_them(run):
    made, history = run
    last = history[-1][0].players["model"].params["autoencoder"]["statistics"]
    states = [started(made), *(state for state, _ in history)]
    encode = jax.jit(lambda params, images: apply(made.autoencoder, params, from_uint8(images), method="moments")[0])
    seen = [encode(states[n].players["model"].params["autoencoder"], batch(n)["image"]) for n in range(12)]
    seen = np.asarray(seen).reshape(-1, 4)
    np.testing.assert_allclose(last["bias"], seen.mean(axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(last["scale"], seen.std(axis=0), rtol=1e-3)


def test_each_term_teaches_by_itself():
    alone = {
        **{name: recipe(dataclasses.replace(OFF, **{name: 1.0}), kl_weight=0.0) for name in ("l1", "l2", "perceptual")},
        "kl": recipe(OFF, kl_weight=1.0),
    }
    judged = recipe(dataclasses.replace(OFF, adversarial=1.0))
    params = started(judged).players

    @jax.jit
    def gradients(model, discriminator, frozen, drawn):
        def task(name):
            def total(model):
                networks = {**frozen, **model}
                image, own, _ = alone[name].make(networks, drawn)
                value, terms = alone[name].task(networks, drawn, image, own)
                assert terms.keys() == {name}
                return value

            return jax.grad(total)(model)

        found = {name: task(name) for name in alone}

        def logits(model):
            networks = {"discriminator": discriminator, **model}
            return judged.judge(networks, judged.make(networks, drawn)[0]).mean()

        return {
            name: {part: optax.global_norm(grads["autoencoder"][part]) for part in ("encoder", "decoder")}
            for name, grads in {**found, "adversarial": jax.grad(logits)(model)}.items()
        }

    frozen = alone["perceptual"].load_frozen(None)
    drawn = judged.draw(frozen, batch(0), jax.random.key(1))
    found = gradients(params["model"].params, params["discriminator"].params, frozen, drawn)
    for name, norms in found.items():
        assert norms["encoder"] > 1e-8
        assert norms["decoder"] > 1e-8 or name == "kl", "the divergence is the encoder's alone"


def test_the_divergence_is_to_the_differences_what_it_is_in_sums_over_an_image():
    """Rombach et al. add |x - D(z)| summed over an image and 1e-6 of the divergence summed over its latent."""
    made = recipe(dataclasses.replace(OFF, l1=1.0), kl_weight=1e-6)
    networks = {**made.load_frozen(None), **started(made).players["model"].params}
    drawn = jax.jit(made.draw)({}, batch(0), jax.random.key(1))
    image, own, _ = jax.jit(made.make)(networks, drawn)
    total, _ = made.task(networks, drawn, image, own)
    _, mean, logvar = apply(made.autoencoder, networks["autoencoder"], drawn["image"], drawn["eps"])
    divergence = jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar) / 2
    in_sums = (jnp.sum(jnp.abs(image - drawn["image"])) + 1e-6 * divergence) / len(image)
    np.testing.assert_allclose(total * image[0].size, in_sums, rtol=1e-5)


@functools.cache
def pixels_alone():
    """A recipe of the absolute difference alone, and its compiled update."""
    made = recipe(dataclasses.replace(OFF, l1=1.0), kl_weight=0.0)
    return made, jax.jit(made.update)


def test_with_weight_zero_a_term_is_not_there():
    """The update is, bit for bit, one of the absolute difference alone, written out."""
    made, update = pixels_alone()
    assert started(made).players.keys() == {"model"} and made.frozen_spec() == {}

    def by_hand(state, images, key):
        drawn = made.draw({}, {"image": images}, key)

        def loss(params):
            return jnp.mean(jnp.abs(made.make(params, drawn)[0] - from_uint8(images)))

        player = state.players["model"]
        grads = jax.grad(loss)(player.params)
        norm = optax.global_norm(grads)
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, ADAM.clip_norm / jnp.maximum(norm, 1e-12)), grads)
        return step_player(player, grads, made.optimizers["model"], state.step, ema_decay=0.9)[0].params

    given = update(started(made), {}, batch(0), jax.random.key(1))[0].players["model"].params
    expected = jax.jit(by_hand)(started(made), batch(0)["image"], jax.random.key(1))
    for part in ("encoder", "decoder"):
        for path, leaf in flatten(expected["autoencoder"][part]).items():
            np.testing.assert_array_equal(flatten(given["autoencoder"][part])[path], leaf)


def test_the_adaptive_weight_makes_the_gradients_at_the_last_layer_equally_long():
    made = recipe()
    frozen, state = made.load_frozen(None), started(made)
    model, other = (state.players[name].params for name in ("model", "discriminator"))
    drawn = made.draw(frozen, batch(0), jax.random.key(1))

    def last(objective):
        def of_params(params):
            return objective(made.weights({"model": params, "discriminator": other}, frozen))

        return optax.global_norm(jax.grad(of_params)(model)["autoencoder"]["decoder"]["conv_out"]["kernel"])

    def task(networks):
        image, own, _ = made.make(networks, drawn)
        return made.task(networks, drawn, image, own)[0]

    @jax.jit
    def both():
        return last(task) / last(lambda networks: -jnp.mean(made.judge(networks, made.make(networks, drawn)[0])))

    expected = both()
    networks = made.weights({"model": model, "discriminator": other}, frozen)
    given = jax.jit(made.balance)(networks, drawn)
    assert float(given) == pytest.approx(float(expected), rel=0.02)  # but for the floor under the denominator


def test_it_learns_to_make_images_again():
    made, update = pixels_alone()
    state, losses = started(made), []
    for position in range(120):
        state, metrics = update(state, {}, batch(position), jax.random.key(position))
        state = dataclasses.replace(state, step=state.step + 1)
        losses.append(float(metrics["l1"]))
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    draw = jax.jit(made.generate, static_argnums=4)
    keys = jax.random.split(jax.random.key(0), 8)
    images = draw({"model": state.players["model"].ema}, {}, batch(99), keys, made.options)
    assert images["image"].shape == (8, 8, 8, 3) and images["image"].dtype == jnp.uint8
    assert images["latent"].shape == (8, 4, 4, 4)


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    made = recipe(ReconstructionLoss(l1=1.0, l2=0.0, adversarial=0.5, adversarial_from_steps=2))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])

    def train(folder, steps):
        saves = CheckpointConfig(every_steps=3)
        config = LoopConfig(train_steps=steps, log_every_steps=1, tensorboard=False, checkpoint=saves)
        return loop.train(made, ByPosition("8x8", batch), config, workdir=tmp_path / folder, mesh=mesh, quiet=True)

    train("broken", 3)
    straight, resumed = train("straight", 6), train("broken", 6)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_later_run_may_start_from_an_earlier_one_without_a_discriminator():
    made = recipe()
    weights = {"model": jax.tree.map(lambda leaf: leaf + 1, started(made).players["model"].params)}
    state = made.warm_start(started(made), weights)
    np.testing.assert_array_equal(
        flatten(state.players["model"].params)[("autoencoder", "encoder", "conv_in", "bias")], 1.0
    )
    assert state.players["discriminator"] is started(made).players["discriminator"]


def test_gradient_accumulation_is_refused():
    with pytest.raises(ValueError, match="microbatches=2: the adaptive weight needs the batch in one part"):
        recipe(microbatches=2)
