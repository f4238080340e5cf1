"""Whole trajectories of diffusers' schedulers, of a model that is a formula.

The model's output is `tanh(0.8 z) + 0.3 sin(t / 100)` of what the scheduler hands it: z, as scaled for the network, and
the native time t. Euler in sigma and DDIM without noise are the deterministic ones.
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

STEPS = 20
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
DDIM = {"clip_sample": False, "set_alpha_to_one": True}
SCHEDULERS = {
    "sd15-ddim": lambda: DDIMScheduler(**SD, **DDIM),
    "sd15-euler": lambda: EulerDiscreteScheduler(**SD, timestep_spacing="leading"),
    "sd21-v-ddim": lambda: DDIMScheduler(**SD, **DDIM, prediction_type="v_prediction"),
    "sdxl-euler": lambda: EulerDiscreteScheduler(**SD, timestep_spacing="leading"),
    "zero_snr-v-ddim": lambda: DDIMScheduler(
        **SD, **DDIM, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "dit-ddim": lambda: DDIMScheduler(
        **DDIM, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing="leading"
    ),
    "svd-euler": lambda: EulerDiscreteScheduler(
        **SD,
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        timestep_spacing="leading",
    ),
}


def trajectory(name: str) -> dict[str, np.ndarray]:
    """`z` `[STEPS + 1, 2, 3, 3, 2]` float64, the scheduler's state before each step and at the end; `time` `[STEPS]`,
    what the model was told; `noise`, of unit variance, that it began with."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    noise = np.random.default_rng(7).normal(size=(2, 3, 3, 2)).astype(np.float32).astype(np.float64)
    z = torch.from_numpy(noise) * scheduler.init_noise_sigma
    states, times = [z.numpy()], []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(z, t)
        time = t.to(torch.float64)
        output = torch.tanh(0.8 * scaled) + 0.3 * torch.sin(time / 100)
        z = scheduler.step(output, t, z).prev_sample.to(torch.float64)
        states.append(z.numpy())
        times.append(float(time))
    return {"z": np.stack(states), "time": np.asarray(times), "noise": noise}


def write_goldens(folder: pathlib.Path) -> None:
    """Writes `schedules/trajectories.npz`, `<scheduler>/<array>` each."""
    found = {f"{name}/{array}": value for name in SCHEDULERS for array, value in trajectory(name).items()}
    (folder / "schedules").mkdir(exist_ok=True)
    np.savez_compressed(folder / "schedules" / "trajectories.npz", **found)
