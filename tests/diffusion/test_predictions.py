"""What a network predicts: definitions, round trips, both ends of the path, and losses written out in native form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import T_MIN, expand_like, interpolate, velocity_from_x0
from snapgen_jax.diffusion.schedules import EDMSchedule, FlowSchedule, VPSchedule

SCHEDULES = {
    "flow": FlowSchedule(),
    "sd15": VPSchedule(),
    "zero_snr": VPSchedule.preset("zero_snr"),
    "dit": VPSchedule.preset("dit"),
    "edm": EDMSchedule(),
    "svd": EDMSchedule.preset("svd"),
}
CASES = [
    (name, prediction)
    for name, schedule in SCHEDULES.items()
    for prediction in schedule.predictions
    if (name, prediction) != ("zero_snr", "eps")
]


def native(schedule, prediction, x_0, eps, level):
    """The published definition of a prediction, in terms of the data, the noise and z."""
    a, s = expand_like(level.alpha, x_0), expand_like(level.sigma, x_0)
    match prediction:
        case "velocity":
            return eps - x_0
        case "x_0":
            return x_0
        case "eps":
            return eps
        case "v":
            return (a * eps - s * x_0) / jnp.sqrt(a**2 + s**2)
        case "F":  # Karras et al. 2022, eq. 8 and table 1
            d = schedule.sigma_data
            c_skip, c_out = d**2 / (s**2 + d**2), s * d / jnp.sqrt(s**2 + d**2)
            return (x_0 - c_skip * (x_0 + s * eps)) / c_out


def draws(schedule, low=0.0, high=1.0):
    """Data, noise and training levels with t between two bounds."""
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 32, 4, 3))
    level = schedule.draw(jax.random.key(1), (4096,))
    inside = np.flatnonzero((np.asarray(level.t) > low) & (np.asarray(level.t) < high))[:32]
    return x_0, eps, level.at(jnp.asarray(inside))


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_output_defined_by_the_paper_stands_for_the_velocity_and_back(name, prediction):
    schedule = SCHEDULES[name]
    x_0, eps, level = draws(schedule, 0.05, 0.95)
    x_t, v = interpolate(x_0, eps, level.t), eps - x_0
    output = native(schedule, prediction, x_0, eps, level)
    np.testing.assert_allclose(schedule.velocity(output, x_t, level, prediction), v, atol=5e-5)
    np.testing.assert_allclose(schedule.output(v, x_t, level, prediction), output, atol=5e-5)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_every_level_of_training_and_sampling_gives_a_finite_velocity_and_round_trips(name, prediction):
    schedule = SCHEDULES[name]
    for level in (schedule.grid(20).at(jnp.arange(21)), schedule.level(jnp.array([0.0, 1.0]))):
        x_t, output = jax.random.normal(jax.random.key(0), (2, len(level.t), 4))
        v = schedule.velocity(output, x_t, level, prediction)
        assert np.isfinite(v).all()
        assert np.isfinite(schedule.loss_weight(level, prediction)).all()
    # Away from the ends of a flow, where bounds act, the two conversions are inverse to each other.
    grid = schedule.grid(20).at(jnp.arange(1, 20))
    x_t, output = jax.random.normal(jax.random.key(1), (2, 19, 4))
    back = schedule.output(schedule.velocity(output, x_t, grid, prediction), x_t, grid, prediction)
    np.testing.assert_allclose(back, output, atol=2e-4)


def test_a_predicted_image_under_the_flow_becomes_velocity_with_the_bound_at_small_times():
    x_t, x_0 = jax.random.normal(jax.random.key(0), (2, 5, 3, 3, 2))
    t = jnp.array([0.0, 0.01, T_MIN, 0.5, 1.0])
    v = FlowSchedule().velocity(x_0, x_t, FlowSchedule().level(t), "x_0")
    np.testing.assert_array_equal(v, velocity_from_x0(x_t, x_0, t))
    np.testing.assert_array_equal(FlowSchedule().velocity(x_0, x_t, FlowSchedule().level(t), "velocity"), x_0)


def test_the_ideal_network_of_stable_video_diffusion_gives_back_the_data():
    # D = c_skip z + c_out F with c_skip = 1 / (s^2 + 1) and c_out = -s / sqrt(s^2 + 1): its F is our "v".
    schedule = EDMSchedule.preset("svd")
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4))
    sigma = jnp.array([0.002, 2.27, 700.0])
    level = schedule.level(np.asarray(sigma, np.float64) / (1 + np.asarray(sigma, np.float64)))._replace(sigma=sigma)
    s = sigma[:, None]
    ideal = (eps - s * x_0) / jnp.sqrt(s**2 + 1)
    v = schedule.velocity(ideal, (x_0 + s * eps) / (1 + s), level, "v")
    np.testing.assert_allclose(v, eps - x_0, atol=2e-4)
    np.testing.assert_allclose(schedule.velocity(-ideal, (x_0 + s * eps) / (1 + s), level, "F"), v, atol=1e-5)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_weighted_velocity_loss_and_its_gradient_are_those_of_the_native_loss(name, prediction):
    schedule = SCHEDULES[name]
    x_0, eps, level = draws(schedule, 0.05, 0.95)
    w = jax.random.normal(jax.random.key(2), (3, 3))

    def network(w, x, level):
        return jnp.tanh(x @ w) + 0.1 * expand_like(level.time, x)

    def path_loss(w):
        x_t = interpolate(x_0, eps, level.t)
        output = network(w, schedule.network_input(x_t, level), level)
        error = schedule.velocity(output, x_t, level, prediction) - (eps - x_0)
        return jnp.mean(schedule.loss_weight(level, prediction) * jnp.mean(jnp.square(error), (1, 2)))

    def native_loss(w):
        a, s = expand_like(level.alpha, x_0), expand_like(level.sigma, x_0)
        z = a * x_0 + s * eps
        c_in = 1 / jnp.sqrt(s**2 + schedule.sigma_data**2) if schedule.kind == "edm" else 1.0
        return jnp.mean(jnp.square(network(w, c_in * z, level) - native(schedule, prediction, x_0, eps, level)))

    (a, slope_a), (b, slope_b) = (jax.value_and_grad(loss)(w) for loss in (path_loss, native_loss))
    np.testing.assert_allclose(a, b, rtol=1e-4)
    np.testing.assert_allclose(slope_a, slope_b, rtol=1e-3, atol=1e-4 * float(jnp.abs(slope_b).max()))
    assert np.abs(slope_b).max() > 1e-3


def test_the_loss_weight_has_the_shape_of_the_level_and_is_one_for_the_velocity():
    level = VPSchedule().draw(jax.random.key(0), (6,))
    np.testing.assert_array_equal(VPSchedule().loss_weight(level, "velocity"), jnp.ones(6))
    weight = VPSchedule().loss_weight(level, "eps")
    np.testing.assert_allclose(weight, np.square(1 - np.asarray(level.t)), rtol=1e-4)


def test_predictions_that_a_schedule_cannot_have_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'F'.*FlowSchedule.*velocity, x_0, eps, v"):
        FlowSchedule().check("F")
    with pytest.raises(ValueError, match=r"zero_terminal_snr.*predict 'v' or 'x_0'"):
        VPSchedule.preset("zero_snr").check("eps")
    level, x = VPSchedule().grid(2).at(jnp.arange(2)), jnp.ones((2, 3))
    for call in (VPSchedule().velocity, VPSchedule().output):
        with pytest.raises(ValueError, match=r"'score'.*velocity, x_0, eps, v"):
            call(x, x, level, "score")
