"""Text-to-image pretraining of the 379M UNet, first of three stages: 256 px.

    snapgen plan    --config=configs/pretrain/t2i_256.py --topology=v5e:16x16
    snapgen prepare encode --config=configs/pretrain/t2i_256.py --images=IMAGES --out=SHARDS \
        --config.inputs.encoders.language_folder=gemma --config.inputs.encoders.language_tokenizer=gemma
    snapgen train   --config=configs/pretrain/t2i_256.py --workdir=gs://BUCKET/t2i_256 --config.data.path=SHARDS

In a minute on a laptop, from a folder of captioned pictures, with encoders that are drawn:

    snapgen prepare collect --path=PHOTOS --out=/tmp/photos
    snapgen prepare encode --config=configs/pretrain/t2i_256.py:runlocal --images=/tmp/photos --out=/tmp/t2i_256_shards
    snapgen train --config=configs/pretrain/t2i_256.py:runlocal --workdir=/tmp/t2i_256 \
        --config.data.path=/tmp/t2i_256_shards

Latents of the SD3 autoencoder and the states of CLIP-L, CLIP-bigG and Gemma are batch inputs, made once by `snapgen
prepare encode` (docs/encode.md). With `--config.inputs.text=tokens`, given to both commands, token ids are stored and
the text encoders run in the step. `--config.data.source=synthetic` takes random batches, which show speed and memory.

The conditioner, which maps Gemma's states to the width of CLIP's (4.7M parameters), is trained beside the UNet, and
every later stage goes on with it. Each encoder is left out of 0.464 of the examples, independently, as Stable Diffusion
3 was trained (Esser et al. 2024, section 5.3.3): a phone may run CLIP alone, and the tenth that keeps none serves
guidance.

Guidance is 4.5 until it is swept from 3.5 to 5. A run whose config names the folders of all encoders can be scored:

    for w in 3.5 4 4.5 5; do snapgen evaluate --workdir=RUN --names=frechet --guidance=$w; done

Machine: 256 chips of TPU v5e; runlocal, a laptop in a minute. Time: `benchmarks/results/plan/`, at best. Metric: the
fixed-noise validation loss. Batch, learning rate and length: SnapGen publishes none; learning rate and length follow
its successor's, SnapGen++ (arXiv 2601.08303), whose batch of 8,192 is halved here.
"""

from ml_collections import ConfigDict


def stage(size: int, batch_size: int, train_steps: int, shift: float) -> ConfigDict:
    """What the three stages share, and where they differ."""
    c = ConfigDict()
    c.recipe = "flow_matching"
    c.train_steps = train_steps
    c.batch_size = batch_size
    c.log_every_steps = 100
    c.inputs = ConfigDict({"kind": "stored_encodings", "image_sizes": ((size, size),), "encoders": published()})
    c.data = ConfigDict({"source": "stored", "workers": 4})
    c.network = ConfigDict({"kind": "unet", "preset": "t2i"})
    c.schedule = ConfigDict({"kind": "flow", "density": "logit_normal", "shift": shift})
    c.optimizer = ConfigDict({"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 5_000})
    c.ema_decay = 0.9999
    c.sampling = ConfigDict({"steps": 28, "guidance": 4.5, "shift": shift})
    c.checkpoint = ConfigDict({"every_steps": 1_000, "keep_every_steps": 50_000})
    return c


def published() -> dict:
    """The encoders: the repository of Stable Diffusion 3.5 in `sd35/`; that of Gemma 2 is named by hand."""
    return {
        "codec": {"kind": "autoencoder", "autoencoder": {"preset": "sd3"}, "workdir": "sd35/vae"},
        "clip_l_folder": "sd35/text_encoder",
        "clip_g_folder": "sd35/text_encoder_2",
        "clip_l_tokenizer": "sd35/tokenizer",
        "clip_g_tokenizer": "sd35/tokenizer_2",
    }


def tiny_clip(width: int) -> dict:
    """A text encoder that is drawn."""
    return {"preset": "smoke", "vocab_size": 512, "width": width, "max_tokens": 7, "projection": width, "eos_id": 511}


def tiny_autoencoder() -> dict:
    """An autoencoder that is drawn, with the latents of Stable Diffusion 3."""
    sizes = {"channels": (8, 8, 8, 8), "layers": 1, "latent_channels": 16, "groups": 4, "tile": 8, "tile_overlap": 2}
    return {"kind": "autoencoder", "autoencoder": sizes}


def run_locally(c: ConfigDict) -> ConfigDict:
    """The same run, as small as can be."""
    c.train_steps = 20
    c.batch_size = 8
    c.microbatches = 1
    c.log_every_steps = 5
    c.data.workers = 0
    encoders = {
        "codec": tiny_autoencoder(),
        "clip_l": tiny_clip(6),
        "clip_g": tiny_clip(10),
        "language": {"preset": "smoke", "vocab_size": 512, "width": 12},
        "language_tokens": 5,
        "stand_ins": True,
    }
    inputs = {"kind": "stored_encodings", "image_sizes": ((64, 64),), "conditioner": {"preset": "smoke"}}
    c.inputs = ConfigDict({**inputs, "encoders": encoders})
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
