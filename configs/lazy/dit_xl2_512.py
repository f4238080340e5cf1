"""LazyDiT at full size: gates of the published DiT-XL/2 at 512 px and its 50-step DDIM sampler. See `dit_xl2_256.py`.

    hf download facebook/DiT-XL-2-512 --local-dir dit_xl2_512
    snapgen plan  --config=configs/lazy/dit_xl2_512.py --topology=v5e:4x4
    snapgen train --config=configs/lazy/dit_xl2_512.py --config.data.path=TFDS --workdir=gs://BUCKET/lazy_512
    snapgen draw  --workdir=gs://BUCKET/lazy_512 --lazy=0.5 --count=50000 --classes=uniform --out=drawn --npz=drawn.npz

In a minute on a laptop:

    snapgen train --config=configs/lazy/dit_xl2_512.py:runlocal,base --workdir=/tmp/lazy_512_base
    snapgen train --config=configs/lazy/dit_xl2_512.py:runlocal --workdir=/tmp/lazy_512 \
        --config.base=/tmp/lazy_512_base

The outputs of all modules, which a step of the sampler leaves to the next, are 132 MB for an image in 16 bits, and
twice that under guidance. Machine: 16 chips of TPU v5e. Metric: FID of 50,000 images, published as 3.33 for the plain
sampler and 3.94 with 50% skipped, where 25 plain steps have 4.26.
"""

from ml_collections import ConfigDict

from configs.lazy import dit_xl2_256


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `dit_xl2_256.py`."""
    c = dit_xl2_256.experiment(512, arg)
    if arg is None:
        c.microbatches = 4
    return c
