"""Text-to-image pretraining of the 379M UNet, second of three stages: 512 px. See `t2i_256.py`.

    snapgen plan  --config=configs/pretrain/t2i_512.py --topology=v5e:16x16
    snapgen train --config=configs/pretrain/t2i_512.py --workdir=gs://BUCKET/t2i_512 \
        --config.init_from=gs://BUCKET/t2i_256 --config.data.path=SHARDS
    snapgen train --config=configs/pretrain/t2i_512.py:runlocal --workdir=/tmp/t2i_512 \
        --config.data.path=/tmp/t2i_512_shards

`SHARDS` are made by `snapgen prepare encode` with this config, as there.

It starts from the averaged weights of the stage before, of UNet and conditioner; optimizer, average and schedule begin
anew, and the times are shifted towards noise, since at more pixels the same noise hides less (Esser et al. 2024,
section 5.3.2).

For the backward pass the UNet keeps what its matrix products, convolutions and attention made, and computes norms and
activations again (`remat="products"`): by plan, on 8 images a chip, 1.25 times as fast as computing every unit twice.

Machine: 256 chips of TPU v5e; runlocal, a laptop in a minute. Time: `benchmarks/results/plan/`, at best. Metric: the
fixed-noise validation loss.
"""

from ml_collections import ConfigDict

from configs.pretrain import t2i_256


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of a tiny network on a laptop."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = t2i_256.stage(size=512, batch_size=2_048, train_steps=100_000, shift=1.7)
    c.network.remat = "products"
    return t2i_256.run_locally(c) if arg else c
