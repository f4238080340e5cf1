"""Own samples: a generator is trained where its own sampling leads, and how much it is off there is measured."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.schedules import FlowSchedule, VPSchedule
from snapgen_jax.losses.distillation import ScalingConfig
from snapgen_jax.recipes._sampling import SamplingConfig, own_states, sample_flow
from snapgen_jax.recipes.adversarial import Adversarial, AdversarialConfig
from snapgen_jax.training.exits import ConfigError
from tests.recipes_for_tests import greys, random_like, state_away_from_zero
from tests.students_for_tests import MMDIT, STUDENT, TEACHER

RENOISE = SamplingConfig(steps=4, guidance=1.0, method="renoise", shift=3.0)
SMALL = dataclasses.replace(MMDIT, depth=1)
CONFIG = AdversarialConfig(
    **{**STUDENT, "network": SMALL},
    teacher=dataclasses.replace(TEACHER, network=SMALL),
    sampling=RENOISE,
    adversarial_weight=0.0,
    own_samples=1.0,
    scaling=ScalingConfig(alpha="constant", constant=0.5, ratio="none"),
)


def recipe(**changes):
    return Adversarial(dataclasses.replace(CONFIG, **changes), "cpu")


def noise_of(made, size=8):
    return jax.random.normal(jax.random.key(5), (size, len(made.levels.t), 4, 4, 12))


class Linear:
    """A denoiser whose jump is known: `v = a x_t`, so that `x0^ = (1 - a t) x_t`."""

    def __init__(self, a, calls=None):
        self.a, self.calls = a, calls

    def __call__(self, params, x_t, level, context, taps=()):
        if self.calls is not None:
            jax.debug.callback(lambda t: self.calls.append(np.asarray(t)), level.t)
        return self.a * x_t, {}


def by_hand(noise, a, times):
    """The states of sampling with that jump: `x_s = (1 - s) (1 - a t) x_t + s eps`."""
    states = [np.asarray(noise[:, 0], np.float64)]
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        states.append((1 - s) * (1 - a * t) * states[-1] + s * np.asarray(noise[:, i + 1], np.float64))
    return np.stack(states)


@pytest.fixture(scope="module")
def playing():
    """The recipe with linear networks, its networks by role, and drawn examples."""
    made = recipe()
    networks = made.current(state_away_from_zero(made), random_like(made.frozen_spec()))
    return made, networks, jax.jit(made.draw)(networks, greys(), jax.random.key(2))


def test_they_are_the_states_of_sampling_with_a_known_jump_one_call_less_than_there_are_times(playing):
    made, networks, _ = playing
    calls, noise = [], noise_of(made)
    linear = recipe()
    linear.denoiser = Linear(0.7, calls)
    states = jax.jit(lambda noise: linear.own_states(networks, noise, None))(noise)
    jax.effects_barrier()
    np.testing.assert_allclose(states, by_hand(noise, 0.7, [1.0, 0.9, 0.75, 0.5]), rtol=1e-4, atol=1e-5)
    assert [t.tolist() for t in calls] == [pytest.approx([t] * 8) for t in (1.0, 0.9, 0.75)]


@pytest.mark.parametrize("schedule", [FlowSchedule(), VPSchedule.preset("sd15")], ids=["flow", "vp"])
def test_sampling_from_the_same_noise_passes_through_them(schedule):
    options = dataclasses.replace(RENOISE, shift=1.0)
    grid, noise = schedule.grid(4), jax.random.normal(jax.random.key(0), (3, 4, 5))
    seen = []

    def denoise(x_t, level, i, carry, condition):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_t)
        return jnp.sin(x_t) * level.alpha[:, None], carry

    sample_flow(denoise, schedule, noise, None, None, options)
    jax.effects_barrier()
    states = own_states(lambda x_t, level: jnp.sin(x_t) * level.alpha[:, None], schedule, grid, noise)
    np.testing.assert_allclose(states, np.stack(seen), rtol=1e-5, atol=1e-6)


def test_the_generator_begins_there_at_its_share_and_on_the_path_elsewhere(playing):
    _, networks, drawn = playing
    drawn = {**drawn, "own": jnp.arange(8) % 2 == 0}
    linear = recipe(own_samples=0.5)
    linear.denoiser = Linear(0.7)
    x_t = linear.start(networks, drawn, None)
    t = np.asarray(drawn["level"].t)[:, None, None, None]
    on_path = (1 - t) * drawn["x_0"] + t * drawn["eps"]
    own = by_hand(drawn["own_noise"], 0.7, [1.0, 0.9, 0.75, 0.5])[drawn["which"], np.arange(8)]
    expected = np.where(np.asarray(drawn["own"])[:, None, None, None], own, on_path)
    np.testing.assert_allclose(x_t, expected, rtol=1e-4, atol=1e-5)
    many = jax.eval_shape(lambda key: linear.draw_turn(key, (8, 4, 4, 12)), jax.random.key(0))
    assert many["own_noise"].shape == (8, 4, 4, 4, 12)
    share = linear.draw_turn(jax.random.key(0), (4000, 1))["own"].mean()
    assert abs(float(share) - 0.5) < 0.03


def test_no_gradient_passes_through_the_steps_before(playing):
    made, networks, drawn = playing

    def reaches(networks):
        return made.start(networks, drawn, made.inputs.condition(networks, drawn["condition"])).sum()

    assert all(not np.any(g) for g in jax.tree.leaves(jax.jit(jax.grad(reaches))(networks)))


def test_no_data_belong_to_them(playing):
    made, networks, drawn = playing
    half = {**drawn, "own": jnp.arange(8) < 4}
    point, _ = jax.jit(made.predict)(networks, half)
    loss = made.task_loss(half, point)
    assert not loss[:4].any() and (loss[4:] > 0).all()
    assert "own_noise" not in jax.eval_shape(recipe(own_samples=0.0).draw, networks, greys(), jax.random.key(0))


def test_the_exposure_gap_of_a_known_jump_is_measured_at_each_time(playing):
    """With v = a x of the generator and v = b x of the teacher their jumps are t |a - b| |x_t| apart."""
    made, networks, _ = playing
    linear = recipe()
    linear.denoiser, linear.teacher.denoiser = Linear(0.7), Linear(0.2)
    params = {"model": {role: networks[role] for role in made.trains["model"]}}
    frozen, key = {"teacher/mmdit": networks["teacher/mmdit"]}, jax.random.key(11)
    found = jax.jit(linear.exposure)(params, frozen, greys(), key)
    times = [1.0, 0.9, 0.75, 0.5]
    assert set(found) == {f"{kind}/t={t:.2f}" for kind in ("noised", "own") for t in times}
    x_0 = np.asarray(made.inputs.clean(networks, greys()))
    noise = np.asarray(jax.random.normal(key, (8, 4, *x_0.shape[1:])))
    for i, (t, own) in enumerate(zip(times, by_hand(noise, 0.7, times), strict=True)):
        for kind, x_t in (("noised", (1 - t) * x_0 + t * noise[:, i]), ("own", own)):
            expected = np.square(t * 0.5 * x_t).mean(axis=(1, 2, 3))
            np.testing.assert_allclose(found[f"{kind}/t={t:.2f}"], expected, rtol=1e-3)
    with pytest.raises(ConfigError, match="there is none; set output_weight"):
        recipe(output_weight=0.0).exposure(params, {}, greys(), key)
