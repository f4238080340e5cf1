"""The ablation of SnapGen (arXiv 2412.09619, section 3.1): its eight UNets, A to G, on ImageNet-1K at 256 px.

    snapgen count --ladder
    snapgen train --config=configs/imagenet/ablation.py:G --config.data.path=TFDS --workdir=gs://BUCKET/ladder/G
    snapgen draw  --workdir=gs://BUCKET/ladder/G --count=50000 --classes=uniform --out=gs://BUCKET/ladder/G/drawn
    snapgen train --config=configs/imagenet/ablation.py:runlocal --workdir=/tmp/ladder

A is a thin and short SDXL; B keeps self-attention in the lowest stage alone; C1 has separable convolutions, C2 widens
their middle; D narrows the feed-forward networks; E shares keys and values; F conditions the first stage; G adds
QK-RMSNorm and RoPE. Data, guidance and how 50,000 images become an FID: `256.py` and `docs/imagenet.md`. `A,stored`
reads stored latents; `A,runlocal` is small.

Machine: 256 chips of TPU v5e, at best 268 chip-hours for G on stored latents (by the plan of `256.py`); runlocal, a
laptop in a minute. Metric: FID of 50,000 images, published as 3.76 for A, 3.12 for B and 3.38 for C1. Length: 120
epochs. Batch and learning rate are not published.
"""

from ml_collections import ConfigDict

IMAGES = 1_281_167
BATCH = 1024
# What each step did to the UNet before it, undone from G backwards.
LADDER = {
    "G": {},
    "F": {"qk_norm": False, "rope": False},
    "E": {"first_stage": "res"},
    "D": {"kv_heads": None},
    "C2": {"ffn_ratio": 4},
    "C1": {"expand_ratio": 1},
    "B": {"convolution": "ordinary"},
    "A": {"self_attention": (True, True, True)},
}


def undone(step: str) -> dict:
    """What differs in the UNet of a step from that of G."""
    names = list(LADDER)
    return {field: value for name in names[: names.index(step) + 1] for field, value in LADDER[name].items()}


def experiment(epochs: int) -> ConfigDict:
    """ImageNet-1K at 256 px: class names through CLIP-L, latents of the autoencoder of Stable Diffusion 1."""
    c = ConfigDict()
    c.recipe = "flow_matching"
    c.train_steps = round(epochs * IMAGES / BATCH)
    c.batch_size = BATCH
    c.log_every_steps = 100
    c.data = ConfigDict({"source": "tfds", "name": "imagenet2012", "class_names": "imagenet_classes.txt"})
    c.data.update({"crop": "centre", "flip": "random", "workers": 16})
    c.inputs = ConfigDict(
        {"kind": "clip_captions", "image_sizes": ((256, 256),), "caption_dropout": 0.1, **published()}
    )
    c.network = ConfigDict({"kind": "unet", "preset": "imagenet"})
    c.schedule = ConfigDict({"kind": "flow", "density": "logit_normal"})
    c.optimizer = ConfigDict({"learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 5_000})
    c.ema_decay = 0.9999
    c.sampling = ConfigDict({"steps": 50, "guidance": 1.8, "guidance_interval": (0.0, 0.7)})
    c.sample_prompts = ("a photo of a golden retriever", "a photo of a lighthouse", "a photo of a daisy")
    c.checkpoint = ConfigDict({"every_steps": 1_000, "keep_every_steps": 50_000})
    c.evaluation = ConfigDict({"every_steps": 10_000, "during": ("sample_grid", "validation_loss")})
    return c


def published() -> dict:
    """CLIP-L and the autoencoder, each the folder of its repository."""
    clip = "clip-vit-large-patch14"
    codec = {"kind": "autoencoder", "autoencoder": {"preset": "sd1"}, "workdir": "sd-vae-ft-mse"}
    return {"codec": codec, "clip_l_folder": clip, "clip_l_tokenizer": clip}


def on_stored_latents(c: ConfigDict) -> ConfigDict:
    """The same run on latents and token ids that `snapgen prepare encode` made beforehand."""
    c.inputs = ConfigDict({"kind": "stored_clip_captions", "image_sizes": ((256, 256),), "caption_dropout": 0.1})
    c.inputs.encoders = ConfigDict(published())
    c.data = ConfigDict({"source": "stored", "workers": 4, "class_names": "imagenet_classes.txt"})
    return c


def run_locally(c: ConfigDict, step: str = "G") -> ConfigDict:
    """The same method as small as can be: scanned digits, whose captions say which, and a text encoder of its own."""
    c.train_steps = 200
    c.batch_size = 32
    c.log_every_steps = 50
    c.data = ConfigDict({"source": "digits", "vocab_size": 512})
    c.inputs = ConfigDict({"kind": "captions", "image_sizes": ((16, 16),), "caption_dropout": 0.1})
    c.inputs.text = ConfigDict({"preset": "smoke", "vocab_size": 512, "max_tokens": 16})
    c.inputs.codec = ConfigDict({"kind": "patch", "patch": 2, "scale": 1.5, "shift": -0.4})
    small = {"preset": "smoke", "latent_channels": 12, "channels": (16, 32), "head_dim": 8, "groups": 8}
    changed = undone(step)
    if step == "A":
        changed["self_attention"] = (True, True)  # of two stages
    c.network = ConfigDict({"kind": "unet", **small, **changed})
    c.optimizer = ConfigDict({"learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 20})
    c.ema_decay = 0.98
    c.sampling.steps = 10
    c.sample_prompts = ("a photo of a zero", "a photo of a one", "a photo of a seven")
    c.checkpoint = ConfigDict({"every_steps": 100})
    c.evaluation = ConfigDict({"during": ("sample_grid", "validation_loss")})
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: a step of the ladder, "A", "B", "C1", "C2", "D", "E", "F" or "G" (the default), and after a comma "stored"
    for stored latents or "runlocal" for 200 updates of a tiny network on a laptop."""
    step, _, form = (arg or "G").partition(",")
    if step not in LADDER:
        step, form = "G", arg
    if form not in ("", "stored", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; give one of {', '.join(LADDER)}, stored and runlocal, or G,stored")
    c = experiment(epochs=120)
    if form == "runlocal":
        return run_locally(c, step)
    c.network.update(undone(step))
    return on_stored_latents(c) if form else c
