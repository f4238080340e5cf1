"""What every kind of example promises a recipe, and the words for roles and for what is kept."""

import dataclasses
import typing

import jax
import numpy as np
import pytest

from snapgen_jax.inputs._encodings import Encoding
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.inputs.class_labels import ClassLabelsConfig
from snapgen_jax.inputs.clip_captions import ClipCaptionsConfig, ClipFrozenConfig
from snapgen_jax.inputs.encoders import EncodersConfig, FrozenConfig
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.interfaces import Inputs, StoredInputs, is_kept, prefixed, subtree
from snapgen_jax.inputs.registry import InputsConfig
from snapgen_jax.inputs.sd3_encoders import SD3EncodersConfig, SD3FrozenConfig
from snapgen_jax.inputs.stored import StoredConfig
from snapgen_jax.inputs.stored_clip_captions import StoredClipCaptionsConfig
from snapgen_jax.inputs.stored_encodings import StoredEncodingsConfig
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.context import ConditionerConfig
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.module import build
from snapgen_jax.networks.t5 import T5Config
from snapgen_jax.training.exits import ConfigError
from tests.recipes_for_tests import TwoPlayers

AUTOENCODER = CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("smoke"))
CLIP, GEMMA, T5 = ClipTextConfig.preset("smoke"), Gemma2Config.preset("smoke"), T5Config.preset("smoke", width=32)
SNAPGEN = {"codec": AUTOENCODER, "clip_l": CLIP, "clip_g": CLIP, "language": GEMMA, "language_tokens": 6}
SD3 = {"codec": AUTOENCODER, "clip_l": CLIP, "clip_g": CLIP, "t5": T5, "t5_tokens": 6}
SMALL = (
    CaptionsConfig(text=ClipTextConfig.preset("smoke"), codec=AUTOENCODER),
    EncodersConfig(
        image_sizes=((32, 32),),
        codec=AUTOENCODER,
        clip_l=ClipTextConfig.preset("smoke"),
        clip_g=ClipTextConfig.preset("smoke"),
        language=Gemma2Config.preset("smoke"),
        language_tokens=6,
        conditioner=ConditionerConfig(width=32, language_width=16),
    ),
    SD3EncodersConfig(image_sizes=((32, 32),), prefix="teacher_", **SD3),
    StoredConfig(image_sizes=((32, 32),), context_width=16, pooled_width=16),
    StoredClipCaptionsConfig(image_sizes=((32, 32),), encoders=ClipFrozenConfig(clip_l=ClipTextConfig.preset("smoke"))),
    ClipCaptionsConfig(image_sizes=((32, 32),), codec=AUTOENCODER, clip_l=ClipTextConfig.preset("smoke")),
    StoredEncodingsConfig(
        image_sizes=((32, 32),),
        clip_l=Encoding(tokens=7, width=6, pooled=6),
        clip_g=Encoding(tokens=7, width=10, pooled=10),
        language=Encoding(tokens=5, width=12),
        conditioner=ConditionerConfig.preset("smoke"),
    ),
    ClassLabelsConfig(codec=AUTOENCODER, label=LabelEmbeddingConfig.preset("smoke")),
    ImagesConfig(image_sizes=((32, 32),), codec=AUTOENCODER),
)
EACH = [pytest.param(config.build(4, "cpu"), id=config.kind) for config in SMALL]
OF_TOKENS = (
    StoredConfig(
        image_sizes=((32, 32),),
        reduction=2,
        latent_channels=4,
        text="tokens",
        encoders=SD3FrozenConfig(**SD3),
        **SD3FrozenConfig(**SD3).context(),
    ),
    StoredEncodingsConfig(
        image_sizes=((32, 32),),
        reduction=2,
        latent_channels=4,
        text="tokens",
        encoders=FrozenConfig(**SNAPGEN),
        conditioner=ConditionerConfig(width=32, language_width=16),
    ),
)
EACH += [pytest.param(config.build(4, "cpu"), id=f"{config.kind}, tokens") for config in OF_TOKENS]
WITH_SEQUENCES = [*EACH, pytest.param(TwoPlayers(batch_size=4).inputs, id="sequences of the tests")]


def test_every_kind_of_the_registry_is_looked_at_here_and_lies_in_a_file_of_its_name():
    assert {type(config) for config in SMALL} == set(typing.get_args(InputsConfig))
    assert {type(config).__module__.rpartition(".")[2] for config in SMALL} == {config.kind for config in SMALL}


@pytest.mark.parametrize("inputs", WITH_SEQUENCES)
def test_it_fulfils_the_protocol_and_says_the_same_of_itself_everywhere(inputs):
    assert isinstance(inputs, Inputs)
    assert set(inputs.pretrained()) <= set(inputs.networks())
    specs = next(iter(inputs.batch_specs().values()))
    assert set(inputs.conditions()) <= set(specs) and set(inputs.tokenizers()) <= set(inputs.conditions())
    for name, tokenizer in inputs.tokenizers().items():
        assert specs[name].shape == (4, tokenizer.length) and specs[name].dtype == np.int32


@pytest.mark.parametrize("inputs", WITH_SEQUENCES)
def test_what_it_computes_has_the_shapes_that_it_promises(inputs):
    networks = {role: build(network.config)[1] for role, network in inputs.networks().items()}
    batch, one = next(iter(inputs.batch_specs().values())), jax.random.key(0)
    x_0 = jax.eval_shape(inputs.clean, networks, batch)
    assert (x_0.shape, x_0.dtype) == ((4, *inputs.latent_shape()), np.float32)
    kept = inputs.draw_kept(one, 4)
    assert all(rows.shape == (4,) for rows in kept.values())
    for dropped in (kept, {}):
        told = jax.eval_shape(inputs.draw_condition, networks, batch, one, dropped)
        given = jax.eval_shape(inputs.condition, networks, told)
        null = jax.eval_shape(inputs.null_condition, networks)
        assert jax.tree.map(lambda s: (1, *s.shape[1:]), given) == jax.tree.map(lambda s: s.shape, null)
    images = jax.eval_shape(inputs.decode, networks, x_0)
    if "image" in images:
        assert images["image"].shape == batch["image"].shape and images["image"].dtype == np.uint8


@pytest.mark.parametrize("inputs", WITH_SEQUENCES)
def test_it_says_how_many_examples_keep_nothing_and_which_integers_have_a_meaning(inputs):
    kept = [np.asarray(rows, bool) for rows in inputs.draw_kept(jax.random.key(2), 4096).values()]
    none = (~np.any(kept, axis=0)).mean() if kept else 0.0
    assert inputs.unconditional_share() == pytest.approx(none, abs=0.02)
    specs = next(iter(inputs.batch_specs().values()))
    integers = {name for name, spec in specs.items() if np.issubdtype(spec.dtype, np.integer)} - {"image"}
    assert set(inputs.integer_bounds()) == integers - set(inputs.tokenizers())


def test_roles_below_a_prefix_are_taken_and_put_back():
    roles = {"unet": 1, "teacher/mmdit": 2, "teacher/codec/decoder": 3, "teachers": 4}
    below = subtree(roles, "teacher")
    assert below == {"mmdit": 2, "codec/decoder": 3}
    assert prefixed("teacher", below) == {"teacher/mmdit": 2, "teacher/codec/decoder": 3}


def test_an_encoder_is_kept_as_it_is_told_or_else_where_any_is():
    kept = {"clip_l": np.array([1.0, 0.0, 0.0]), "language": np.array([0.0, 0.0, 1.0])}
    np.testing.assert_array_equal(is_kept(kept, "clip_l"), kept["clip_l"])
    np.testing.assert_array_equal(is_kept(kept, "text"), [True, False, True])
    assert is_kept({}, "text") is None


@pytest.mark.parametrize(
    "config",
    [*OF_TOKENS, *(dataclasses.replace(c, text="states") for c in OF_TOKENS)],
    ids=lambda c: f"{c.kind}, {c.text}",
)
def test_what_makes_stored_arrays_makes_those_of_its_batches(config):
    inputs = config.build(4, "cpu")
    assert isinstance(inputs, StoredInputs) and not isinstance(EACH[0].values[0], StoredInputs)
    frozen = inputs.frozen_encoders()
    networks = {role: build(network.config)[1] for role, network in frozen.networks().items()}
    running = dataclasses.replace(config.encoders, stand_ins=True)
    assert config.unstored() is None, "no weights are named"
    unstored = dataclasses.replace(config, encoders=running).unstored().build(4, "cpu")
    (given,), (specs,) = unstored.batch_specs().values(), inputs.batch_specs().values()
    made = jax.eval_shape(frozen.encode_images, networks, given["image"])
    made |= jax.eval_shape(frozen.encode_text, networks, {name: x for name, x in given.items() if name != "image"})
    assert {n: (x.shape, x.dtype) for n, x in made.items()} == {n: (x.shape, x.dtype) for n, x in specs.items()}
    assert ("clip_l" in frozen.networks()) == (config.text == "states")


@pytest.mark.parametrize("change", [{"latent_channels": 3}, {"reduction": 4}])
@pytest.mark.parametrize("config", OF_TOKENS, ids=lambda config: config.kind)
def test_encoders_that_make_other_arrays_than_are_described_are_refused(config, change):
    (name,) = change
    with pytest.raises(ConfigError, match=rf"inputs\.{name} is \d, and the networks of inputs\.encoders make \d"):
        dataclasses.replace(config, **change, text="states").build(4, "cpu").frozen_encoders()
