"""TextCraftor on Stable Diffusion 1.5: rewards of its own images tune the text encoder, then the UNet, at 512 px.

    hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir sd15
    snapgen plan  --config=configs/reward/sd15.py --topology=v5e:16x16
    snapgen train --config=configs/reward/sd15.py --workdir=gs://BUCKET/sd15_text --config.data.path=PROMPTS
    snapgen train --config=configs/reward/sd15.py:network --workdir=gs://BUCKET/sd15_both \
        --config.tuned_text=gs://BUCKET/sd15_text --config.data.path=PROMPTS
    snapgen train --config=configs/snapfusion/robust.py:runlocal --workdir=/tmp/robust
    snapgen train --config=configs/reward/sd15.py:runlocal --workdir=/tmp/reward --config.init_from=/tmp/robust \
        --config.data.path=prompts.txt

PROMPTS is a text file with a prompt a line; the paper takes OpenPrompts. UNet, text encoder and autoencoder are read
from `sd15/`; the rewards lie in folders of their own. `docs/networks.md` says where each comes from, on which terms.
A run of `configs/snapfusion/robust.py` is improved likewise, with `--config.init_from=RUN --config.prediction=v
--config.schedule.spacing=trailing`.

Rewards, weights, learning rate, batch and length are those of the authors' script (arXiv 2403.18978): 25 steps of DDIM
at guidance 7.5, gradients through 5, drawn with 15. Machine: 256 chips of TPU v5e; runlocal, a laptop in a minute.
Metric: `reward.total` beside `clip_score`.
"""

from ml_collections import ConfigDict

from configs.snapfusion import robust


def rewards(c: ConfigDict) -> ConfigDict:
    """The rewards of the paper, and CLIP-g as the constraint."""

    def published(name: str, weight: float, **more: str) -> dict:
        network = {"kind": "reward", "preset": name}
        return {"network": network, "published": name, "folder": f"rewards/{name}", "weight": weight, **more}

    aesthetic = {"folder": "rewards/clip_l", "head_folder": "rewards/aesthetic"}
    c.rewards = ConfigDict(
        {
            "aesthetic": {**published("aesthetic", 3.0), **aesthetic},
            "pickscore": published("pickscore", 1.0),
            "hpsv2": published("hpsv2", 100.0),
        }
    )
    network = {"kind": "reward", "vision": {"preset": "g_14"}, "text": {"preset": "clip_little_g"}}
    c.constraint = ConfigDict(
        {"network": network, "published": "clip_little_g", "folder": "rewards/clip_little_g", "weight": 50.0}
    )
    return c


def tiny_rewards(c: ConfigDict, tokens: int) -> ConfigDict:
    """Two rewards as they are drawn, which read so many tokens."""
    vision = {"preset": "smoke", "image_size": 16}
    text = {"preset": "smoke", "vocab_size": 512, "max_tokens": tokens, "eos_id": 511}
    source = {"network": {"kind": "reward", "vision": vision, "text": text}, "stand_in": True}
    c.rewards = ConfigDict({"drawn": source})
    c.constraint = ConfigDict(source)
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for the text encoder, "network" for the UNet with a tuned encoder, or "runlocal" for a few updates of
    tiny networks on a laptop."""
    if arg not in (None, "network", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are network and runlocal, or nothing")
    c = robust.experiment("sd15")
    c.recipe = "reward_tuning"
    c.init_from = "sd15/unet"
    c.prediction, c.schedule = "eps", ConfigDict({"kind": "vp"})
    c.train_steps = 10_000
    c.batch_size = 256
    c.microbatches = 1
    c.data = ConfigDict({"source": "prompts", "path": ""})
    c.optimizer = ConfigDict({"learning_rate": 1e-6, "warmup_steps": 0, "weight_decay": 0.01, "clip_norm": 0.0})
    c.ema_decay = 0.0
    c.sampling = ConfigDict({"steps": 25, "guidance": 7.5, "tuned_steps": 15})
    c.backprop_steps = 5
    rewards(c)
    c.evaluation = ConfigDict({"every_steps": 1_000, "during": ("rewards",), "final": ("rewards",)})
    if arg == "network":
        c.trains = "network"
        c.tuned_text = "sd15_text"
    if arg == "runlocal":
        path = c.data
        robust.run_locally(c)
        c.prediction, c.schedule = "v", robust.schedule()
        c.data = path
        c.data.validation_share = 0.5
        c.train_steps = 4
        c.optimizer.warmup_steps = 0
        c.sampling = ConfigDict({"steps": 4, "guidance": 7.5, "tuned_steps": 3})
        c.backprop_steps = 2
        tiny_rewards(c, tokens=7)
    return c
