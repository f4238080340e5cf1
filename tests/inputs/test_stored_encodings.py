"""Stored encodings of captions: the same condition as from encoders that run inside the step, in every stage."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load, load_recipe, load_weights
from snapgen_jax.inputs._encodings import Encoding
from snapgen_jax.inputs.encoders import EncodersConfig
from snapgen_jax.inputs.stored_encodings import StoredEncodingsConfig
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.module import apply, count_parameters, flatten, init
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.workdir import prepare_workdir
from tests.recipes_for_tests import ONE_STAGE

B, M = 8, 6
CLIP, GEMMA = ClipTextConfig.preset("smoke"), Gemma2Config.preset("smoke")
CONDITIONER = ConditionerConfig(width=2 * CLIP.width, language_width=GEMMA.width)
RUNNING = EncodersConfig(
    image_sizes=((32, 32),),
    codec=CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("smoke")),
    clip_l=CLIP,
    clip_g=CLIP,
    language=GEMMA,
    language_tokens=M,
    conditioner=CONDITIONER,
)
POOLED = CLIP.projection or CLIP.width
STORED = StoredEncodingsConfig(
    image_sizes=((32, 32),),
    latent_channels=4,
    clip_l=Encoding(CLIP.max_tokens, CLIP.width, POOLED),
    clip_g=Encoding(CLIP.max_tokens, CLIP.width, POOLED),
    language=Encoding(M, GEMMA.width),
    conditioner=CONDITIONER,
)
CONFIG = FlowMatchingConfig(
    batch_size=B,
    train_steps=4,
    network=UNetConfig.preset("smoke", context_width=2 * CLIP.width, pooled_width=2 * POOLED, **ONE_STAGE),
    inputs=STORED,
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
)
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def stored(**changes):
    return dataclasses.replace(STORED, **changes).build(B, "cpu")


def batch(made, seed=0):
    """Random encodings, those of the language model padded."""
    rng, specs = np.random.default_rng(seed), next(iter(made.batch_specs().values()))
    arrays = {name: jnp.asarray(rng.standard_normal(s.shape), s.dtype) for name, s in specs.items()}
    return arrays | {"language_mask": np.broadcast_to(np.arange(M) < M - 2, (B, M)).astype(np.float32)}


@pytest.fixture(scope="module")
def networks():
    """Frozen encoders and a conditioner, none of whose parameters is zero."""
    brought = RUNNING.build(B, "cpu").networks()
    drawn = {n: init(brought[n], jax.random.key(i)) for i, n in enumerate((*ENCODERS, "conditioner"))}
    return jax.tree.map(lambda x: x + 0.02, drawn)


@pytest.fixture(scope="module")
def encoded(networks):
    """Token ids of captions, and what the encoders make of them, as it is stored."""
    made, rng = RUNNING.build(B, "cpu"), np.random.default_rng(0)
    tokens = {name: rng.integers(0, 40, (B, M if name == "language" else CLIP.max_tokens)) for name in ENCODERS}
    tokens["language_mask"] = np.broadcast_to(np.arange(M) < M - 2, (B, M)).astype(np.float32)
    told = jax.jit(made.draw_condition)(networks, tokens, jax.random.key(0), {})
    arrays = {f"{name}_states": told[name].sequence for name in ENCODERS}
    arrays |= {f"{name}_pooled": told[name].pooled for name in ("clip_l", "clip_g")}
    return tokens, arrays | {"language_mask": tokens["language_mask"]}


@pytest.mark.parametrize("kept", [{}, {name: np.arange(B) >> i & 1 for i, name in enumerate(ENCODERS)}])
def test_stored_encodings_give_the_context_of_encoders_that_run_inside_the_step(networks, encoded, kept):
    kept = {name: jnp.asarray(rows, jnp.float32) for name, rows in kept.items()}
    contexts = []
    for made, arrays in zip((RUNNING.build(B, "cpu"), stored()), encoded, strict=True):

        def context(arrays, made=made):
            return made.condition(networks, made.draw_condition(networks, arrays, jax.random.key(0), kept))

        contexts.append(jax.jit(context)(arrays))
    for running, read in zip(*map(jax.tree.leaves, contexts), strict=True):
        np.testing.assert_allclose(read, running, atol=1e-6)
    assert float(jnp.abs(contexts[1].sequence).mean()) > 0.01


def test_what_is_dropped_is_the_null_condition_and_clip_alone_is_the_context_without_the_language_model(networks):
    made, nothing, clip = stored(), dict.fromkeys(ENCODERS, jnp.zeros(B)), {"language": jnp.zeros(B)}
    clip |= {name: jnp.ones(B) for name in ("clip_l", "clip_g")}

    def context(kept):
        return made.condition(networks, made.draw_condition(networks, batch(made), jax.random.key(0), kept))

    for given, null in zip(*map(jax.tree.leaves, (context(nothing), made.null_condition(networks))), strict=True):
        assert given.dtype == null.dtype == jnp.float32
        np.testing.assert_array_equal(given, np.broadcast_to(null, given.shape))
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in batch(made).items()}
    states = [
        TextContext(arrays[f"{n}_states"], jnp.ones((B, CLIP.max_tokens)), arrays[f"{n}_pooled"])
        for n in ("clip_l", "clip_g")
    ]
    alone, absent = context(clip), apply(made.networks()["conditioner"], networks["conditioner"], *states)
    np.testing.assert_array_equal(alone.sequence[:, : CLIP.max_tokens], absent.sequence)
    assert not alone.mask[:, CLIP.max_tokens :].any() and not alone.sequence[:, CLIP.max_tokens :].any()
    np.testing.assert_array_equal(alone.pooled, absent.pooled)


@pytest.mark.parametrize(
    ("encoder_dropout", "caption_dropout", "none"),
    [(0.464, None, 0.464**3), (0.464, 0.0, 0.0), ((0.1, 0.3, 0.9), None, 0.027), ((0.1, 0.3, 0.9), 0.2, 0.2)],
)
def test_encoders_are_left_out_at_their_own_rates_in_every_kind(encoder_dropout, caption_dropout, none):
    rates = {"encoder_dropout": encoder_dropout, "caption_dropout": caption_dropout}
    kinds = stored(**rates), dataclasses.replace(RUNNING, **rates).build(B, "cpu")
    drawn = [made.draw_kept(jax.random.key(1), 20_000) for made in kinds]
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    kept = np.stack([drawn[0][name] for name in ENCODERS])
    assert kinds[0].unconditional_share() == pytest.approx(none) == kinds[1].unconditional_share()
    assert abs((~kept.any(axis=0)).mean() - none) < 0.01
    if caption_dropout is None:
        expected = np.broadcast_to(encoder_dropout, 3)
        np.testing.assert_allclose(1 - kept.mean(axis=1), expected, atol=0.012)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"conditioner": ConditionerConfig(width=40)}, "together are 32 wide, but inputs.conditioner.width is 40"),
        ({"language": Encoding(M, 20)}, "states are 20 wide, but inputs.conditioner.language_width is 16"),
        ({"clip_g": Encoding(7, CLIP.width, POOLED)}, "inputs.clip_l has 8 tokens and inputs.clip_g 7"),
        ({"encoder_dropout": 1.5}, "encoder_dropout=1.5; give one rate from 0 to 1"),
        ({"caption_dropout": -0.1}, "caption_dropout=-0.1; give a share from 0 to 1"),
        ({"encoder_dropout": 1.0, "caption_dropout": 0.1}, "leaves out every encoder, and caption_dropout=0.1 wants"),
        ({"image_sizes": ((30, 32),)}, r"\(30, 32\) does not divide by reduction=8"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(changes, says):
    with pytest.raises(ValueError, match=says):
        stored(**changes)


# --- stages ----------------------------------------------------------------------------------------------------------


def test_a_stage_on_stored_encodings_goes_on_with_the_conditioner_of_one_on_captions_and_back():
    made = [FlowMatching(dataclasses.replace(CONFIG, inputs=inputs), "cpu") for inputs in (RUNNING, STORED)]
    states = [jax.jit(one.init)(key(seed, 0, "init")) for seed, one in enumerate(made)]
    for here, there in ((0, 1), (1, 0)):
        earlier = states[here].players["model"].params
        started = made[there].warm_start(states[there], {"model": earlier})
        assert set(started.players["model"].params) == {"unet", "conditioner"}
        jax.tree.map(np.testing.assert_array_equal, started.players["model"].params, earlier)
    with pytest.raises(ConfigError, match=r"holds another network than(.|\n)*conditioner/linear"):
        made[1].warm_start(states[1], {"model": {"unet": states[0].players["model"].params["unet"]}})


def stage(size, workdir, *overrides):
    spec = f"{CONFIGS}/pretrain/t2i_{size}.py:runlocal"
    random = ["data.source=synthetic", "inputs.encoders.stand_ins=False"]
    resolved = load_experiment(spec, ["train_steps=6", "log_every_steps=2", "tensorboard=False", *random, *overrides])
    prepare_workdir(resolved.config, workdir)
    return Experiment(resolved, workdir)


def first_loss(workdir):
    return json.loads((workdir / "metrics" / "train.jsonl").read_text().splitlines()[0])["loss"]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """256 -> 512 px of the pretraining in small: latents of 8 x 8, then of 16 x 16."""
    root = tmp_path_factory.mktemp("stages")
    fast = ["optimizer.learning_rate=0.01", "optimizer.warmup_steps=1", "ema_decay=0.5"]
    stage(256, root / "first", *fast).train()
    second = stage(512, root / "second", f"init_from={root / 'first'}", "inputs.image_sizes=((128,128),)")
    return root, second, second.train()


def test_the_first_loss_of_a_stage_is_that_of_the_averaged_weights_of_the_one_before(stages):
    root, second, _ = stages
    weights = load_weights(root / "first", load_recipe(root / "first"))["model"]
    made = second.recipe
    arrays = next(second.data.batches(0)).arrays
    assert arrays["latent"].shape == (8, 16, 16, 16)
    drawn = made.draw({}, arrays, key(second.config.seed, 0, "update"), 0)

    def loss(params):
        return float(jax.jit(made.loss)(made.weights({"model": params}, {}), drawn, {})[0])

    assert first_loss(root / "second") == pytest.approx(loss(weights), rel=1e-5)
    fresh = made.init(key(second.config.seed, 0, "init")).players["model"].params
    assert first_loss(root / "second") != pytest.approx(loss(fresh), rel=1e-3)


def test_what_a_stage_changes_and_what_begins_anew(stages):
    root, second, state = stages
    first = load_recipe(root / "first")
    assert (first.config.schedule.shift, second.recipe.config.schedule.shift) == (1.0, 1.7)
    assert int(state.step) == 6
    counts = [leaf for leaf in jax.tree.leaves(state.players["model"].opt_state) if leaf.dtype == jnp.int32]
    assert [int(count) for count in counts] == [6] * len(counts), "the schedule and the moments began at 0"


def test_a_resumed_stage_goes_on_from_itself(stages, tmp_path):
    root, _, state = stages
    straight = flatten(state.players["model"].params)
    half = stage(
        512, tmp_path, f"init_from={root / 'first'}", "inputs.image_sizes=((128,128),)", "checkpoint.every_steps=3"
    )
    half.config = dataclasses.replace(half.config, train_steps=3)
    half.train()
    # The stage before is gone: it is not read again.
    again = stage(
        512, tmp_path, f"init_from={tmp_path / 'gone'}", "inputs.image_sizes=((128,128),)", "checkpoint.every_steps=3"
    )
    for name, leaf in flatten(again.train().players["model"].params).items():
        np.testing.assert_array_equal(leaf, straight[name])


def test_prompts_are_refused_by_a_run_without_a_text_encoder(stages):
    with pytest.raises(ConfigError, match="holds no text encoder"):
        load(stages[0] / "first").generate(["a red fox"])


def test_a_stage_trains_the_conditioner_and_a_distillation_goes_on_with_it(stages):
    root, second, state = stages
    first, after = (
        flatten(load_weights(root / name, load_recipe(root / name))["model"]["conditioner"])
        for name in ("first", "second")
    )
    fresh = jax.jit(second.recipe.init)(key(second.config.seed, 0, "init"))
    trained, fresh = (
        {path: np.asarray(leaf) for path, leaf in flatten(s.players["model"].params["conditioner"]).items()}
        for s in (state, fresh)
    )
    assert set(trained) == set(first) == {("norm", "scale"), ("linear", "kernel"), ("linear", "bias")}
    for path, leaf in trained.items():
        assert not np.array_equal(leaf, first[path]), "it is trained at every size"
    kernel = "linear", "kernel"
    moved, begun = (np.linalg.norm(trained[kernel] - x[kernel]) for x in (first, fresh))
    assert moved < begun / 3, "it goes on from where it was"
    changes = [f"init_from={root / 'second'}"]
    distilled = load_experiment(f"{CONFIGS}/distill/t2i_1024_sd35l.py:runlocal", changes).build("cpu")
    earlier = load_weights(root / "second", load_recipe(root / "second"))
    started = jax.eval_shape(distilled.init, key(0, 0, "init"))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), started)
    held = flatten(distilled.warm_start(zeros, earlier).players["model"].params["conditioner"])
    for path, leaf in held.items():
        np.testing.assert_array_equal(leaf, after[path])


@pytest.mark.parametrize("file", ["pretrain/t2i_256_images", "pretrain/t2i_1024"])
def test_at_full_size_every_stage_trains_the_unet_of_the_paper_and_one_conditioner(file):
    made = load_experiment(f"{CONFIGS / file}.py").build("tpu")
    params = jax.eval_shape(made.init, key(0, 0, "init")).players["model"].params
    counts = {role: count_parameters(tree) for role, tree in params.items()}
    assert counts == {"unet": 379_044_496, "conditioner": 2304 + 2304 * 2048 + 2048}
    assert made.inputs.unconditional_share() == pytest.approx(0.1, abs=2e-4)
    context = jax.eval_shape(made.inputs.null_condition, {})
    assert context.sequence.shape == (1, 77 + 128, 2048) and context.pooled.shape == (1, 2048)
