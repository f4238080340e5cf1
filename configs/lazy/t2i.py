"""Gates of the 379M SnapGen UNet at 1024 px, by LazyDiT (arXiv 2412.12444): a use that the paper does not have.

    snapgen plan  --config=configs/lazy/t2i.py --topology=v5e:4x4
    snapgen train --config=configs/lazy/t2i.py --config.base=gs://BUCKET/t2i_1024 --config.data.path=SHARDS \
        --workdir=gs://BUCKET/lazy_t2i

The base is a run of `configs/pretrain/t2i_1024.py` or of a later full-step stage, and SHARDS are that run's. Gates
stand at the self-attentions, cross-attentions and feed-forward networks of its transformers: 96 modules, for 28 steps
2,121,728 numbers. `--config.gate="('attention','ffn','residual')"` also lets the convolutions of residual blocks be
skipped, an extension.

In a minute on a laptop, on the shards that `configs/pretrain/t2i_256.py` says how to make, by encoders that are drawn:

    snapgen train --config=configs/pretrain/t2i_256.py:runlocal --workdir=/tmp/t2i_256 \
        --config.data.path=/tmp/t2i_256_shards
    snapgen train --config=configs/lazy/t2i.py:runlocal --workdir=/tmp/lazy_t2i --config.base=/tmp/t2i_256 \
        --config.data.path=/tmp/t2i_256_shards

Few-step students have little to skip: of 4 steps at most 2 may. These gates are of the 28-step sampler. Machine: 16
chips of TPU v5e. Metric: `validation_loss.mean` beside `validation_loss.skipped`. Optimizer and length are the
paper's; the price is that of its 50-step DiT, a place to begin.
"""

from ml_collections import ConfigDict

from configs.lazy import dit_xl2_256
from configs.pretrain import t2i_256, t2i_1024


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for six updates of tiny gates on a laptop."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c, of_base = dit_xl2_256.trained_gates(), t2i_1024.get_config()
    c.base = "t2i_1024"
    c.batch_size = 64
    c.network = of_base.network
    c.network.remat = "blocks"
    for name in ("inputs", "data", "schedule", "sampling"):
        c[name] = of_base[name]
    if arg is None:
        return c
    c = dit_xl2_256.shortened(c)
    small = t2i_256.get_config(arg)
    for name in ("inputs", "data", "network"):
        c[name] = small[name]
    return c
