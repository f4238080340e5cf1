"""A run is held to what a config says of its network; what no network knows may differ."""

import pytest

from snapgen_jax.diffusion.schedules import EDMSchedule, FlowSchedule, VPSchedule
from snapgen_jax.recipes._run import check_output
from snapgen_jax.training.exits import ConfigError

LINEAR = {"kind": "vp", "betas": "linear", "beta_start": 1e-4}


@pytest.mark.parametrize(
    ("schedule", "trained"),
    [
        (FlowSchedule(shift=3.0), {"kind": "flow", "shift": 1.0, "density": "uniform"}),
        (VPSchedule(spacing="trailing", density_power=3.0), {"kind": "vp", "spacing": "leading", "steps_offset": 0}),
        (EDMSchedule(mean=-1.0, sigma_max=700.0), {"kind": "edm", "sigma_max": 80.0, "density": "levels"}),
        (EDMSchedule(), {}),
    ],
)
def test_density_and_steps_of_sampling_may_differ(schedule, trained):
    check_output("run", {"schedule": trained}, "velocity", schedule)


@pytest.mark.parametrize(
    ("schedule", "trained", "says"),
    [
        (VPSchedule(), LINEAR, r"schedule\.betas='linear', and base\.schedule\.betas is 'scaled_linear'; set it"),
        (VPSchedule(), {"kind": "vp", "zero_terminal_snr": True}, r"zero_terminal_snr=True, and base\.schedule"),
        (EDMSchedule(), {"kind": "edm", "sigma_data": 1.0}, r"sigma_data=1\.0, and base\.schedule\.sigma_data is 0\.5"),
        (FlowSchedule(), {"kind": "edm", "sigma_data": 1.0}, r"kind='edm', and base\.schedule\.kind is 'flow'"),
    ],
)
def test_what_decides_its_input_and_output_may_not(schedule, trained, says):
    with pytest.raises(ConfigError, match=says):
        check_output("run", {"schedule": trained}, "velocity", schedule, "base.")
