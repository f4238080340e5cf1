"""TextCraftor on SnapGen's four-step generator at 1024 px: CLIP-L is tuned through all four steps.

    snapgen plan  --config=configs/reward/t2i_1024_4step.py --topology=v5p:4x4x4
    snapgen train --config=configs/reward/t2i_1024_4step.py --workdir=gs://BUCKET/t2i_reward \
        --config.init_from=gs://BUCKET/t2i_4step --config.inputs.codec.decoder_workdir=gs://BUCKET/sd3_tiny \
        --config.inputs.language_folder=gemma --config.inputs.language_tokenizer=gemma --config.data.path=PROMPTS
    snapgen train --config=configs/reward/t2i_1024_4step.py:adapters --workdir=gs://BUCKET/t2i_reward_unet ...
    snapgen train --config=configs/reward/t2i_1024_4step.py:runlocal --workdir=/tmp/t2i_reward \
        --config.init_from=/tmp/t2i_4step --config.data.path=prompts.txt

The base is a run of `configs/fewstep/t2i_1024_4step.py`, the last one before a bundle, and the tiny decoder one of
`configs/decoder/sd3_tiny.py`. Four jumps without guidance are all there is, so that K = 4: the tuned encoder is the
encoder of every step, and a bundle of the run is like any other. CLIP-bigG, Gemma and the conditioner stay. `:adapters`
tunes the UNet by LoRA in place of CLIP-L; `tuned_text` then names the run whose CLIP-L it goes with.

The paper has no such generator: weights and learning rate are those of `sd15.py`. Machine: 64 chips of TPU v5p;
runlocal, a laptop in some minutes. Metric: `reward.total` beside `clip_score`.
"""

from ml_collections import ConfigDict

from configs.fewstep import t2i_1024_4step
from configs.pretrain import t2i_256
from configs.reward import sd15


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for CLIP-L, "adapters" for LoRA of the UNet, or "runlocal" for a few updates of tiny networks."""
    if arg not in (None, "adapters", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are adapters and runlocal, or nothing")
    base = t2i_1024_4step.get_config("runlocal" if arg == "runlocal" else None)
    c = ConfigDict()
    c.recipe = "reward_tuning"
    c.init_from = "t2i_4step"
    c.train_steps = 10_000
    c.batch_size = 256
    c.log_every_steps = 100
    for name in ("network", "schedule", "sampling"):
        c[name] = base[name]
    c.network.remat = "blocks"
    encoders = {**t2i_256.published(), "kind": "encoders", "image_sizes": ((1024, 1024),)}
    encoders["codec"] = {**encoders["codec"], "decoder": "tiny", "tiny_decoder": {"preset": "sd3"}}
    c.inputs = ConfigDict({**encoders, "caption_dropout": 0.0, "encoder_dropout": 0.0})
    c.data = ConfigDict({"source": "prompts", "path": ""})
    c.optimizer = ConfigDict({"learning_rate": 1e-6, "warmup_steps": 0, "weight_decay": 0.01, "clip_norm": 0.0})
    c.trains = "text"
    c.encoder = "clip_l"
    c.backprop_steps = c.sampling.steps
    sd15.rewards(c)
    c.mesh = ConfigDict({"fsdp": 1})
    c.checkpoint = ConfigDict({"every_steps": 1_000})
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": ("rewards",), "final": ("rewards",)})
    if arg == "adapters":
        c.trains = "network_adapters"
        c.lora = ConfigDict({"rank": 16, "alpha": 16.0})
        c.optimizer.learning_rate = 1e-5
    if arg == "runlocal":
        c.train_steps = 4
        c.batch_size = 8
        c.log_every_steps = 2
        c.data.validation_share = 0.5
        small = {**base.inputs.encoders.to_dict(), "kind": "encoders", "image_sizes": ((64, 64),)}
        c.inputs = ConfigDict({**small, "conditioner": {"preset": "smoke"}, "encoder_dropout": 0.0})
        c.network.remat = "none"
        c.checkpoint.every_steps = 2
        sd15.tiny_rewards(c, tokens=7)
    return c
