"""Text-to-image pretraining of the 379M UNet, first of three stages: 256 px.

    snapgen plan  --config=configs/pretrain/t2i_256.py --topology=v5e:16x16
    snapgen train --config=configs/pretrain/t2i_256.py --workdir=gs://BUCKET/t2i_256
    snapgen train --config=configs/pretrain/t2i_256.py:runlocal --workdir=/tmp/t2i_256

Latents of the SD3 autoencoder and text states of CLIP and Gemma are batch inputs. Until a source of stored ones is
configured, `data.source` is "synthetic": random batches, which show speed and memory and train nothing of use.

Machine: 256 chips of TPU v5e; runlocal, a laptop in a minute. Time: `benchmarks/results/plan/`, at best. Metric: the
fixed-noise validation loss. Batch, learning rate and length: SnapGen publishes none; these follow its successor's.
"""

from ml_collections import ConfigDict


def stage(size: int, batch_size: int, train_steps: int, shift: float) -> ConfigDict:
    """What the three stages share, and where they differ."""
    c = ConfigDict()
    c.recipe = "flow_matching"
    c.train_steps = train_steps
    c.batch_size = batch_size
    c.log_every_steps = 100
    c.inputs = ConfigDict({"kind": "stored", "image_sizes": ((size, size),)})
    c.data = ConfigDict({"source": "synthetic"})
    c.network = ConfigDict({"kind": "unet", "preset": "t2i"})
    c.schedule = ConfigDict({"kind": "flow", "density": "logit_normal", "shift": shift})
    c.optimizer = ConfigDict({"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 5_000})
    c.ema_decay = 0.9999
    c.sampling = ConfigDict({"steps": 28, "guidance": 7.0, "shift": shift})
    c.checkpoint = ConfigDict({"every_steps": 1_000, "keep_every_steps": 50_000})
    return c


def run_locally(c: ConfigDict) -> ConfigDict:
    """The same run, as small as can be."""
    c.train_steps = 20
    c.batch_size = 8
    c.microbatches = 1
    c.log_every_steps = 5
    c.inputs = ConfigDict({"kind": "stored", "image_sizes": ((64, 64),), "context_tokens": 12})
    c.inputs.update({"context_width": 16, "pooled_width": 16})
    c.network = ConfigDict({"kind": "unet", "preset": "smoke", "latent_channels": 16})
    c.optimizer.warmup_steps = 5
    c.sampling.steps = 2
    c.checkpoint = ConfigDict({"every_steps": 10})
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of a tiny network on a laptop."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = stage(size=256, batch_size=4096, train_steps=400_000, shift=1.0)
    return run_locally(c) if arg else c
