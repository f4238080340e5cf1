"""Distillation of the 379M UNet from Stable Diffusion 3.5 Large, at 1024 px. See `t2i_512_sd35l.py`.

    snapgen plan  --config=configs/distill/t2i_1024_sd35l.py --topology=v5p:4x4x4
    snapgen train --config=configs/distill/t2i_1024_sd35l.py --workdir=gs://BUCKET/t2i_1024_kd \
        --config.init_from=gs://BUCKET/t2i_512_kd --config.teacher.weights=DIR/transformer --config.data.path=SHARDS
    snapgen train --config=configs/distill/t2i_1024_sd35l.py:runlocal --workdir=/tmp/t2i_1024_kd \
        --config.data.path=/tmp/t2i_1024_kd_shards

A microbatch is eight images on a chip: there is room for them, and each gathers the teacher's weights once.

Machine: 64 chips of TPU v5p; runlocal, a laptop in some minutes. Metric: the fixed-noise validation loss.
"""

from ml_collections import ConfigDict

from configs.distill import t2i_512_sd35l
from configs.pretrain import t2i_1024


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of tiny networks on a laptop."""
    c = t2i_512_sd35l.distilled(t2i_1024.get_config(arg), devices=64, microbatches=4)
    if arg:
        return t2i_512_sd35l.run_locally(c)
    c.batch_size = 2_048
    return c
