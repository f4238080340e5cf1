"""SnapFusion's step distillation in the shapes world: the base run in sixteen steps, and then in eight.

    snapgen train --config=configs/shapes/adapters_base.py --workdir=runs/base
    snapgen train --config=configs/shapes/steps.py --workdir=runs/sixteen --config.sampling.steps=16
    snapgen train --config=configs/shapes/steps.py --workdir=runs/eight \
        --config.teacher.workdir=runs/sixteen --config.init_from=runs/sixteen
    snapgen sample --workdir=runs/eight --prompt="a red circle"

The teacher takes two steps for each of the student's: 32, then 16. `docs/snapfusion.md` says what the keys are.
Machine: two CPU cores. Time: ten minutes each. Metric: `score.overall` in 8 steps, beside the base's in 32.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `adapters_base.py`; "quick" starts from its "quick"."""
    c = adapters_base.get_config(arg)
    c.recipe = "step_distillation"
    c.inputs.text_workdir = "runs/base"  # the base's text encoder, which student and teacher share
    c.init_from = "runs/base"
    c.network.blocks = ()  # an evolved network's, filled in by `evolve.py`
    network = ConfigDict(c.network.to_dict())
    c.teacher = ConfigDict({"workdir": "runs/base", "network": network, "prediction": c.prediction})
    c.train_steps = {None: 3_000, "quick": 1_500, "runlocal": 6}[arg]
    c.sampling = ConfigDict({"steps": 8, "guidance": 2.0, "shift": 3.0})
    # The paper's range, 2 to 14, is for guidance of 7.5 or so; here 2 is what the base scores best with.
    c.guidance_range = (1.0, 4.0)
    c.guided_share = 0.5
    c.optimizer = ConfigDict({"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 50, "weight_decay": 0.01})
    c.ema_decay = 0.99
    c.checkpoint.every_steps = 500
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": ("sample_grid",), "final": ("sample_grid",)})
    if arg == "runlocal":
        c.sampling.steps = 2
        c.optimizer.warmup_steps = 2
        c.checkpoint.every_steps = 3
        c.evaluation.every_steps = 3
    return c
