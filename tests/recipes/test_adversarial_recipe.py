"""Step distillation as a recipe: what each player learns from, what stays frozen, and four calls for an image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import interpolate, velocity_from_x0, x0_from_velocity
from snapgen_jax.diffusion.schedules import FlowSchedule
from snapgen_jax.losses.adversarial import gradient_penalty
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.text import TextContext
from snapgen_jax.recipes.adversarial import Adversarial, AdversarialConfig
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig, TeacherConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, SamplingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.loop import make_step
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.recipe import Recipe
from tests.recipes_for_tests import GREY_TOKENS, ByPosition, greys, random_like, state_away_from_zero, train_and_read

GREYS = ByPosition("8x8", greys)
MMDIT = MMDiTConfig.preset("smoke", latent_channels=12, depth=2, dual=0)
STUDENT = {
    "batch_size": 8,
    "train_steps": 40,
    "image_sizes": ((8, 8),),
    "network": "mmdit",
    "mmdit": MMDIT,
    "text": ClipTextConfig.preset("smoke", max_tokens=GREY_TOKENS, layers=1),
    "codec": CodecConfig(patch=2),
    "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
}
TEACHER = TeacherConfig(mmdit=MMDIT)
HEADS = DiscriminatorConfig.preset("smoke", taps=("block_00", "block_01"), channels=(16, 16), time_width=16)
CONFIG = AdversarialConfig(**STUDENT, teacher=TEACHER, discriminator=HEADS)


def recipe(**changes):
    return Adversarial(dataclasses.replace(CONFIG, **changes), "cpu")


@pytest.fixture(scope="module")
def playing():
    """The recipe, what is frozen, a state, drawn examples, and all networks by name."""
    made = recipe()
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    drawn = jax.jit(made.draw)(frozen, greys(), jax.random.key(3), 0)
    given = {**frozen, **state.extra, "discriminator": state.players["discriminator"].params}
    return made, frozen, state, drawn, given


def test_it_fulfils_the_protocol():
    assert isinstance(recipe(), Recipe)


def test_it_trains_at_the_times_of_sampling_and_judges_at_less_noise(playing):
    made, frozen, *_ = playing
    drawn = [jax.jit(made.draw)(frozen, greys(), jax.random.key(i), 0) for i in range(20)]
    t, s = (np.concatenate([d[name] for d in drawn]) for name in ("t", "s"))
    np.testing.assert_allclose(np.unique(t), sorted([1.0, 0.9, 0.75, 0.5]))  # quarters, shifted by 3
    assert (s < t).all() and (s > 0).all()


def test_the_adversarial_loss_reaches_the_generator_and_no_loss_what_is_frozen(playing):
    made, _, state, drawn, given = playing

    def losses(params, given):
        total, found = made.loss({**given, **params}, drawn)
        return jnp.stack([found["metrics"]["loss/adversarial"], total])

    by_generator, by_given = jax.jit(jax.jacrev(losses, argnums=(0, 1)))(state.players["model"].params, given)
    assert max(float(jnp.abs(g[0]).max()) for g in jax.tree.leaves(by_generator["mmdit"])) > 1e-5
    for name in ("trunk", "teacher"):
        assert all(not np.any(g) for g in jax.tree.leaves(by_given[name])), name


def test_the_discriminators_loss_reaches_every_head_and_neither_generator_nor_trunk(playing):
    made, frozen, state, drawn, _ = playing
    gradient = jax.grad(lambda heads, params: made.discriminator_loss(heads, params, drawn)[0], argnums=(0, 1))
    heads, params = state.players["discriminator"].params, {**frozen, **state.players["model"].params}
    by_heads, by_params = jax.jit(gradient)(heads, params)
    assert all(np.any(g) for g in jax.tree.leaves(by_heads))
    assert all(not np.any(g) for g in jax.tree.leaves(by_params))


def test_the_penalty_is_the_squared_gradient_of_the_sum_over_cells_and_moves_the_heads(playing):
    made, frozen, state, drawn, _ = playing
    heads, params = state.players["discriminator"].params, {**frozen, **state.players["model"].params}

    @jax.jit
    def by_cells():
        """As in the formula: the logits of every cell by every feature, one example and one tap after the other."""
        context = made.condition(params, drawn)
        x_s = interpolate(drawn["x_0"], drawn["real_eps"], drawn["s"])
        features = made.features(params, x_s, drawn["s"], context, drawn)
        jacobians = jax.jacrev(lambda features: made.judge(heads, features, drawn["s"], context))(features)
        squares = [
            jnp.square(jacobians[tap][tap][i, :, :, i].sum(axis=(0, 1))).sum()
            for tap in features
            for i in range(len(x_s))
        ]
        return sum(squares) / len(squares)

    penalty = jax.jit(jax.value_and_grad(lambda heads: made.discriminator_loss(heads, params, drawn)[1]["penalty"]))
    value, slope = penalty(heads)
    np.testing.assert_allclose(value, by_cells(), rtol=1e-4)
    weighted = jax.tree.map(lambda g: made.config.penalty_weight * float(jnp.abs(g).max()), slope)
    assert max(jax.tree.leaves(weighted)) > 1e-6
    assert sum(w > 0 for w in jax.tree.leaves(weighted)) > len(jax.tree.leaves(weighted)) / 2


def test_the_penalty_does_not_shrink_when_the_grid_grows(playing):
    made, _, state, drawn, _ = playing
    heads, pooled = state.players["discriminator"].params, jnp.ones((2, HEADS.pooled_width))
    context = TextContext(jnp.zeros((2, 1, 1)), jnp.ones((2, 1)), pooled)
    small = {tap: jax.random.normal(jax.random.key(i), (2, 4, 4, 16)) for i, tap in enumerate(HEADS.taps)}
    large = jax.tree.map(lambda x: jnp.tile(x, (1, 3, 3, 1)), small)
    few, many = (
        gradient_penalty(lambda seen: made.judge(heads, seen, drawn["s"][:2], context), x) for x in (small, large)
    )
    assert (many > 5 * few).all()  # nine times the cells, and fewer of them at the border


def test_without_its_weight_the_penalty_is_left_out_bit_for_bit(playing):
    made, frozen, state, drawn, _ = playing
    heads, params = state.players["discriminator"].params, {**frozen, **state.players["model"].params}
    bare = recipe(penalty_weight=0.0)
    hinge = jax.grad(lambda heads: made.discriminator_loss(heads, params, drawn)[1]["loss/discriminator"])
    whole = jax.grad(lambda heads: bare.discriminator_loss(heads, params, drawn)[0])
    jax.tree.map(np.testing.assert_array_equal, *(jax.jit(gradient)(heads) for gradient in (hinge, whole)))


def test_the_parts_of_the_step_are_the_steps_of_the_two_players(playing):
    made, frozen, state, *_ = playing
    given = frozen, greys(), jax.random.key(5)
    whole, _ = jax.jit(made.update)(state, *given)
    judge, _ = jax.jit(made.parts()["discriminator"])(state, *given)
    after = state.replace(players={**state.players, "discriminator": judge})
    generator, _ = jax.jit(made.parts()["generator"])(after, *given)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole.players,
        {"model": generator, "discriminator": judge},
    )
    assert "discriminator" not in recipe(adversarial_weight=0.0).parts()


def test_another_prompt_changes_the_verdict(playing):
    made, _, state, drawn, given = playing

    def logits(drawn):
        params = {**given, **state.players["model"].params}
        context = made.condition(params, drawn)
        features = made.features(params, drawn["x_0"], drawn["s"], context, drawn)
        return made.judge(given["discriminator"], features, drawn["s"], context)

    verdict = jax.jit(logits)
    rolled = {**drawn, **{name: jnp.roll(drawn[name], 1, axis=0) for name in ("tokens", "mask")}}
    for before, after in zip(*(jax.tree.leaves(verdict(d)) for d in (drawn, rolled)), strict=True):
        assert float(jnp.abs(before - after).max()) > 1e-3


def test_without_adversary_it_is_distillation_at_the_few_times_bit_for_bit(playing):
    _, frozen, state, drawn, _ = playing
    fields = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(DistillationConfig)}
    plain = Distillation(DistillationConfig(**fields), "cpu")
    bare = recipe(adversarial_weight=0.0)
    assert set(bare.frozen_spec()) == {"teacher"}
    params = {**state.players["model"].params, **state.extra, "teacher": frozen["teacher"]}
    one, other = (jax.jit(made.loss)(params, drawn)[0] for made in (plain, bare))
    assert one == other
    assert set(jax.eval_shape(bare.init, key(0, 0, "init")).players) == {"model"}


def test_the_generator_is_called_four_times_for_an_image(playing):
    made, _, state, *_ = playing
    calls = []

    class Counting(Adversarial):
        def predict_with_taps(self, params, x_t, t, context, taps=()):
            jax.debug.callback(lambda t: calls.append(np.asarray(t)), t)
            return super().predict_with_taps(params, x_t, t, context, taps)

    counting = Counting(made.config, "cpu")
    conditions = {name: greys()[name][:2] for name in ("tokens", "mask")}
    weights = {"model": state.players["model"].params}
    found = jax.jit(counting.generate)(weights, {}, conditions, example_keys(0, jnp.arange(2), "generate"))
    jax.effects_barrier()
    assert [t.tolist() for t in calls] == [pytest.approx([t, t]) for t in (1.0, 0.9, 0.75, 0.5)]
    assert found["image"].shape == (2, 8, 8, 3) and found["noise"].shape == (2, 4, 4, 4, 12)


def test_the_validation_loss_is_the_error_of_one_jump_from_each_of_the_few_times(playing):
    made, frozen, state, *_ = playing
    key, params = jax.random.key(7), {**frozen, **state.players["model"].params}
    found = jax.jit(made.validation_loss)({"model": state.players["model"].params}, frozen, greys(), key)
    assert set(found) == {"mean", "t=1.00", "t=0.90", "t=0.75", "t=0.50"}

    @jax.jit
    def at(t):
        x_0, t = made.clean_latents(frozen, greys()), jnp.full(8, t)
        x_t = interpolate(x_0, jax.random.normal(key, x_0.shape), t)
        jump = x0_from_velocity(x_t, made.predict(params, x_t, t, made.condition(params, greys())), t)
        return jnp.square(jump - x_0).mean(axis=(1, 2, 3))

    errors = [at(t) for t in made.times]
    for error, t in zip(errors, ("1.00", "0.90", "0.75", "0.50"), strict=True):
        np.testing.assert_allclose(found[f"t={t}"], error, rtol=1e-4)
    np.testing.assert_allclose(found["mean"], sum(errors) / 4, rtol=1e-4)


def test_the_critic_follows_what_is_generated_and_pulls_it_to_the_teacher():
    made = recipe(critic_weight=1.0, adversarial_weight=0.0)
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    new, metrics = jax.jit(make_step(made, 0))(state, frozen, greys())
    assert bool(metrics["finite"]) and float(metrics["loss/critic"]) > 0 and float(metrics["loss/matching"]) > 0
    before, after = (jax.tree.leaves(s.players["critic"].params) for s in (state, new))
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def matching():
    """The recipe with a critic, the networks by name, drawn examples, generated ones, and what they were told."""
    made = recipe(critic_weight=1.0, adversarial_weight=0.0)
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    params = {**frozen, **state.extra, **state.players["model"].params, "critic": state.players["critic"].params}
    drawn = jax.jit(made.draw)(frozen, greys(), jax.random.key(0), 0)
    return made, params, drawn, *jax.jit(made.generated)(params, drawn)


def data_end(predict, drawn, x_0):
    """The data that a network sees behind a noisy x_0."""
    t = drawn["critic_t"]
    x_t = interpolate(x_0, drawn["critic_eps"], t)
    return x0_from_velocity(x_t, predict(x_t, t), t)


def test_the_gradient_by_what_is_generated_is_critic_less_teacher_over_the_teachers_distance(matching):
    made, params, drawn, x_0, context = matching

    @jax.jit
    def by_hand(x_0):
        critic = data_end(lambda x, t: made.predict({**params, **params["critic"]}, x, t, context), drawn, x_0)
        asked = {**drawn, "t": drawn["critic_t"]}
        teacher = data_end(lambda x, t: made.ask_teacher(params, asked, x, context, ())[0], drawn, x_0)
        scale = jnp.abs(x_0 - teacher).mean(axis=(1, 2, 3), keepdims=True)
        return (critic - teacher) / (scale * x_0[0].size)

    slope = jax.jit(jax.grad(lambda x_0: made.matching_loss(params, drawn, x_0, context).sum()))(x_0)
    assert float(jnp.abs(slope).max()) > 1e-4
    np.testing.assert_allclose(slope, by_hand(x_0), rtol=1e-3, atol=1e-7)


def test_beside_a_critic_who_knows_what_is_generated_a_step_goes_towards_the_teacher(matching):
    made, params, drawn, x_0, context = matching

    class Knowing(Adversarial):
        def predict(self, params, x_t, t, context):
            return velocity_from_x0(x_t, x_0, t)

    knowing = Knowing(made.config, "cpu")

    @jax.jit
    def step(x_0):
        asked = {**drawn, "t": drawn["critic_t"]}
        teacher = data_end(lambda x, t: made.ask_teacher(params, asked, x, context, ())[0], drawn, x_0)
        slope = jax.grad(lambda x_0: knowing.matching_loss(params, drawn, x_0, context).sum())(x_0)
        return [jnp.abs(x - teacher).mean(axis=(1, 2, 3)) for x in (x_0, x_0 - slope)]

    before, after = step(x_0)
    assert (after < before).all()


def test_the_matching_loss_moves_the_generator_alone(matching):
    made, params, drawn, *_ = matching
    gradient = jax.grad(lambda params: made.loss(params, drawn)[1]["metrics"]["loss/matching"])
    slopes = {
        name: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))
        for name, tree in jax.jit(gradient)(params).items()
    }
    assert slopes["mmdit"] > 1e-5 and slopes["critic"] == slopes["teacher"] == 0


def test_where_critic_and_teacher_say_the_same_there_is_nothing_to_match(matching):
    made, params, drawn, x_0, context = matching
    same = {**params, "critic": {"mmdit": params["teacher"]["mmdit"]}}
    np.testing.assert_allclose(jax.jit(made.matching_loss)(same, drawn, x_0, context), 0.0, atol=1e-8)


def test_the_critic_learns_at_the_times_and_with_the_weight_of_the_student(matching):
    _, params, drawn, *_ = matching
    settled = FlowSchedule(mean=-3.0, std=0.1, final_mean=3.0)
    made = recipe(critic_weight=1.0, adversarial_weight=0.0, timesteps=settled, loss_full_from=0.5)
    early, late = (jax.jit(made.draw)(params, greys(), jax.random.key(0), step)["critic_t"] for step in (0, 40))
    assert (early < 0.1).all() and (late > 0.9).all()
    at = {**drawn, "critic_t": jnp.full_like(early, 0.25)}
    even = recipe(critic_weight=1.0, adversarial_weight=0.0)
    weighed, plain = (jax.jit(m.critic_loss)(params["critic"], params, at)[0] for m in (made, even))
    np.testing.assert_allclose(weighed, plain / 4, rtol=1e-5)  # (0.25 / 0.5)^2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": dataclasses.replace(HEADS, channels=(16, 8))}, r"channels=\(16, 16\)"),
        ({"discriminator": dataclasses.replace(HEADS, taps=("mid", "block_00"))}, "unknown intermediate mid"),
        ({"sampling": dataclasses.replace(CONFIG.sampling, method="euler")}, "'renoise'"),
        ({"sampling": SamplingConfig(steps=4, method="renoise")}, r"guidance=3.0.*set it to 1"),
        ({"trunk": "teacher", "output_weight": 0.0}, "need a teacher"),
        (
            {"output_weight": 0.0, "teacher": dataclasses.replace(TEACHER, codec=CodecConfig(patch=2))},
            "on the student's latents",
        ),
        (
            {"critic_weight": 1.0, "teacher": dataclasses.replace(TEACHER, rollout_steps=4)},
            "rollout_steps=4.*set it to 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_two_players_and_the_running_means_resume_bit_for_bit(tmp_path):
    before = FlowMatching(FlowMatchingConfig(**STUDENT), "cpu")
    train_and_read(before, GREYS, tmp_path / "before", 1)
    run = str(tmp_path / "before")
    made = recipe(trunk_workdir=run, teacher=dataclasses.replace(TEACHER, workdir=run))
    straight, lines = train_and_read(made, GREYS, tmp_path / "straight", 4)
    train_and_read(made, GREYS, tmp_path / "stopped", 2)
    resumed, again = train_and_read(made, GREYS, tmp_path / "stopped", 4)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert lines == again and {"loss/adversarial", "loss/discriminator", "loss/output"} <= set(lines[-1])
    with pytest.raises(ConfigError, match="trunk_workdir"):
        recipe(teacher=made.config.teacher).load_frozen(None)
