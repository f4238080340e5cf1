"""SnapGen's few steps on the base of `steps.py`, which has SnapFusion's: a discriminator in place of two steps in one.

    snapgen train --config=configs/shapes/adapters_base.py --workdir=runs/base
    snapgen train --config=configs/shapes/steps_adversarial.py --workdir=runs/four
    snapgen train --config=configs/shapes/steps_adversarial.py --workdir=runs/eight_adversarial \
        --config.sampling.steps=8

The method and its numbers are those of `student_few_step.py`; student and teacher begin as one network. Machine: two
CPU cores. Time: twenty minutes. Metric: `score.overall`, beside that of `steps.py`.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base, student_few_step

METHOD = (
    "train_steps",
    "feature_weight",
    "scaling",
    "student_taps",
    "teacher_taps",
    "sampling",
    "optimizer",
    "discriminator",
    "ema_decay",
)


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `adapters_base.py`."""
    c, few = adapters_base.get_config(arg), student_few_step.get_config(arg)
    guidance = c.sampling.guidance
    c.recipe = "adversarial"
    c.init_from = c.trunk_workdir = c.inputs.text_workdir = "runs/base"
    c.inputs.caption_dropout = 0.0  # it is for guidance, which a jump to the data has none of
    network = ConfigDict(c.network.to_dict())
    c.teacher = ConfigDict({"workdir": "runs/base", "network": network, "prediction": c.prediction})
    c.teacher.guidance = guidance
    for name in METHOD:
        c[name] = few[name]
    c.evaluation = ConfigDict({"every_steps": 0, "during": (), "final": ("sample_grid",)})
    return c
