"""The denoiser: the very program of flow matching, and native inputs and times under the other schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from snapgen_jax.diffusion.path import velocity_from_x0
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.schedules import EDMSchedule, FlowSchedule, VPSchedule
from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.systems.denoiser import Denoiser
from tests.networks import tiny

FLOW = FlowSchedule()


@dataclasses.dataclass(frozen=True)
class RecordingConfig:
    """A network that shows what it receives: its taps are its input and its time features."""

    time_width: int = 16

    def module(self, rngs):
        """The module."""
        return Recording(rngs)


class Recording(nnx.Module):
    """Output: the input by a trained factor, and `shift` on top."""

    def __init__(self, rngs):
        self.gain = nnx.Param(jax.random.normal(rngs.params(), ()))

    def __call__(self, x, time, context, *, taps=(), reuse=None, shift=0.0):
        intermediates = {"input": x, "time": time, "context": context}
        intermediates.update(reuse or {})
        return self.gain[...] * x + shift, {name: intermediates[name] for name in taps}


@pytest.fixture(scope="module")
def unet():
    network, _ = build(UNetConfig.preset("shapes"))
    x_t, _, context = tiny.inputs(network.config, batch=2)
    return network, tiny.drawn(network), x_t, jnp.array([0.02, 0.7]), context


@pytest.fixture
def recording():
    network, _ = build(RecordingConfig())
    return network, {"gain": jnp.float32(0.8)}


def by_hand(network, prediction, params, x_t, t, context, taps=()):
    """What flow matching has always computed."""
    out, found = apply(network, params, x_t, time_features(t, network.config.time_width), context, taps=taps)
    return (out if prediction == "velocity" else velocity_from_x0(x_t, out, t)), found


def program(function, *arguments):
    """The program of a function as text, without the equations that its result does not depend on."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    needed, kept = {id(v) for v in jaxpr.outvars}, []
    for equation in reversed(jaxpr.eqns):
        if any(id(v) in needed for v in equation.outvars):
            kept.append(equation)
            needed.update(id(v) for v in equation.invars)
    return str(jaxpr.replace(eqns=kept[::-1]))


@pytest.mark.parametrize("prediction", ["velocity", "x_0"])
def test_under_the_flow_it_traces_what_flow_matching_traces(unet, prediction):
    network, params, x_t, t, context = unet
    denoiser = Denoiser(network, prediction)
    asked = program(lambda *a: denoiser(*a, taps=("mid", "up_0")), params, x_t, t, context)
    assert "dot_general" in asked
    assert asked == program(lambda *a: by_hand(network, prediction, *a, taps=("mid", "up_0")), params, x_t, t, context)


@pytest.mark.parametrize("prediction", ["velocity", "x_0"])
def test_under_the_flow_a_time_and_its_level_give_the_same_bits(recording, prediction):
    network, params = recording
    x_t, t = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)), jnp.array([0.0, 0.02, 0.7])
    expected = by_hand(network, prediction, params, x_t, t, None, ("input", "time"))
    for level in (t, FLOW.level(t)):
        given = Denoiser(network, prediction)(params, x_t, level, None, taps=("input", "time"))
        jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_taps_come_back_and_replacements_and_further_arguments_reach_the_network(recording):
    network, params = recording
    denoiser, x_t, t = Denoiser(network), jnp.ones((2, 3)), jnp.array([0.1, 0.9])
    v, taps = denoiser(params, x_t, t, "c", taps=("input", "context"))
    assert taps.keys() == {"input", "context"} and taps["context"] == "c"
    np.testing.assert_allclose(v, 0.8 * x_t)
    v, taps = denoiser(params, x_t, t, "c", taps=("input",), reuse={"input": jnp.zeros(1)}, shift=2.0)
    np.testing.assert_array_equal(taps["input"], jnp.zeros(1))
    np.testing.assert_allclose(v, 0.8 * x_t + 2.0)


def test_a_vp_network_receives_z_and_the_integer_steps_of_its_grid_in_every_rank(recording, monkeypatch):
    def plain(t, dim, scale):  # shows the time itself, whose sine may round differently from program to program
        return jnp.repeat((scale * t)[:, None], dim, axis=1)

    monkeypatch.setattr("snapgen_jax.systems.denoiser.time_features", plain)
    network, params = recording
    schedule = VPSchedule.preset("sd15")
    denoiser, grid = Denoiser(network, "eps", schedule), schedule.grid(50)
    for shape in ((6,), (2, 3), (3, 2, 2, 1)):
        noise = jax.random.normal(jax.random.key(0), (2, *shape))

        def denoise(x_t, t, i, seen):
            v, taps = denoiser(params, x_t, grid.at(i, 2), None, taps=("input", "time"))
            return v, {"z": seen["z"].at[i].set(taps["input"]), "time": seen["time"].at[i].set(taps["time"])}

        seen = {"z": jnp.zeros((50, *noise.shape)), "time": jnp.zeros((50, 2, 16))}
        _, seen = sample(denoise, schedule.initial(noise, grid), grid.t, seen)
        np.testing.assert_array_equal(seen["time"], np.broadcast_to(np.arange(981, 0, -20)[:, None, None], (50, 2, 16)))
        np.testing.assert_allclose(seen["z"][0], noise, rtol=1e-6)
        # DDIM in z with eps = 0.8 z
        a, s = (column[[981, 961]] for column in schedule.table())
        z = a[1] * (noise - s[0] * 0.8 * noise) / a[0] + s[1] * 0.8 * noise
        np.testing.assert_allclose(seen["z"][1], z, rtol=1e-4, atol=1e-5)


def test_an_edm_network_receives_scaled_z_and_a_quarter_of_log_sigma(recording):
    network, params = recording
    schedule = EDMSchedule.preset("svd")
    grid = schedule.grid(3)
    level = grid.at(jnp.array([0, 1]))
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 2, 5))
    sigma = np.asarray(level.sigma)[:, None]
    z = x_0 + sigma * eps
    v, taps = Denoiser(network, "F", schedule)(params, z / (1 + sigma), level, None, taps=("input", "time"))
    c_in = 1 / np.sqrt(sigma**2 + 1)
    np.testing.assert_allclose(taps["input"], c_in * z, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(taps["time"], time_features(jnp.log(level.sigma) / 4, 16, scale=1.0))
    denoised = z / (sigma**2 + 1) + sigma * c_in * 0.8 * c_in * z
    np.testing.assert_allclose(v, (z - denoised) / sigma - denoised, rtol=1e-4, atol=1e-4)


def test_it_is_hashable_and_refuses_a_prediction_that_its_schedule_does_not_have(recording):
    network, _ = recording
    assert Denoiser(network) == Denoiser(network) and hash(Denoiser(network)) == hash(Denoiser(network))
    assert Denoiser(network) != Denoiser(network, "x_0")
    with pytest.raises(ValueError, match="cannot predict 'F' under FlowSchedule"):
        Denoiser(network, "F")
