"""SnapFusion's robust training of Stable Diffusion 1.5's UNet, at 512 px: blocks of a batch are left out by chance.

    snapgen plan  --config=configs/snapfusion/robust.py --topology=v5e:16x16
    snapgen train --config=configs/snapfusion/robust.py --workdir=gs://BUCKET/sd15_v --config.data.path=PHOTOS \
        --config.drop=0 --config.final_drop=0 --config.init_from=sd15/unet
    snapgen train --config=configs/snapfusion/robust.py --workdir=gs://BUCKET/robust --config.data.path=PHOTOS \
        --config.init_from=gs://BUCKET/sd15_v
    snapgen train --config=configs/snapfusion/robust.py:evolved --workdir=gs://BUCKET/evolved \
        --config.data.path=PHOTOS --config.init_from=gs://BUCKET/robust
    snapgen train --config=configs/snapfusion/robust.py:runlocal --workdir=/tmp/robust

The first of these runs makes the network of v-prediction that step distillation begins with, from the published UNet,
which predicts eps: `sd15` is the folder of `configs/teacher/sd15.py`. The second makes the one whose blocks can be
valued, and the third goes on with the architecture that the paper found (table 3 of arXiv 2306.00980): no attention at
the highest resolution, and six transformers where it has a quarter of its side.
PHOTOS are captioned images; CLIP-L and the autoencoder of Stable Diffusion 1 lie in `sd15/`.

Machine: 256 chips of TPU v5e; runlocal, a laptop in a minute. Metric: `validation_loss.without.one` beside
`validation_loss.mean`. The paper says neither the probability of leaving out nor the length.
"""

from ml_collections import ConfigDict

EVOLVED = {  # where blocks of the evolved UNet come from, as way_stage_layer_block; all others keep their places
    "down_2_0_2": "down_2_1_1",
    "up_2_0_2": "up_2_0_1",
    "up_2_0_3": "up_2_1_1",
    "up_2_1_0": "up_2_2_0",
    "up_2_1_2": "up_2_2_1",
    "up_2_1_3": "up_2_2_1",
    "up_3_1_0": "up_3_2_0",
}


def schedule() -> ConfigDict:
    """That of Stable Diffusion 1.5, whose steps of 8 are among those of 16, and these among those of 32."""
    return ConfigDict({"kind": "vp", "spacing": "trailing"})


def path(block: str) -> str:
    """Of a block among the parameters."""
    way, *numbers = block.split("_")
    return "/".join([way, *(f"block_{int(number):02d}" for number in numbers)])


def experiment(preset: str) -> ConfigDict:
    """What the runs of this folder have in common; `preset` names the student's UNet."""
    c = ConfigDict()
    c.batch_size = 2_048
    c.microbatches = 2
    c.log_every_steps = 100
    c.data = ConfigDict({"source": "folder", "path": "", "workers": 8})
    c.inputs = ConfigDict(
        {
            "kind": "clip_captions",
            "image_sizes": ((512, 512),),
            "null": "empty_prompt",
            "clip_l": {"preset": "sd15"},
            "codec": {"kind": "autoencoder", "autoencoder": {"preset": "sd1"}, "workdir": "sd15/vae"},
            "clip_l_folder": "sd15/text_encoder",
            "clip_l_tokenizer": "sd15/tokenizer",
        }
    )
    c.network = ConfigDict({"kind": "sd_unet", "preset": preset, "remat": "blocks"})
    c.prediction = "v"
    c.schedule = schedule()
    c.optimizer = ConfigDict({"learning_rate": 1e-5, "warmup_steps": 500, "weight_decay": 0.01})
    c.ema_decay = 0.9999
    c.sampling = ConfigDict({"steps": 50, "guidance": 7.5})
    # A share is gathered anew at each call of a network: of four 3/4 of it, of sixteen 15/16.
    c.mesh = ConfigDict({"fsdp": 4})
    c.checkpoint = ConfigDict({"every_steps": 1_000})
    c.evaluation = ConfigDict({"every_steps": 5_000, "during": ("validation_loss",), "final": ("validation_loss",)})
    return c


def run_locally(c: ConfigDict) -> ConfigDict:
    """The same run, as small as can be."""
    c.train_steps = 6
    c.batch_size = 8
    c.microbatches = 1
    c.log_every_steps = 2
    c.mesh = ConfigDict({"fsdp": 1})
    c.data = ConfigDict({"source": "synthetic"})
    clip = {"preset": "smoke", "vocab_size": 512, "width": 24, "max_tokens": 7, "projection": 24, "eos_id": 511}
    codec = {"kind": "autoencoder", "autoencoder": {"preset": "smoke"}}
    encoders = {"codec": codec, "clip_l": clip, "stand_ins": True}
    c.inputs = ConfigDict({"kind": "clip_captions", "image_sizes": ((16, 16),), "null": "empty_prompt", **encoders})
    c.network = ConfigDict({"kind": "sd_unet", "preset": "smoke"})
    c.optimizer.warmup_steps = 2
    c.sampling.steps = 2
    c.checkpoint.every_steps = 3
    c.evaluation.every_steps = 3
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for the UNet of Stable Diffusion 1.5, "evolved" for SnapFusion's, "runlocal" for six updates of a
    tiny one on a laptop."""
    if arg not in (None, "evolved", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are evolved and runlocal, or nothing")
    c = experiment("snapfusion" if arg == "evolved" else "sd15")
    c.recipe = "block_dropping"
    c.train_steps = 50_000
    c.drop, c.final_drop = 0.1, 0.2
    if arg == "evolved":
        c.init_from = "robust"
        c.moved = tuple((path(block), path(source)) for block, source in EVOLVED.items())
    return run_locally(c) if arg == "runlocal" else c
