"""Eight-step generator at 1024 px. See `t2i_1024_4step.py`.

    snapgen plan  --config=configs/fewstep/t2i_1024_8step.py --topology=v5p:4x4x4
    snapgen train --config=configs/fewstep/t2i_1024_8step.py --workdir=gs://BUCKET/t2i_8step \
        --config.init_from=gs://BUCKET/t2i_1024_kd --config.teacher.weights=DIR/transformer --config.data.path=SHARDS
    snapgen train --config=configs/fewstep/t2i_1024_8step.py:runlocal --workdir=/tmp/t2i_8step \
        --config.data.path=/tmp/t2i_8step_shards

Turbo knows four times, and not these eight: the teacher is Stable Diffusion 3.5 Large itself, guided, and followed to
the data in four Euler steps. That is eight calls of the teacher an update where the four-step config makes one.

Machine: 64 chips of TPU v5p; runlocal, a laptop in some minutes. Metric: as there.
"""

from ml_collections import ConfigDict

from configs.fewstep import t2i_1024_4step


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of tiny networks on a laptop."""
    c = t2i_1024_4step.few_step(arg)
    c.teacher.guidance = 4.0
    c.teacher.rollout_steps = 4
    c.sampling = ConfigDict({"steps": 8, "guidance": 1.0, "method": "renoise", "shift": 3.0})
    return c
