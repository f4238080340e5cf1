"""Step distillation as a recipe: what each player learns from, what stays frozen, and four calls for an image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import interpolate, velocity_from_x0, x0_from_velocity
from snapgen_jax.diffusion.schedules import FlowSchedule
from snapgen_jax.losses.adversarial import gradient_penalty
from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.networks.text import TextContext
from snapgen_jax.recipes.adversarial import Adversarial, AdversarialConfig
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, SamplingConfig
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from snapgen_jax.weights.frozen import load_run
from tests.recipes_for_tests import greys, random_like, state_away_from_zero, train_and_read
from tests.students_for_tests import CAPTIONS, GREYS, STUDENT, TEACHER

HEADS = DiscriminatorConfig.preset("smoke", taps=("block_00", "block_01"), channels=(16, 16), time_width=16)
CONFIG = AdversarialConfig(**STUDENT, teacher=TEACHER, discriminator=HEADS)


def recipe(**changes):
    return Adversarial(dataclasses.replace(CONFIG, **changes), "cpu")


@pytest.fixture(scope="module")
def playing():
    """The recipe, what is frozen, a state, drawn examples, and all networks by role."""
    made = recipe()
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    drawn = jax.jit(made.draw)(frozen, greys(), jax.random.key(3), 0)
    return made, frozen, state, drawn, made.current(state, frozen)


def test_it_fulfils_the_protocol():
    assert isinstance(recipe(), Recipe)


def test_the_networks_have_roles_of_their_own_and_lie_beside_no_player_and_no_running_mean():
    made = recipe(critic_weight=1.0)
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    networks, roles = made.current(state, frozen), {"teacher/mmdit", "trunk/mmdit"}
    assert set(frozen) == roles and set(state.extra) == {"means"}
    assert set(networks) == {"mmdit", "text", "discriminator", "critic/mmdit"} | roles == set(made.networks())
    for role, tree in (
        ("mmdit", state.players["model"].params["mmdit"]),
        ("discriminator", state.players["discriminator"].params),
        ("critic/mmdit", state.players["critic"].params["mmdit"]),
        ("trunk/mmdit", frozen["trunk/mmdit"]),
    ):
        assert networks[role] is tree, role
    assert set(made.weights({"model": state.players["model"].params}, {})) == {"mmdit", "text"}, "to draw an image"
    assert made.trains == {
        "model": ("mmdit", "text"),
        "discriminator": ("discriminator",),
        "critic": ("critic/mmdit",),
    }


def test_it_trains_at_the_times_of_sampling_and_judges_at_less_noise(playing):
    made, frozen, *_ = playing
    drawn = [jax.jit(made.draw)(frozen, greys(), jax.random.key(i), 0) for i in range(20)]
    t, s = (
        np.concatenate(values) for values in zip(*((d["level"].t, d["discriminator"]["s"]) for d in drawn), strict=True)
    )
    np.testing.assert_allclose(np.unique(t), sorted([1.0, 0.9, 0.75, 0.5]))  # quarters, shifted by 3
    assert (s < t).all() and (s > 0).all()


def test_the_adversarial_loss_reaches_the_generator_and_no_loss_what_is_frozen(playing):
    made, _, state, drawn, networks = playing

    def losses(networks):
        total, aux = made.loss(networks, drawn, state.extra)
        return jnp.stack([aux["metrics"]["loss/adversarial"], total])

    slopes = jax.jit(jax.jacrev(losses))(networks)
    assert max(float(jnp.abs(g[0]).max()) for g in jax.tree.leaves(slopes["mmdit"])) > 1e-5
    for role in ("trunk/mmdit", "teacher/mmdit"):
        assert all(not np.any(g) for g in jax.tree.leaves(slopes[role])), role


def discriminator_loss(made, networks, drawn):
    """Of what the generator makes of the drawn examples."""
    return made.opponents["discriminator"].loss(networks, drawn, *made.generated(networks, drawn))


def test_the_discriminators_loss_reaches_every_head_and_neither_generator_nor_trunk(playing):
    made, _, _, drawn, networks = playing
    slopes = jax.jit(jax.grad(lambda networks: discriminator_loss(made, networks, drawn)[0]))(networks)
    assert all(np.any(g) for g in jax.tree.leaves(slopes.pop("discriminator")))
    assert set(slopes) == {"mmdit", "text", "teacher/mmdit", "trunk/mmdit"}
    assert all(not np.any(g) for g in jax.tree.leaves(slopes))


def test_the_penalty_is_the_squared_gradient_of_the_sum_over_cells_and_moves_the_heads(playing):
    made, _, _, drawn, networks = playing

    @jax.jit
    def by_cells():
        """As in the formula: the logits of every cell by every feature, one example and one tap after the other."""
        context = made.inputs.condition(networks, drawn["condition"])
        look, heads = drawn["discriminator"], made.opponents["discriminator"]
        features = heads.features(
            networks, interpolate(drawn["x_0"], look["real_eps"], look["s"]), look["s"], context, drawn
        )
        jacobians = jax.jacrev(lambda features: heads.judge(networks, features, look["s"], context))(features)
        squares = [
            jnp.square(jacobians[tap][tap][i, :, :, i].sum(axis=(0, 1))).sum()
            for tap in features
            for i in range(len(look["s"]))
        ]
        return sum(squares) / len(squares)

    @jax.jit
    @jax.value_and_grad
    def penalty(heads):
        return discriminator_loss(made, {**networks, "discriminator": heads}, drawn)[1]["penalty"]

    value, slope = penalty(networks["discriminator"])
    np.testing.assert_allclose(value, by_cells(), rtol=1e-4)
    weighted = jax.tree.map(lambda g: made.config.penalty_weight * float(jnp.abs(g).max()), slope)
    assert max(jax.tree.leaves(weighted)) > 1e-6
    assert sum(w > 0 for w in jax.tree.leaves(weighted)) > len(jax.tree.leaves(weighted)) / 2


def test_the_penalty_does_not_shrink_when_the_grid_grows(playing):
    made, _, _, drawn, networks = playing
    pooled = jnp.ones((2, HEADS.pooled_width))
    context = TextContext(jnp.zeros((2, 1, 1)), jnp.ones((2, 1)), pooled)
    small = {tap: jax.random.normal(jax.random.key(i), (2, 4, 4, 16)) for i, tap in enumerate(HEADS.taps)}
    large = jax.tree.map(lambda x: jnp.tile(x, (1, 3, 3, 1)), small)
    heads, s = made.opponents["discriminator"], drawn["discriminator"]["s"][:2]
    few, many = (gradient_penalty(lambda maps: heads.judge(networks, maps, s, context), x) for x in (small, large))
    assert (many > 5 * few).all()  # nine times the cells, and fewer of them at the border


def test_without_its_weight_the_penalty_is_left_out_bit_for_bit(playing):
    made, _, _, drawn, networks = playing
    bare = recipe(penalty_weight=0.0)
    hinge = jax.grad(lambda networks: discriminator_loss(made, networks, drawn)[1]["loss/discriminator"])
    whole = jax.grad(lambda networks: discriminator_loss(bare, networks, drawn)[0])
    slopes = (jax.jit(gradient)(networks)["discriminator"] for gradient in (hinge, whole))
    jax.tree.map(np.testing.assert_array_equal, *slopes)


def test_the_parts_of_the_step_are_the_steps_of_the_two_players(playing):
    made, frozen, state, *_ = playing
    others = frozen, greys(), jax.random.key(5)
    whole, _ = jax.jit(made.update)(state, *others)
    judge, _ = jax.jit(made.parts()["discriminator"])(state, *others)
    after = state.replace(players={**state.players, "discriminator": judge})
    generator, _ = jax.jit(made.parts()["generator"])(after, *others)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole.players,
        {"model": generator, "discriminator": judge},
    )
    assert "discriminator" not in recipe(adversarial_weight=0.0).parts()


def test_another_prompt_changes_the_verdict(playing):
    made, _, _, drawn, networks = playing

    @jax.jit
    def verdict(drawn):
        context = made.inputs.condition(networks, drawn["condition"])
        heads, s = made.opponents["discriminator"], drawn["discriminator"]["s"]
        return heads.judge(networks, heads.features(networks, drawn["x_0"], s, context, drawn), s, context)

    rolled = {**drawn, "condition": jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), drawn["condition"])}
    for before, after in zip(*(jax.tree.leaves(verdict(d)) for d in (drawn, rolled)), strict=True):
        assert float(jnp.abs(before - after).max()) > 1e-3


def test_without_adversary_it_is_distillation_at_the_few_times_bit_for_bit(playing):
    _, _, state, drawn, networks = playing
    fields = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(DistillationConfig)}
    plain = Distillation(DistillationConfig(**fields), "cpu")
    bare = recipe(adversarial_weight=0.0)
    assert set(bare.frozen_spec()) == {"teacher/mmdit"}
    networks = {role: networks[role] for role in bare.networks()}
    one, other = (jax.jit(made.loss)(networks, drawn, state.extra)[0] for made in (plain, bare))
    assert one == other
    assert set(jax.eval_shape(bare.init, key(0, 0, "init")).players) == {"model"}


def test_the_generator_is_called_four_times_for_an_image(playing):
    made, _, state, *_ = playing
    calls = []

    class Counting(Denoiser):
        def __call__(self, params, x_t, level, context, **options):
            jax.debug.callback(lambda t: calls.append(np.asarray(t)), level.t)
            return super().__call__(params, x_t, level, context, **options)

    counting = recipe()
    counting.denoiser = Counting(made.denoiser.network)
    conditions = {name: greys()[name][:2] for name in ("tokens", "mask")}
    params, keys = {"model": state.players["model"].params}, example_keys(0, jnp.arange(2))
    image = jax.jit(functools.partial(counting.generate, options=counting.options))(params, {}, conditions, keys)
    jax.effects_barrier()
    assert [t.tolist() for t in calls] == [pytest.approx([t, t]) for t in (1.0, 0.9, 0.75, 0.5)]
    assert image["image"].shape == (2, 8, 8, 3) and image["noise"].shape == (2, 4, 4, 4, 12)


def test_the_validation_loss_is_the_error_of_one_jump_from_each_of_the_few_times(playing):
    made, frozen, state, _, networks = playing
    key = jax.random.key(7)
    losses = jax.jit(made.validation_loss)({"model": state.players["model"].params}, frozen, greys(), key)
    assert set(losses) == {"mean", "t=1.00", "t=0.90", "t=0.75", "t=0.50"}

    @jax.jit
    def at(t):
        x_0, t = made.inputs.clean(networks, greys()), jnp.full(8, t)
        x_t = interpolate(x_0, jax.random.normal(key, x_0.shape), t)
        v, _ = made.denoiser(networks["mmdit"], x_t, t, made.inputs.condition(networks, greys()))
        return jnp.square(x0_from_velocity(x_t, v, t) - x_0).mean(axis=(1, 2, 3))

    errors = [at(t) for t in made.levels.t]
    for error, t in zip(errors, ("1.00", "0.90", "0.75", "0.50"), strict=True):
        np.testing.assert_allclose(losses[f"t={t}"], error, rtol=1e-4)
    np.testing.assert_allclose(losses["mean"], sum(errors) / 4, rtol=1e-4)


def test_the_critic_follows_what_is_generated_and_pulls_it_to_the_teacher():
    made = recipe(critic_weight=1.0, adversarial_weight=0.0)
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    new, metrics = jax.jit(make_step(made, 0))(state, frozen, greys())
    assert bool(metrics["finite"]) and float(metrics["loss/critic"]) > 0 and float(metrics["loss/matching"]) > 0
    before, after = (jax.tree.leaves(s.players["critic"].params) for s in (state, new))
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def matching():
    """The recipe with a critic, the networks by role, drawn examples, generated ones, and what they were told."""
    made = recipe(critic_weight=1.0, adversarial_weight=0.0)
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    networks = made.current(state, frozen)
    drawn = jax.jit(made.draw)(frozen, greys(), jax.random.key(0), 0)
    return made, state.extra, networks, drawn, *jax.jit(made.generated)(networks, drawn)


def data_end(predict, drawn, x_0):
    """The data that a network sees behind a noisy x_0."""
    level = drawn["critic"]["level"]
    x_t = interpolate(x_0, drawn["critic"]["eps"], level.t)
    return x0_from_velocity(x_t, predict(x_t, level), level.t)


def teachers_end(made, networks, drawn, x_0, context):
    """That of the teacher."""

    def predict(x_t, level):
        return made.teacher.ask(networks, drawn["teacher"], x_t, level, context)[0]

    return data_end(predict, drawn, x_0)


def test_the_gradient_by_what_is_generated_is_critic_less_teacher_over_the_teachers_distance(matching):
    made, _, networks, drawn, x_0, context = matching

    @jax.jit
    def by_hand(x_0):
        critic = data_end(lambda x, t: made.denoiser(networks["critic/mmdit"], x, t, context)[0], drawn, x_0)
        teacher = teachers_end(made, networks, drawn, x_0, context)
        scale = jnp.abs(x_0 - teacher).mean(axis=(1, 2, 3), keepdims=True)
        return (critic - teacher) / (scale * x_0[0].size)

    slope = jax.jit(jax.grad(lambda x_0: made.opponents["critic"].generator_loss(networks, drawn, x_0, context).sum()))(
        x_0
    )
    assert float(jnp.abs(slope).max()) > 1e-4
    np.testing.assert_allclose(slope, by_hand(x_0), rtol=1e-3, atol=1e-7)


def test_beside_a_critic_that_knows_what_is_generated_a_step_goes_towards_the_teacher(matching):
    made, _, networks, drawn, x_0, context = matching
    knowing = Adversarial(made.config, "cpu").opponents["critic"]
    knowing.denoiser = lambda params, x_t, level, context: (velocity_from_x0(x_t, x_0, level.t), {})

    @jax.jit
    def step(x_0):
        teacher = teachers_end(made, networks, drawn, x_0, context)
        slope = jax.grad(lambda x_0: knowing.generator_loss(networks, drawn, x_0, context).sum())(x_0)
        return [jnp.abs(x - teacher).mean(axis=(1, 2, 3)) for x in (x_0, x_0 - slope)]

    before, after = step(x_0)
    assert (after < before).all()


def test_the_matching_loss_moves_the_generator_alone(matching):
    made, extra, networks, drawn, *_ = matching
    gradient = jax.grad(lambda networks: made.loss(networks, drawn, extra)[1]["metrics"]["loss/matching"])
    slopes = {
        role: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))
        for role, tree in jax.jit(gradient)(networks).items()
    }
    assert slopes["mmdit"] > 1e-5 and slopes["critic/mmdit"] == slopes["teacher/mmdit"] == 0


def test_where_the_velocities_of_critic_and_teacher_are_equal_there_is_nothing_to_match(matching):
    made, _, networks, drawn, x_0, context = matching
    same = {**networks, "critic/mmdit": networks["teacher/mmdit"]}
    np.testing.assert_allclose(
        jax.jit(made.opponents["critic"].generator_loss)(same, drawn, x_0, context), 0.0, atol=1e-8
    )


def test_the_critic_learns_at_the_times_and_with_the_weight_of_the_student(matching):
    _, _, networks, drawn, x_0, context = matching
    settled = FlowSchedule(mean=-3.0, std=0.1, final_mean=3.0)
    made = recipe(critic_weight=1.0, adversarial_weight=0.0, schedule=settled, loss_full_from=0.5)
    early, late = (
        jax.jit(made.draw)(networks, greys(), jax.random.key(0), step)["critic"]["level"].t for step in (0, 40)
    )
    assert (early < 0.1).all() and (late > 0.9).all()
    at = {**drawn, "critic": {**drawn["critic"], "level": settled.level(jnp.full_like(early, 0.25))}}
    even = recipe(critic_weight=1.0, adversarial_weight=0.0)
    weighed, plain = (jax.jit(m.opponents["critic"].loss)(networks, at, x_0, context)[0] for m in (made, even))
    np.testing.assert_allclose(weighed, plain / 4, rtol=1e-5)  # (0.25 / 0.5)^2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": dataclasses.replace(HEADS, channels=(16, 8))}, r"channels=\(16, 16\)"),
        ({"discriminator": dataclasses.replace(HEADS, taps=("mid", "block_00"))}, "unknown intermediate mid"),
        ({"sampling": dataclasses.replace(CONFIG.sampling, method="euler")}, "'renoise'"),
        ({"sampling": SamplingConfig(steps=4, method="renoise")}, r"guidance=3.0.*set it to 1"),
        (
            {"output_weight": 0.0, "teacher": dataclasses.replace(TEACHER, inputs=CAPTIONS, takes=("latent",))},
            "on the student's latents",
        ),
        (
            {"critic_weight": 1.0, "teacher": dataclasses.replace(TEACHER, rollout_steps=4)},
            "rollout_steps=4.*set score_teacher to one with rollout_steps=1",
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


def test_the_trunk_is_the_run_that_it_starts_from_unless_another_is_named(tmp_path):
    before = FlowMatching(FlowMatchingConfig(**STUDENT), "cpu")
    runs = {}
    for steps, name in ((1, "start"), (2, "other")):
        train_and_read(before, GREYS, tmp_path / name, steps)
        spec = {"mmdit": recipe().frozen_spec()["trunk/mmdit"]}
        runs[name] = str(tmp_path / name), load_run(tmp_path / name, spec)["mmdit"]
    (start, weights), (other, others) = runs["start"], runs["other"]
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(others), strict=True))
    teacher = dataclasses.replace(TEACHER, workdir=start)
    for named, expected in (("", weights), (other, others)):
        frozen = recipe(teacher=teacher, init_from=start, trunk_workdir=named).load_frozen(None)
        assert set(frozen) == {"teacher/mmdit", "trunk/mmdit"}
        jax.tree.map(np.testing.assert_array_equal, frozen["trunk/mmdit"], expected)


def test_neither_teacher_nor_trunk_is_read_to_draw_an_image():
    nowhere = recipe(trunk_workdir="nowhere", teacher=dataclasses.replace(TEACHER, workdir="nowhere"))
    assert nowhere.load_frozen(None, "generate") == {}
    with pytest.raises(ConfigError, match="nowhere"):
        nowhere.load_frozen(None)
