"""A tiny decoder learns from a frozen autoencoder: on crops that fit, and without touching what is frozen."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from snapgen_jax.config import build, load_config
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.stored import StoredConfig
from snapgen_jax.inputs.stored_encodings import StoredEncodingsConfig
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig, build_codec, from_uint8
from snapgen_jax.networks.lpips import LPIPSConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.patch_discriminator import PatchDiscriminatorConfig
from snapgen_jax.networks.tiny_decoder import TinyDecoderConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes._reconstruction import ReconstructionLoss
from snapgen_jax.recipes.decoder_distillation import DecoderDistillation, DecoderDistillationConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, SamplingConfig
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import CheckpointConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.networks.tiny import drawn
from tests.recipes_for_tests import GREY_TOKENS, ByPosition, greys, train_and_read

CODEC = CodecConfig("autoencoder", autoencoder=AutoencoderConfig.preset("smoke"))
IMAGES = ImagesConfig(image_sizes=((16, 16),), codec=CODEC)
OFF = ReconstructionLoss(l1=0.0, l2=0.0, perceptual=0.0, adversarial=0.0)
ADAM = OptimizerConfig(learning_rate=3e-3, warmup_steps=0)
CONFIG = DecoderDistillationConfig(
    batch_size=4,
    train_steps=30,
    inputs=IMAGES,
    crop=8,
    decoder=TinyDecoderConfig.preset("smoke", scale=1.0, shift=0.0),
    perceptual=LPIPSConfig.preset("smoke"),
    discriminator=PatchDiscriminatorConfig.preset("smoke"),
    optimizer=ADAM,
    discriminator_optimizer=ADAM,
    ema_decay=0.9,
)


def with_drawn_codec(made):
    """The recipe with an autoencoder whose weights are drawn here, in place of those of a run."""
    made.inputs.load = lambda roles, mesh: {"codec": drawn(made.inputs.networks()["codec"])}
    return made


def recipe(loss=None, **changes):
    changes |= {"loss": loss} if loss else {}
    return with_drawn_codec(DecoderDistillation(dataclasses.replace(CONFIG, **changes), "cpu"))


def batch(position):
    """Ramps of random colours."""
    rng = np.random.default_rng(position)
    ramp = np.linspace(0, 1, 16)[None, :, None, None] * rng.random((4, 1, 1, 3)) * 255
    return {"image": np.broadcast_to(ramp, (4, 16, 16, 3)).astype(np.uint8)}


@functools.cache
def started(made):
    return jax.jit(made.init)(key(0, 0, "init"))


def test_it_fulfils_the_protocol_and_knows_its_frozen_networks_without_a_file():
    made = recipe()
    assert isinstance(made, Recipe)
    spec, held = made.frozen_spec(), made.load_frozen(None)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), spec) == jax.tree.map(lambda x: (x.shape, x.dtype), held)


def test_a_crop_of_the_latent_belongs_to_the_crop_of_the_image():
    """Shown by images that tell the place of each pixel."""
    made = recipe()
    rows, columns = jnp.mgrid[:16, :16]
    images = jnp.broadcast_to((100.0 * rows + columns)[..., None], (64, 16, 16, 3))
    latents = images[:, ::2, ::2, :]
    cut, codes = jax.jit(made._crops)(images, latents, jax.random.key(0))
    assert cut.shape == (64, 8, 8, 3) and codes.shape == (64, 4, 4, 3)
    np.testing.assert_array_equal(cut[:, ::2, ::2], codes)
    places = np.asarray(codes[:, 0, 0, 0])
    assert set(places // 100) == set(places % 100) == {0, 2, 4, 6, 8}  # by the 2 px of a latent's cell


@pytest.mark.parametrize("target", ["image", "large"])
def test_what_is_to_be_made(target):
    made = recipe(target=target, crop=0)
    frozen = made.load_frozen(None)
    images = from_uint8(batch(0)["image"])
    given = jax.jit(made.draw)(frozen, batch(0), jax.random.key(0))
    codec = made.inputs.codec(frozen)
    latents = jax.jit(codec.encode)(images)
    np.testing.assert_allclose(given["latent"], latents, atol=1e-5)
    expected = images if target == "image" else jax.jit(codec.decode)(latents)
    np.testing.assert_allclose(given["image"], expected, atol=1e-4)


GENERATOR = FlowMatchingConfig(
    batch_size=4,
    network=MMDiTConfig.preset("smoke", latent_channels=4, depth=2, dual=0),
    inputs=CaptionsConfig(
        image_sizes=((16, 16),),
        text=ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS, layers=1),
        codec=CODEC,
    ),
    sampling=SamplingConfig(steps=2, guidance=2.0),
)


def captioned(position):
    return greys(position, 4, side=16)


def test_latents_of_a_trained_generator_are_decoded_as_the_large_decoder_does(tmp_path):
    trained = with_drawn_codec(FlowMatching(GENERATOR, "cpu"))
    train_and_read(trained, ByPosition("16x16", captioned), tmp_path, steps=2)
    made = recipe(target="large", crop=0, generator=GENERATOR, generator_workdir=str(tmp_path), generated_share=0.75)
    frozen = made.load_frozen(None)
    assert frozen.keys() == {"codec", "perceptual", "generator/mmdit", "generator/text"}
    assert made.load_frozen(None, "generate").keys() == {"codec", "perceptual"}
    assert {name: spec.workdir for name, spec in made.tokenizers().items()} == {"tokens": str(tmp_path)}
    spec = {name: leaf.shape for name, leaf in flatten(made.frozen_spec()).items()}
    assert spec == {name: leaf.shape for name, leaf in flatten(frozen).items()}
    assert {name: leaf.shape for name, leaf in made.batch_specs()["16x16"].items()} == {
        name: leaf.shape for name, leaf in captioned(0).items()
    }
    draw = jax.jit(made.draw)
    given, other = (draw(frozen, captioned(0), jax.random.key(n)) for n in range(2))
    codec = made.inputs.codec(frozen)
    encoded = jax.jit(codec.encode)(from_uint8(captioned(0)["image"]))
    np.testing.assert_allclose(given["latent"][3:], encoded[3:], atol=1e-5)
    assert not np.allclose(given["latent"][:3], encoded[:3], atol=0.1), "three of four are drawn from the caption"
    assert not np.allclose(given["latent"][:3], other["latent"][:3], atol=0.1), "and from noise of the moment"
    np.testing.assert_allclose(given["image"], jax.jit(codec.decode)(given["latent"]), atol=1e-4)


def test_the_config_for_generated_latents_has_the_networks_of_the_student(tmp_path):
    config = build(DecoderDistillationConfig, load_config("configs/shapes/tiny_decoder.py:generated"))
    student = build(FlowMatchingConfig, load_config("configs/shapes/student.py"))
    made = DecoderDistillation(config, "cpu")
    drawn_by = made.generator.config
    assert (drawn_by.network, drawn_by.inputs) == (student.network, student.inputs)
    assert made.generated == 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": "image"}, "set target='large'"),
        ({"target": "large", "generated_share": 0.1}, "0.1 of a batch of 4 is 0 latents"),
        ({"target": "large", "generator": FlowMatchingConfig()}, "4 latent channels and network.latent_channels is 48"),
        ({"target": "large", "generator": FlowMatchingConfig(inputs=StoredConfig())}, "cannot be 'stored'"),
        ({"target": "large", "generator": FlowMatchingConfig(inputs=StoredEncodingsConfig())}, "cannot be 'stored_enc"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        recipe(generator_workdir="somewhere", **changes)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"schedule": {"kind": "vp"}}, r"has schedule\.kind='vp', and generator\.schedule\.kind is 'flow'; set it"),
        ({"prediction": "v"}, r"has prediction='v', and generator\.prediction is 'velocity'"),
    ],
)
def test_a_generator_that_is_not_what_the_config_says_is_refused(tmp_path, run, says):
    (tmp_path / "config.json").write_text(json.dumps(run))
    made = recipe(target="large", crop=0, generator=GENERATOR, generator_workdir=str(tmp_path))
    with pytest.raises(ConfigError, match=says):
        made.load_frozen(None)


def test_each_term_teaches_by_itself():
    alone = {name: recipe(dataclasses.replace(OFF, **{name: 1.0})) for name in ("l1", "l2", "perceptual")}
    judged = recipe(dataclasses.replace(OFF, adversarial=1.0))
    players, frozen = started(judged).players, recipe().load_frozen(None)

    @jax.jit
    def norms(model, discriminator, frozen, given):
        def total(name, model):
            networks = {**frozen, **model}
            image, own, _ = alone[name].make(networks, given)
            value, terms = alone[name].task(networks, given, image, own)
            assert terms.keys() == {name}
            return value

        def logits(model):
            networks = {**frozen, "discriminator": discriminator, **model}
            return judged.judge(networks, judged.make(networks, given)[0]).mean()

        found = {name: jax.grad(functools.partial(total, name))(model) for name in alone}
        found["adversarial"] = jax.grad(logits)(model)
        return {name: optax.global_norm(grads) for name, grads in found.items()}

    given = judged.draw(frozen, batch(0), jax.random.key(0))
    for name, norm in norms(players["model"].params, players["discriminator"].params, frozen, given).items():
        assert norm > 1e-6, name


def test_it_learns_and_the_frozen_networks_keep_their_bits():
    made = recipe(ReconstructionLoss(perceptual=0.1, adversarial=0.1, adversarial_from_steps=20))
    frozen = made.load_frozen(None)
    before = fingerprint(frozen)
    step, state, losses = jax.jit(make_step(made, 0)), started(made), []
    for position in range(30):
        state, metrics = step(state, frozen, batch(position))
        losses.append(float(metrics["l2"]))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert fingerprint(frozen) == before
    assert state.players["model"].params.keys() == {"decoder"}
    made_by = jax.jit(made.reconstruct)({"model": state.players["model"].params}, frozen, batch(99), jax.random.key(0))
    assert {"original", "large", "tiny", "lpips/large", "lpips/tiny"} == made_by.keys()
    large, tiny = (np.abs(made_by[n].astype(int) - made_by["original"].astype(int)).mean() for n in ("large", "tiny"))
    assert tiny < large  # the large decoder is drawn at random here


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    made = recipe()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])

    def train(folder, steps):
        saves = CheckpointConfig(every_steps=2)
        config = LoopConfig(train_steps=steps, log_every_steps=1, tensorboard=False, checkpoint=saves)
        return loop.train(made, ByPosition("16x16", batch), config, workdir=tmp_path / folder, mesh=mesh, quiet=True)

    train("broken", 2)
    straight, resumed = train("straight", 4), train("broken", 4)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 32}, "crop=32 is larger than an image of 16 x 16 px"),
        ({"crop": 7}, "7 x 7 px: both sides must be multiples of 2"),
        (
            {"inputs": dataclasses.replace(IMAGES, image_sizes=((16, 17),))},
            "16 x 17 px: both sides must be multiples of 2",
        ),
        ({"inputs": dataclasses.replace(IMAGES, codec=CodecConfig("patch"))}, "kind='patch' with decoder='autoenc"),
        ({"decoder": TinyDecoderConfig.preset("smoke", latent_channels=5)}, "latent_channels 4 and its tiny_decoder 5"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_without_weights_the_error_says_where_they_come_from():
    made = DecoderDistillation(CONFIG, "cpu")
    with pytest.raises(ConfigError, match=r"set codec\.workdir to a run of the recipe 'autoencoder'"):
        made.load_frozen(None)
    assert build_codec(CODEC).spec() == made.inputs.images.codec.spec()
