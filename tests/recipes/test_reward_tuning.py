"""Reward tuning: gradients of rewards through the last steps of the sampler, and what stays as it was."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.evaluation.interfaces import EvaluationConfig
from snapgen_jax.evaluation.registry import create
from snapgen_jax.evaluation.rewards import RewardScore
from snapgen_jax.generation import Generator
from snapgen_jax.inputs.interfaces import Inputs, TokenizerSpec
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.lora import LoraConfig
from snapgen_jax.networks.module import apply, flatten
from snapgen_jax.networks.rewards import RewardConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes._reward_config import RewardSamplingConfig, RewardTuningConfig
from snapgen_jax.recipes._rewards import Rewards, RewardSourceConfig
from snapgen_jax.recipes._sampling import initial_noise
from snapgen_jax.recipes.contrastive import Contrastive, ContrastiveConfig
from snapgen_jax.recipes.flow_matching import FlowMatching
from snapgen_jax.recipes.reward_tuning import RewardTuning
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import CheckpointConfig, Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from tests.recipes.test_flow_matching_recipe import CONFIG
from tests.recipes_for_tests import ByPosition, greys, saved_away_from_zero

TEXT = ClipTextConfig.preset("smoke", max_tokens=6)
NETWORK = RewardConfig(vision=ClipVisionConfig.preset("smoke", image_size=8), text=TEXT)
REWARD = RewardSourceConfig(network=NETWORK, stand_in=True)
STEPS = 4
METHOD = FlowMatching(CONFIG, "cpu")
ONE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def tuning(base="", **changes):
    """The recipe on the network of the adapters' tests."""
    config = {
        "train_steps": 4,
        "batch_size": 4,
        "init_from": str(base),
        "sampling": RewardSamplingConfig(steps=STEPS, guidance=2.0, shift=3.0),
        "backprop_steps": 2,
        "rewards": {"taste": dataclasses.replace(REWARD, network=dataclasses.replace(NETWORK, score="scaled"))},
        "constraint": dataclasses.replace(REWARD, weight=2.0),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        "ema_decay": 0.0,
        "evaluation": EvaluationConfig(0, (), ()),
        **changes,
    }
    return RewardTuning(RewardTuningConfig(**{**vars(CONFIG), **config}), "cpu")


def prompts(position):
    """Four prompts, and no images."""
    return {name: value for name, value in greys(position, 4).items() if name != "image"}


def train(recipe, workdir, earlier, steps=4):
    checkpoint = CheckpointConfig(every_steps=4)
    config = LoopConfig(train_steps=steps, log_every_steps=2, tensorboard=False, checkpoint=checkpoint)
    (bucket,) = recipe.batch_specs()
    data = ByPosition(bucket, prompts)
    return loop.train(recipe, data, config, workdir=workdir, mesh=ONE, earlier=lambda: earlier, quiet=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The workdir of a network, and its averaged weights."""
    workdir = tmp_path_factory.mktemp("base")
    return epath.Path(workdir), saved_away_from_zero(METHOD, workdir)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The recipe, the workdir of its run and its weights."""
    recipe, workdir = tuning(base[0]), tmp_path_factory.mktemp("tuned")
    state = train(recipe, workdir, {"model": base[1]})
    said = {"recipe": "reward_tuning", "trains": "text"}
    (workdir / "config.json").write_text(json.dumps(said))
    return recipe, epath.Path(workdir), {"model": state.players["model"].params}


@pytest.fixture(scope="module")
def frozen(base):
    """What its frozen networks are."""
    return tuning(base[0]).load_frozen(None)


def drawn_of(recipe, networks):
    return recipe.draw(networks, prompts(0), jax.random.key(3))


# --- what it is -------------------------------------------------------------------------------------------------------


def test_it_fulfils_the_protocol_and_reads_prompts_alone(base, frozen):
    recipe = tuning(base[0])
    assert isinstance(recipe, Recipe) and isinstance(recipe.inputs, Inputs)
    assert recipe.trains == {"model": ("text",)}
    assert {name: set(specs) for name, specs in recipe.batch_specs().items()} == {"8x8": {"tokens", "mask"}}
    shapes = jax.tree.map(lambda s: (s.shape, s.dtype), recipe.frozen_spec())
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), frozen)
    assert set(frozen) == {"unet", "original/text", "reward/taste", "reward/constraint"}
    assert set(recipe.load_frozen(None, "generate")) == {"unet", "original/text"}


def test_training_moves_the_encoder_alone_and_the_reward_rises(base, tuned, frozen, images):
    recipe, workdir, params = tuned
    assert set(params["model"]) == {"text"}
    assert fingerprint(params["model"]["text"]) != fingerprint(frozen["original/text"])
    assert fingerprint(recipe.load_frozen(None)) == fingerprint(frozen)
    lines = [json.loads(line) for line in (workdir / "metrics" / "train.jsonl").read_text().splitlines()]
    assert {"reward", "reward/taste", "reward/constraint"} <= set(lines[-1])
    before, drawn = images
    score = jax.jit(recipe.score)
    totals = [
        score(params, frozen, {**prompts(0), "image": image})["total"].mean()
        for image in (before["image"], drawn()["image"])
    ]
    assert totals[1] > totals[0]


def test_the_run_holds_its_frozen_networks_to_their_files(base, tuned, frozen):
    recipe, _, params = tuned
    (spec,) = recipe.evaluators()
    evaluator, generator = create(spec), Generator(recipe, params, frozen, None)
    assert spec.at_end and evaluator(generator).numbers == {"frozen.unchanged": len(frozen)}
    bits = {**frozen, "reward/taste": jax.tree.map(lambda x: x + (x.ndim == 0), frozen["reward/taste"])}
    with pytest.raises(ValueError, match="frozen networks reward/taste are not those of their files"):
        evaluator(generator.with_weights(params, bits))
    two = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    on_two = spec.function(two)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(on_two)} == {two}
    assert evaluator(generator.with_weights(params, on_two)).numbers == {"frozen.unchanged": len(frozen)}


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop_input", "prediction"),
    [(False, "velocity"), (True, "velocity"), (True, "x_0")],
    ids=["through all", "along the velocities", "along those of another prediction"],
)
def test_gradients_are_those_of_a_sampler_that_is_cut_before_the_last_steps(base, frozen, stop_input, prediction):
    recipe, last = tuning(base[0], stop_input_gradient=stop_input, prediction=prediction), 2
    text = jax.tree.map(lambda x: 1.1 * x + 0.01, frozen["original/text"])
    drawn, w = drawn_of(recipe, frozen), recipe.config.sampling.guidance
    grid = recipe.config.schedule.grid(STEPS, 3.0)

    def reference(text):
        """Every step by the same formula, without checkpoints."""

        told = []
        for encoder in (frozen["original/text"], text):
            networks = {**frozen, "text": encoder}
            pair = recipe.inputs.condition(networks, drawn["batch"]), recipe.inputs.null_condition(networks)
            told.append(jax.tree.map(lambda a, b: jnp.concatenate([a, jnp.repeat(b, 4, axis=0)]), *pair))

        def step(x, i):
            x = jnp.where(i == STEPS - last, jax.lax.stop_gradient(x), x)
            condition = jax.tree.map(lambda a, b: jnp.where(i < STEPS - last, a, b), *told)
            given = jax.lax.stop_gradient(x) if stop_input else x
            v = recipe.denoiser(frozen["unet"], jnp.concatenate([given, given]), grid.at(i, 8), condition)[0]
            ts = jnp.asarray(grid.t)
            return x + (ts[i + 1] - ts[i]) * (v[4:] + w * (v[:4] - v[4:])), None

        x, _ = jax.lax.scan(step, recipe.config.schedule.initial(drawn["noise"], grid), jnp.arange(STEPS))
        images = recipe.pictures(frozen, x)
        tokens = drawn["batch"]["tokens"]
        rewards = [
            weight * apply(recipe.networks()[role], frozen[role], images, tokens)
            for role, weight in (("reward/taste", 1.0), ("reward/constraint", 2.0))
        ]
        return -jnp.mean(rewards[0] + rewards[1])

    def ours(text):
        return recipe.loss(recipe.weights({"model": {"text": text}}, frozen), drawn, {})[0]

    (expected, wanted), (value, grads) = (jax.jit(jax.value_and_grad(f))(text) for f in (reference, ours))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted))
    assert scale > 1e-6
    for path, leaf in flatten(wanted).items():
        np.testing.assert_allclose(flatten(grads)[path], leaf, rtol=1e-3, atol=1e-4 * scale, err_msg="/".join(path))


def test_no_step_gives_no_gradient(base, frozen):
    recipe = tuning(base[0])
    drawn = drawn_of(recipe, frozen)

    def total(text):
        return jnp.sum(recipe.roll_out(recipe.weights({"model": {"text": text}}, frozen), drawn, tuned_steps=0) ** 2)

    grads = jax.jit(jax.grad(total))(frozen["original/text"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_step_keeps_no_more_than_two_latents_for_its_gradient(base, frozen):
    """What the backward pass is left with, by the number of steps that it runs through."""
    recipe = tuning(base[0], sampling=RewardSamplingConfig(steps=12, guidance=2.0))
    drawn = drawn_of(recipe, frozen)

    def kept(last):
        def rolled(text):
            return recipe.roll_out(recipe.weights({"model": {"text": text}}, frozen), drawn, tuned_steps=last)

        residuals = jax.eval_shape(lambda text: jax.vjp(rolled, text)[1], frozen["original/text"])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    latent = drawn["noise"].size * 4
    growth = (kept(10) - kept(2)) / 8
    assert 0.9 * latent <= growth <= 2 * latent


def test_what_is_cut_off_in_a_picture_has_its_gradient(base, frozen):
    recipe = tuning(base[0])
    latent = 30 * jax.random.normal(jax.random.key(0), (2, *recipe.inputs.latent_shape()))
    images = recipe.pictures(frozen, latent)
    assert images.min() == 0 and images.max() == 1
    grads = jax.grad(lambda latent: jnp.sum(recipe.pictures(frozen, latent) ** 2 / 2 - recipe.pictures(frozen, latent)))
    assert jnp.mean(grads(latent) != 0) > 0.5


@pytest.mark.parametrize("changes", [{"trains": "network"}, {"trains": "text_adapters"}, {"form": "direct"}])
def test_other_players_and_the_direct_form_learn_too(base, changes):
    lora = LoraConfig(2, 4.0, ("attention/",))
    sampling = RewardSamplingConfig(steps=2, guidance=2.0)
    recipe = tuning(base[0], lora=lora, sampling=sampling, **changes)
    frozen = recipe.load_frozen(None)
    state = jax.jit(recipe.init)(key(0, 0, "init"))
    state = recipe.warm_start(state, {"model": base[1]})
    batch = greys(0, 4) if recipe.config.form == "direct" else prompts(0)
    assert set(batch) == set(recipe.batch_specs()["8x8"])
    after, metrics = jax.jit(recipe.update)(state, frozen, batch, jax.random.key(1))
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["grad_norm"] > 0
    (role,) = recipe.trains["model"]
    assert role == {"network": "unet", "text_adapters": "adapters"}.get(recipe.config.trains, "text")
    assert fingerprint(after.players["model"].params) != fingerprint(state.players["model"].params)
    (moved,) = recipe.tuned
    used = recipe.weights({"model": after.players["model"].params}, frozen)
    assert fingerprint(used[moved]) != fingerprint(used[f"original/{moved}"]) == fingerprint(base[1][moved])


def test_the_network_is_tuned_with_an_encoder_that_stays(base, tuned):
    recipe = tuning(base[0], trains="network", tuned_text=str(tuned[1]))
    frozen = recipe.load_frozen(None)
    assert fingerprint(frozen["text"]) == fingerprint(tuned[2]["model"]["text"])
    assert fingerprint(frozen["original/text"]) == fingerprint(base[1]["text"])
    assert {"original/unet", "original/text", "text"} < set(frozen) and "unet" not in frozen


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_a_reward_is_of_each_image_with_its_own_prompt(base, frozen):
    recipe = tuning(base[0])
    images, tokens = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3)), prompts(1)["tokens"]
    rewards = jax.jit(lambda images, tokens: recipe.rewards(frozen, images, {"tokens": tokens}))
    order = np.array([2, 0, 3, 1])
    found, moved, mixed = (
        rewards(x, t) for x, t in ((images, tokens), (images[order], tokens[order]), (images, tokens[order]))
    )
    for name in ("taste", "constraint"):
        assert found[name].shape == (4,)
        np.testing.assert_allclose(moved[name], found[name][order], rtol=1e-4)
        assert jnp.abs(mixed[name] - found[name]).max() > 1e-3
    np.testing.assert_allclose(recipe.rewards.total(found), found["taste"] + 2 * found["constraint"])


def test_a_reward_of_one_text_reads_that_in_place_of_the_prompts(base):
    sources = tuning(base[0]).config.rewards
    wish = {name: dataclasses.replace(source, text="a red circle") for name, source in sources.items()}
    recipe = tuning(base[0], rewards=wish)
    tokenizers = recipe.tokenizers()
    assert tokenizers["taste_tokens"] == dataclasses.replace(tokenizers["tokens"], text="a red circle", like="tokens")
    (batch,) = recipe.batch_specs().values()
    assert batch["taste_tokens"].shape == batch["tokens"].shape
    assert recipe.rewards.arrays() == ("taste_tokens", "tokens")  # the constraint reads the prompts


def test_the_clip_of_a_contrastive_run_is_a_reward(tmp_path):
    own = ContrastiveConfig(
        batch_size=4,
        image=ClipVisionConfig.preset("smoke", image_size=8, patch=4),
        inputs=dataclasses.replace(ContrastiveConfig().inputs, image_sizes=((8, 8),), text=TEXT),
        ema_decay=0.0,
    )
    clip = Contrastive(own, "cpu")
    state = jax.jit(clip.init)(key(0, 0, "init"))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, 0, {})
    checkpointer.close()
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "contrastive"}))
    network = RewardConfig(vision=own.image, text=TEXT, preprocessing="signed", padding="hidden")
    spec = {"tokens": TokenizerSpec("trained", 6, 32)}
    rewards = Rewards({"clip": RewardSourceConfig(network=network, workdir=str(tmp_path))}, spec, "cpu")
    batch, networks = greys(0, 4), rewards.load(None, spec)
    images = batch["image"].astype(np.float32) / 255
    params = {"model": state.players["model"].params}
    embedded = jax.jit(lambda batch: clip.generate(params, {}, batch, None, clip.options))(batch)
    expected = np.sum(embedded["image"] * embedded["text"], axis=1)
    found = jax.jit(lambda images, batch: rewards(networks, images, batch))(images, batch)
    np.testing.assert_allclose(found["clip"], expected, atol=2e-6)


class FourPrompts:
    """A tokenizer that knows four prompts."""

    names = ("tokens", "mask")

    def arrays(self, texts, lengths):
        assert len(texts) == 4 and set(lengths) == set(self.names)
        return prompts(0)


def test_the_evaluator_scores_each_image_with_its_prompt_and_reads_the_rewards(tuned, frozen):
    recipe, _, params = tuned
    generator = Generator(recipe, params, recipe.load_frozen(None, "generate"), FourPrompts())
    asked = ["a", "b", "c", "d"]
    found = RewardScore(prompts=asked, options={"tuned_steps": 0})(generator)
    images = generator.generate(asked, tuned_steps=0)
    expected = jax.jit(recipe.score)(params, frozen, {**prompts(0), "image": images})
    assert set(found.numbers) == {"reward.taste", "reward.constraint", "reward.total"}
    for name, values in expected.items():
        np.testing.assert_allclose(found.values[f"reward.{name}"], values, rtol=1e-5)
        assert found.numbers[f"reward.{name}"] == pytest.approx(float(jnp.mean(values)), rel=1e-5)
    with pytest.raises(ValueError, match="this is none"):
        RewardScore(prompts=asked)(Generator(METHOD, params, {}, FourPrompts()))


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw(recipe, params, frozen, **options):
    keys = jax.random.split(jax.random.key(7), 4)
    chosen = dataclasses.replace(recipe.config.sampling, **options)
    found = jax.jit(recipe.generate, static_argnums=4)(params, frozen, prompts(0), keys, chosen)
    return {name: np.asarray(found[name]) for name in ("image", "latent")}


@pytest.fixture(scope="module")
def images(base, tuned, frozen):
    """Images of the network before it was tuned, and of the tuned one by options of the sampler."""
    recipe, _, params = tuned
    keys = jax.random.split(jax.random.key(7), 4)
    plain = FlowMatching(dataclasses.replace(CONFIG, sampling=recipe.config.sampling), "cpu")
    before = jax.jit(plain.generate, static_argnums=4)({"model": base[1]}, {}, prompts(0), keys, plain.options)
    return before, functools.cache(functools.partial(draw, recipe, params, frozen))


@pytest.mark.parametrize("options", [{"encoder_mix": 0.0}, {"tuned_steps": 0}])
def test_without_the_tuned_encoder_images_are_those_of_the_original_bit_for_bit(images, options):
    before, drawn = images
    assert all(np.array_equal(before[name], value) for name, value in drawn(**options).items())


def test_images_move_with_the_share_of_the_tuned_encoder_and_its_steps(images):
    before, drawn = images
    whole = drawn()["latent"]

    def apart(**options):
        return float(np.abs(drawn(**options)["latent"] - before["latent"]).mean())

    far = float(np.abs(whole - before["latent"]).mean())
    assert 0 < apart(encoder_mix=0.5) < far
    assert 0 < apart(tuned_steps=2) < far


def test_styles_are_mixed_by_name(base, tuned):
    recipe = tuning(base[0], others={"again": str(tuned[1])})
    frozen = recipe.load_frozen(None)
    networks = recipe.weights(tuned[2], frozen)

    @functools.partial(jax.jit, static_argnums=0)
    def context(mix):
        stages = recipe.stages(dataclasses.replace(recipe.config.sampling, encoder_mix=mix))
        given = {"conditions": prompts(0), "keys": jax.random.split(jax.random.key(7), 4)}
        return stages["encoders"](networks, given)

    half, mixed = context(0.5), context("original:0.5,tuned:0.2,again:0.3")
    for name in ("condition", "null"):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), mixed[name], half[name])
    with pytest.raises(ConfigError, match="there is no encoder 'style', only original, tuned, again"):
        recipe.stages(dataclasses.replace(recipe.config.sampling, encoder_mix="original:0.5,style:0.5"))


def test_the_switch_leads_where_two_samplers_do(base, tuned, frozen, images):
    """By hand: the original for two steps, and from there the tuned one."""
    recipe, _, params = tuned
    networks, plain = recipe.weights(params, frozen), METHOD
    grid, told = recipe.config.schedule.grid(STEPS, 3.0), prompts(0)
    noise = initial_noise(jax.random.split(jax.random.key(7), 4), recipe.inputs.latent_shape())

    @jax.jit
    def steps(text, x, first):
        held = {**networks, "text": text}
        condition, null = plain.inputs.condition(held, told), plain.inputs.null_condition(held)
        null = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), null)

        def denoise(x, t, i, carry):
            v, v_null = (recipe.denoiser(held["unet"], x, grid.at(i, 4), c)[0] for c in (condition, null))
            return v_null + 2.0 * (v - v_null), carry

        times = jax.lax.dynamic_slice_in_dim(jnp.asarray(grid.t), first, 3)
        return sample(denoise, x, times, start=first)[0]

    x = steps(networks["text"], steps(networks["original/text"], noise, 0), 2)
    np.testing.assert_allclose(images[1](tuned_steps=2)["latent"], x, atol=1e-4)


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_bundle_has_the_tuned_encoder_a_mix_or_two_contexts(base, tuned, frozen):
    recipe, _, params = tuned
    weights = recipe.weights(params, frozen)
    shares = {"": 1.0, "encoder_mix": 0.25}
    tokens = {name: jnp.asarray(value[:1]) for name, value in prompts(0).items()}
    states = {
        role: apply(recipe.networks()[role], weights[role], *tokens.values()) for role in ("text", "original/text")
    }
    for option, w in shares.items():
        options = {option: w} if option else {}
        plan = tuning(base[0], sampling=dataclasses.replace(recipe.config.sampling, **options)).exports()
        unit = next(unit for unit in plan.units if unit.name == "text_encoder")
        made = jax.jit(unit.function)(unit.select(weights), **tokens)
        expected = w * states["text"].sequence + (1 - w) * states["original/text"].sequence
        np.testing.assert_allclose(made["sequence"], expected, atol=1e-5)
    plan = tuning(base[0], sampling=dataclasses.replace(recipe.config.sampling, tuned_steps=1)).exports()
    assert plan.program["contexts"] == {"text": ["text_encoder"], "original": ["original_text_encoder"]}
    assert [entry.get("context", "text") for entry in plan.program["steps"]] == ["original"] * 3 + ["text"]
    assert "shift" not in plan.program
    unit = next(unit for unit in plan.units if unit.name == "original_text_encoder")
    made = jax.jit(unit.function)(unit.select(weights), **tokens)
    np.testing.assert_allclose(made["sequence"], states["original/text"].sequence, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"encoder_mix": 0.0}, "are the original model; export that run"),
        ({"trains": "network"}, {"tuned_steps": 2}, "needs two networks in a bundle; export with --tuned_steps=4"),
        ({}, {"tuned_steps": 2, "method": "heun"}, "with --method=euler or --method=renoise, or with --tuned_steps=4"),
    ],
)
def test_what_no_bundle_holds_is_refused(base, changes, options, message):
    sampling = RewardSamplingConfig(steps=STEPS, guidance=2.0, **options)
    with pytest.raises(ConfigError, match=message):
        tuning(base[0], sampling=sampling, **changes).exports()


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": ""}, "there are no weights to tune: set init_from to the trained run"),
        (
            {"constraint": RewardSourceConfig(network=NETWORK)},
            "the reward 'constraint' has no weights: set its workdir",
        ),
        (
            {"constraint": RewardSourceConfig(network=NETWORK, workdir="nowhere")},
            "'nowhere' is no trained run",
        ),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_trained(base, changes, message):
    with pytest.raises(ConfigError, match=message):
        tuning(**{"base": base[0], **changes}).load_frozen(None)


def test_a_run_of_the_recipe_is_no_base(tuned):
    with pytest.raises(ConfigError, match="holds what it tuned alone: set base to the run that it tuned"):
        tuning(tuned[1]).load_frozen(None)
