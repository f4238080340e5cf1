"""Step distillation as a recipe: guidance on both sides, what weighs what, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.schedules import VPSchedule
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes.flow_matching import Point
from snapgen_jax.recipes.step_distillation import StepDistillation, StepDistillationConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step
from tests.recipes_for_tests import greys, random_like, state_away_from_zero
from tests.students_for_tests import MMDIT, STUDENT, TEACHER

NETWORK = dataclasses.replace(MMDIT, depth=1)
CONFIG = StepDistillationConfig(
    **{**STUDENT, "network": NETWORK},
    sampling=SamplingConfig(steps=4, guidance=2.0, shift=3.0),
    teacher=dataclasses.replace(TEACHER, network=NETWORK),
    guidance_range=(2.0, 5.0),
)


def recipe(**changes):
    return StepDistillation(dataclasses.replace(CONFIG, **changes), "cpu")


RECIPE = recipe()
FROZEN = random_like(RECIPE.frozen_spec())
STATE = state_away_from_zero(RECIPE)
PARAMS = STATE.players["model"].params
NETWORKS = {**FROZEN, **PARAMS}


@pytest.fixture(scope="module")
def drawn():
    """What an update draws, with every example's condition kept."""
    found = jax.jit(RECIPE.draw)(NETWORKS, greys(), jax.random.key(3), 0)
    return {**found, "condition": RECIPE.inputs.draw_condition(NETWORKS, greys(), jax.random.key(0), {})}


def test_it_fulfils_the_protocol_and_never_trains_the_teacher():
    assert isinstance(RECIPE, Recipe)
    assert RECIPE.trains == {"model": ("mmdit", "text")} and set(FROZEN) == {"teacher/mmdit"}


def test_it_learns_at_the_times_of_its_own_sampling(drawn):
    own = RECIPE.config.schedule.grid(4, 3.0).t[:-1]
    np.testing.assert_allclose(drawn["level"].t, own[np.asarray(drawn["step"])], atol=1e-6)
    assert len(set(drawn["step"].tolist())) > 1 and set(drawn["step"].tolist()) <= {0, 1, 2, 3}


def test_the_coin_is_one_for_all_examples_and_has_its_probability():
    draw = jax.jit(recipe(guided_share=0.3).draw)
    found = [draw(NETWORKS, greys(), jax.random.key(i), 0) for i in range(60)]
    assert all(len(set(one["guided"].tolist())) == 1 for one in found)
    assert 0.1 < np.mean([one["guided"] for one in found]) < 0.5
    scales = np.stack([one["guidance"] for one in found])
    assert scales.min() >= 2 and scales.max() <= 5 and scales.std() > 0.5


def test_at_a_scale_of_one_the_guided_loss_is_the_other_bit_for_bit(drawn):
    def distance(networks, drawn, guidance=None):
        return RECIPE.distance(networks, drawn, RECIPE.predict(networks, drawn)[0], guidance)

    guided, plain = jax.jit(distance), jax.jit(distance)(NETWORKS, drawn)
    np.testing.assert_array_equal(guided(NETWORKS, drawn, jnp.ones(8)), plain)
    assert np.abs(guided(NETWORKS, drawn, jnp.full(8, 3.0)) - plain).min() > 0


@pytest.mark.parametrize("own", [1.0, 2.5], ids=["plain", "guided teacher"])
def test_a_coin_in_the_step_gives_either_loss_and_its_gradient(drawn, own):
    made = recipe(teacher=dataclasses.replace(CONFIG.teacher, guidance=own))
    scales = jnp.full(8, 3.0)

    def loss(networks, drawn, guidance=None, is_guided=None):
        return jnp.mean(made.distance(networks, drawn, made.predict(networks, drawn)[0], guidance, is_guided))

    both = jax.jit(jax.value_and_grad(loss))
    for coin, asked in ((True, scales), (False, None)):
        found, expected = both(NETWORKS, drawn, scales, jnp.bool_(coin)), both(NETWORKS, drawn, asked)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, expected)


def test_the_teacher_s_program_is_there_once_however_many_steps_it_takes(drawn):
    def program(steps):
        made = recipe(teacher_steps=steps, guided_share=0.5)
        one = jax.eval_shape(made.draw, NETWORKS, greys(), jax.random.key(0), 0)
        return str(jax.make_jaxpr(lambda n, d: made.loss(n, d, {})[0])(NETWORKS, one)).count("conv_general_dilated")

    assert program(2) == program(4) > 0


def test_guidance_has_a_gradient_by_what_the_student_is_told_of_nothing(drawn):
    made, empty = recipe(), RECIPE.inputs.null_condition(NETWORKS)

    def loss(sequence, guidance):
        made.inputs.null_condition = lambda networks: dataclasses.replace(empty, sequence=sequence)
        return jnp.mean(made.distance(NETWORKS, drawn, made.predict(NETWORKS, drawn)[0], guidance))

    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_array_equal(gradient(empty.sequence, jnp.ones(8)), 0.0)
    assert np.abs(gradient(empty.sequence, jnp.full(8, 3.0))).max() > 1e-6


def test_the_other_loss_is_brought_to_the_same_size_and_then_weighted(drawn):
    """Of two terms that are parameters themselves, the gradient says what each counts."""
    point = Point(drawn["x_0"], drawn["eps"], None)

    def terms(**changes):
        made = recipe(guided_share=0.0, **changes)
        made.predict = lambda networks, drawn: (point, {})
        made.distance = lambda networks, drawn, point, guidance: networks["distilled"]
        made.task_loss = lambda drawn, point: made.original
        made.time_weight = lambda level: 1.0

        def loss(networks):
            made.original = networks["original"]
            return made.loss(networks, drawn, {})[0]

        return jax.value_and_grad(loss)({"distilled": jnp.full(8, 6.0), "original": jnp.full(8, 0.5)})

    for changes, value, weight in (
        ({}, 6 * 1.2, 0.2 * 12),
        ({"original_weight": 0.0}, 6.0, 0.0),
        ({"original_weight": 1.0, "original_scale": "constant"}, 6.5, 1.0),
    ):
        loss, grads = terms(**changes)
        np.testing.assert_allclose(loss, value, rtol=1e-6)
        np.testing.assert_allclose(grads["distilled"], 1 / 8)
        np.testing.assert_allclose(grads["original"], weight / 8, rtol=1e-6)


def test_an_update_is_guided_or_not_by_the_coin_and_the_loss_says_which():
    step, state, losses = jax.jit(make_step(recipe(guided_share=0.5), 0)), STATE, {}
    for _ in range(8):
        state, metrics = step(state, FROZEN, greys())
        assert bool(metrics["finite"])
        np.testing.assert_allclose(metrics["loss"], 1.2 * metrics["loss/distillation"], rtol=1e-5)
        losses.setdefault(float(metrics["guided"]), []).append(float(metrics["loss/distillation"]))
    assert set(losses) == {0.0, 1.0} and np.mean(losses[1.0]) > np.mean(losses[0.0])


def test_under_a_discrete_schedule_the_teacher_s_steps_are_native_ones():
    made = recipe(
        schedule=VPSchedule(spacing="trailing"),
        prediction="v",
        sampling=SamplingConfig(steps=4),
        teacher=dataclasses.replace(CONFIG.teacher, schedule=VPSchedule(spacing="trailing"), prediction="v"),
    )
    assert made.grid.time.tolist() == [999, 874, 749, 624, 499, 374, 249, 124, 0]
    steps = made._levels(jnp.array([0, 3]))
    assert [level.time.tolist() for level in steps] == [[999, 249], [874, 124], [749, 0]]
    np.testing.assert_array_equal(steps[-1].t[1], 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_range": (5.0, 2.0)}, r"guidance_range=\(5.0, 2.0\); give \(low, high\) with low <= high"),
        ({"guided_share": 1.5}, "guided_share is 1.5"),
        ({"sampling": SamplingConfig(steps=4, method="heun")}, "leave times out, and set method='euler'"),
        ({"teacher": dataclasses.replace(CONFIG.teacher, rollout_steps=4)}, "leave rollout_steps out"),
        (
            {
                "schedule": VPSchedule(),
                "prediction": "v",
                "sampling": SamplingConfig(steps=4),
                "teacher": dataclasses.replace(CONFIG.teacher, schedule=VPSchedule(), prediction="v"),
            },
            "sampling.steps=4, teacher_steps=2: .* set schedule.spacing to 'trailing'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_a_teacher_that_was_distilled_for_other_steps_is_refused(tmp_path):
    run = {"recipe": "step_distillation", "prediction": "velocity", "sampling": {"steps": 16, "shift": 3.0}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    made = recipe(teacher=dataclasses.replace(CONFIG.teacher, workdir=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"would be asked at the times of {'steps': 8, 'shift': 3.0}"):
        made.load_frozen(None)
