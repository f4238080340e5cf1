"""The target of step distillation, against closed forms and against the formulas of the papers in z."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import expand_like, interpolate
from snapgen_jax.diffusion.schedules import FlowSchedule, Level, VPSchedule
from snapgen_jax.diffusion.step_target import mean_velocity, nested_grid, truncated_snr

FLOW, VP = FlowSchedule(), VPSchedule(spacing="trailing")
SHAPE = (3, 4, 4, 2)


def noise(seed):
    return jax.random.normal(jax.random.key(seed), SHAPE)


def in_step(schedule, steps, i, inner=2):
    """The levels inside step i of a student of so many steps, for three examples."""
    grid = nested_grid(schedule, steps, 1.0, inner)
    return [grid.at(jnp.int32(i * inner + k), SHAPE[0]) for k in range(inner + 1)]


def test_two_steps_of_a_linear_field_have_the_mean_velocity_of_their_product():
    a, levels = -0.7, in_step(FLOW, 4, 1)
    x = noise(0)
    h, k = (float(levels[i + 1].t[0] - levels[i].t[0]) for i in (0, 1))
    expected = x * (1 - (1 + h * a) * (1 + k * a)) / -(h + k)
    np.testing.assert_allclose(mean_velocity(lambda x, level: a * x, x, levels), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("inner", [1, 2, 4])
def test_a_field_that_is_the_same_everywhere_is_its_own_target(schedule, inner):
    v = noise(1)
    for i in (0, 3):
        found = mean_velocity(lambda x, level: v, noise(0), in_step(schedule, 4, i, inner))
        np.testing.assert_allclose(found, v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_a_student_that_meets_the_target_lands_where_the_teacher_does(schedule):
    def field(x, level):
        return jnp.sin(3 * x + expand_like(level.t, x))

    for i in range(4):
        levels = in_step(schedule, 4, i)
        x_t = noise(2)
        there = x_t
        for a, b in itertools.pairwise(levels):
            there = there + expand_like(b.t - a.t, x_t) * field(there, a)
        landed = x_t + expand_like(levels[-1].t - levels[0].t, x_t) * mean_velocity(field, x_t, levels)
        np.testing.assert_allclose(landed, there, atol=1e-5)


def native(level):
    """alpha and sigma `[B, 1, 1, 1]` in float64."""
    return (np.asarray(x, np.float64).reshape(-1, 1, 1, 1) for x in (level.alpha, level.sigma))


@pytest.mark.parametrize("i", [0, 2, 3], ids=["first", "third", "last"])
def test_with_v_prediction_it_is_the_target_that_snapfusion_writes_in_z(i):
    levels = in_step(VP, 4, i)
    weights = np.random.default_rng(0).normal(size=(2, 2)) / 2

    def network(z, level):  # v-prediction, which reads z and the native step
        return jnp.tanh(z @ jnp.asarray(weights, z.dtype) + expand_like(level.time, z) / 1000)

    def velocity(x, level):
        return VP.velocity(network(VP.network_input(x, level), level), x, level, "v")

    x_0, eps = noise(3), noise(4)
    x_t = interpolate(x_0, eps, levels[0].t)
    target = x_t - expand_like(levels[0].t, x_t) * mean_velocity(velocity, x_t, levels)

    # SnapFusion, eq. 7 and 8.
    (a, s), (a1, s1), (a2, s2) = (native(level) for level in levels)
    z = a * np.asarray(x_0, np.float64) + s * np.asarray(eps, np.float64)
    v = np.asarray(network(jnp.asarray(z, jnp.float32), levels[0]))
    z1 = a1 * (a * z - s * v) + s1 * (s * z + a * v)
    v1 = np.asarray(network(jnp.asarray(z1, jnp.float32), levels[1]))
    z2 = a2 * (a1 * z1 - s1 * v1) + s2 * (s1 * z1 + a1 * v1)
    np.testing.assert_allclose(target, (z2 - s2 / s * z) / (a2 - s2 / s * a), atol=2e-4)
    if i == 3:
        np.testing.assert_allclose(target, z2, atol=1e-5)  # the last step ends in the data
    # A student that predicts this data lands on z2 by a DDIM step.
    eps_hat = (z - a * np.asarray(target)) / s
    np.testing.assert_allclose(a2 * np.asarray(target) + s2 * eps_hat, z2, atol=1e-4)


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_the_weight_is_that_of_the_data_s_error(schedule):
    grid = Level(*(value[:-1] for value in schedule.grid(8)))
    snr = np.square(np.asarray(grid.alpha, np.float64) / grid.sigma)
    np.testing.assert_allclose(truncated_snr(grid), np.maximum(snr, 1) * np.square(grid.t, dtype=np.float64), rtol=1e-5)


def test_a_shifted_grid_of_the_teacher_holds_the_student_s():
    grid = nested_grid(FLOW, 8, 3.0, 2)
    np.testing.assert_allclose(grid.t[::2], FLOW.grid(8, 3.0).t, atol=1e-6)
    assert grid.t.shape == (17,)
    np.testing.assert_array_equal(nested_grid(VP, 7, 1.0, 2).time[::2], VP.grid(7).time)


def test_a_spacing_whose_steps_do_not_nest_is_refused():
    with pytest.raises(ValueError, match=r"set schedule.spacing to 'trailing'"):
        nested_grid(VPSchedule.preset("sd15"), 8, 1.0, 2)
