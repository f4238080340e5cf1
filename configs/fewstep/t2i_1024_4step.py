"""Four-step generator from the distilled 379M UNet, with Stable Diffusion 3.5 Large Turbo as the teacher, at 1024 px.

    snapgen plan  --config=configs/fewstep/t2i_1024_4step.py --topology=v5p:4x4x4
    snapgen train --config=configs/fewstep/t2i_1024_4step.py --workdir=gs://BUCKET/t2i_4step \
        --config.init_from=gs://BUCKET/t2i_1024_kd --config.teacher.weights=DIR/transformer --config.data.path=SHARDS
    snapgen train --config=configs/fewstep/t2i_1024_4step.py:runlocal --workdir=/tmp/t2i_4step \
        --config.data.path=/tmp/t2i_4step_shards

Adversarial training against heads on a frozen copy of the student, and the velocities of the teacher, which needs no
guidance, at the four times of sampling: those of the teacher's own sampler, since it knows no others. Weights and
lengths: section 5 of SnapGen (arXiv 2412.09619) leaves them open; these follow its siblings (docs/few_step.md).

Machine: 64 chips of TPU v5p; runlocal, a laptop in some minutes. Metric: `validation_loss.mean`, the squared error of
one jump to the data from the times of sampling; it may rise while images sharpen, so sample beside it.
"""

from ml_collections import ConfigDict

from configs.distill import t2i_1024_sd35l

# Of Turbo's sampler in four steps: evenly from 1 down to f(1/1000), then f again, with f(t) = 3 t / (1 + 2 t).
TURBO = (1.0, 0.857692, 0.602151, 0.008929)


def few_step(arg: str | None) -> ConfigDict:
    """The distillation at 1024 px, with an adversary; the times and what the teacher is are left open."""
    c = t2i_1024_sd35l.get_config(arg)
    c.recipe = "adversarial"
    c.inputs.caption_dropout = 0.0  # it is for guidance, which a jump to the data has none of
    c.train_steps = 20 if arg else 20_000
    c.batch_size = 8 if arg else 512
    c.ema_decay = 0.999
    c.optimizer = ConfigDict({"learning_rate": 1e-5, "b1": 0.0, "b2": 0.99, "warmup_steps": 5 if arg else 500})
    c.feature_weight = 0.0
    c.discriminator = ConfigDict({"preset": "t2i"})
    if arg:
        c.trunk = "teacher"
        c.discriminator = ConfigDict({"preset": "smoke", "taps": ("block_00", "block_01"), "channels": (16, 16)})
        c.discriminator.time_width = 16
    return c


def from_turbo(c: ConfigDict) -> ConfigDict:
    """With Turbo as the teacher, at its times."""
    c.teacher.few_step_times = TURBO
    c.sampling = ConfigDict({"steps": len(TURBO), "guidance": 1.0, "method": "renoise", "times": TURBO})
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of tiny networks on a laptop."""
    return from_turbo(few_step(arg))
