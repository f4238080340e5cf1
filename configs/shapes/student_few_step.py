"""Four steps in the shapes world: the distilled student, against a discriminator and with its teacher.

    snapgen train --config=configs/shapes/student_few_step.py --workdir=runs/student_few_step \
        --config.inputs.text_workdir=runs/clip --config.teacher.workdir=runs/teacher \
        --config.init_from=runs/student_distilled

Last stage of `chain.py`; `--config.sampling.steps=8` trains eight steps. The teacher is a full-step one, which may be
asked at any time, and is asked with guidance, since the generator is not guided. Machine: one GPU, or two CPU cores for
some hours. Metric: `score.overall` at four steps.
"""

from ml_collections import ConfigDict

from configs.shapes import student_distilled


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`."""
    c = student_distilled.get_config(arg)
    guidance = c.sampling.guidance
    c.recipe = "adversarial"
    c.init_from = "runs/student_distilled"
    c.train_steps = {"quick": 1_000, "runlocal": 6}.get(arg or "", 12_000)
    c.feature_weight = 0.0
    c.inputs.caption_dropout = 0.0  # it is for guidance, which a jump to the data has none of
    c.teacher.guidance = guidance
    c.sampling = ConfigDict({"steps": 4, "guidance": 1.0, "method": "renoise", "shift": 3.0})
    c.optimizer = ConfigDict({"learning_rate": 3e-4, "b1": 0.0, "b2": 0.99, "warmup_steps": 50})
    c.discriminator = ConfigDict({"preset": "smoke" if arg == "runlocal" else "shapes"})
    c.ema_decay = 0.995
    if arg == "runlocal":
        c.optimizer.warmup_steps = 2
        c.discriminator.time_width = c.network.get("time_width", 256)
    return c
