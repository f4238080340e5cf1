"""Our sampler on the straight path walks, step by step, through the states of diffusers' schedulers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.diffusion.path import expand_like
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.schedules import EDMSchedule, VPSchedule
from tests.parity import GOLDENS

SD = VPSchedule.preset("sd15")
SCHEDULES = {
    "sd15-ddim": (SD, "eps"),
    "sd15-euler": (SD, "eps"),
    "sd21-v-ddim": (SD, "v"),
    "sdxl-euler": (SD, "eps"),
    "zero_snr-v-ddim": (VPSchedule.preset("zero_snr"), "v"),
    "dit-ddim": (dataclasses.replace(VPSchedule.preset("dit"), spacing="leading", steps_offset=0), "eps"),
    "svd-euler": (EDMSchedule.preset("svd"), "v"),
}


def walked(name, noise, steps):
    """The states `[steps + 1, ...]` in the scheduler's own units, and the times that the model was told."""
    schedule, prediction = SCHEDULES[name]
    grid = schedule.grid(steps)

    def denoise(x_t, t, i, seen):
        level = grid.at(i, x_t.shape[0])
        scaled = schedule.network_input(x_t, level)
        output = jnp.tanh(0.8 * scaled) + 0.3 * jnp.sin(expand_like(level.time, x_t) / 100)
        states, times = seen
        seen = states.at[i].set(x_t), times.at[i].set(level.time[0])
        return schedule.velocity(output, x_t, level, prediction), seen

    start = schedule.initial(noise, grid)
    x, (states, times) = sample(denoise, start, grid.t, (jnp.zeros((steps, *start.shape)), jnp.zeros(steps)))
    alpha, sigma = (np.asarray(part, np.float64).reshape(-1, 1, 1, 1, 1) for part in (grid.alpha, grid.sigma))
    units = (alpha + sigma) / (alpha if name.endswith("euler") else 1)  # Euler's states are x_0 + sigma / alpha eps
    return np.concatenate([states, x[None]]).astype(np.float64) * units, times


def check(name, golden):
    states, times = walked(name, jnp.asarray(golden["noise"], jnp.float32), len(golden["time"]))
    np.testing.assert_allclose(times, golden["time"], rtol=1e-6, atol=1e-6)
    scale = np.linalg.norm(golden["z"].reshape(len(states), -1), axis=1)
    errors = np.linalg.norm((states - golden["z"]).reshape(len(states), -1), axis=1) / scale
    assert errors.max() <= 1e-5, errors
    assert golden["z"][-1].std() > 0.05


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_state_is_the_schedulers_own(name):
    stored = np.load(GOLDENS / "schedules" / "trajectories.npz")
    check(name, {array: stored[f"{name}/{array}"] for array in ("z", "time", "noise")})


@pytest.mark.oracle
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_live_scheduler_walks_the_same(name):
    pytest.importorskip("torch")
    from tests.oracles import schedules as oracle

    check(name, oracle.trajectory(name))
