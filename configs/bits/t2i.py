"""SnapGen's 379M UNet in about two bits a weight: stage I, from the run of `configs/pretrain/t2i_1024.py`.

    snapgen plan  --config=configs/bits/t2i.py --topology=v5e:4x4
    snapgen train --config=configs/bits/t2i.py --workdir=gs://BUCKET/t2i_bits --config.data.path=SHARDS \
        --config.base=gs://BUCKET/t2i_1024 --config.init_from=gs://BUCKET/t2i_1024
    snapgen train --config=configs/bits/t2i.py:data --workdir=gs://BUCKET/t2i_bits_data --config.data.path=SHARDS \
        --config.base=gs://BUCKET/t2i_1024 --config.init_from=gs://BUCKET/t2i_bits

Which layer needs how many bits is to be measured on that run, by a chain's stage of the function
`snapgen_jax.derivations.layer_bits:derive` (see `configs/shapes/bits.py`). Until it is, the bits are those that
BitsFusion gave like layers of Stable Diffusion 1.5: most to the keys of cross-attention, to projections and to skips,
fewest to feed-forward networks and to convolutions at low resolution, and one more on the way down than on the way up.
They are 2.00 on average.

Machine: 16 chips of TPU v5e; runlocal, a laptop in a minute. Metric: the fixed-noise validation loss.
"""

from ml_collections import ConfigDict

from configs.pretrain import t2i_1024

BITS = {
    "*/ffn/*": 1,
    "down/block_0[01]/*/ffn/*": 2,
    "*/cross_attention/key": 4,
    "*_attention/value": 3,
    "*/skip": 3,
    "*/project_*": 4,
    "up/*/pointwise": 1,
    "mid_residual/*/pointwise": 1,
    "up/*/residual/embedding": 1,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for stage I, "data" for stage II, or "runlocal" for a few updates of a tiny network of the kind."""
    if arg not in (None, "data", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is data, runlocal, or nothing")
    c = t2i_1024.get_config("runlocal" if arg == "runlocal" else None)
    c.recipe = "quantised"
    c.base = c.init_from = "t2i_1024"
    c.bits = {} if arg == "runlocal" else BITS
    c.schedule = ConfigDict({"kind": "flow", "density": "power", "density_power": 3.0})
    c.optimizer = ConfigDict({"learning_rate": 1e-5, "warmup_steps": 0, "weight_decay": 0.0})
    c.ema_decay = 0.0
    if arg == "data":
        c.learns_from = "data"
        c.init_from = "t2i_bits"
    if arg != "runlocal":
        c.train_steps = 50_000 if arg == "data" else 20_000
        c.batch_size = 1_024 if arg == "data" else 256
        c.microbatches = 64 if arg == "data" else 16  # one image on a chip, as in pretraining
        c.mesh = ConfigDict({"data": 1, "fsdp": 16})  # so planned; links then bound it, by little
    return c
