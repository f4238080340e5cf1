"""Eight-step generator at 1024 px. See `t2i_1024_4step.py`.

    snapgen plan  --config=configs/fewstep/t2i_1024_8step.py --topology=v5p:4x4x4
    snapgen train --config=configs/fewstep/t2i_1024_8step.py --workdir=gs://BUCKET/t2i_8step ...
    snapgen train --config=configs/fewstep/t2i_1024_8step.py:runlocal --workdir=/tmp/t2i_8step

Machine: 64 chips of TPU v5p; runlocal, a laptop in some minutes. Metric: as there.
"""

from ml_collections import ConfigDict

from configs.fewstep import t2i_1024_4step


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of tiny networks on a laptop."""
    return t2i_1024_4step.few_step(8, arg)
