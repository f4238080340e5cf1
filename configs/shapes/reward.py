"""TextCraftor in the shapes world: rewards of its own images tune the text encoder of a finished run.

    snapgen train --config=configs/shapes/reward.py --workdir=runs/reward --config.init_from=runs/base
    snapgen train --config=configs/shapes/reward.py:network --workdir=runs/both --config.init_from=runs/base \
        --config.tuned_text=runs/reward
    snapgen sample --workdir=runs/reward --encoder_mix=0.5 --prompt="a red circle left of a blue square"

`runs/base` is a run of `adapters_base.py`, `runs/detection` one of `detection.py` and `runs/clip` one of `clip.py`,
trained with the base's tokenizer; `reward_chain.py` trains all of them. The second line tunes the network, with the
tuned encoder as it is. Metric: `score.overall`, by the exact detector, which is no reward; `diversity` must stay.

What is drawn is decided at much noise here, and where it goes at still more: gradients through the last steps alone
would come too late. So few steps, and through all of them; along the velocities, since through the Jacobians of all
later steps few images would drown the rest. Machine: two CPU cores. Time: eight minutes.
"""

from ml_collections import ConfigDict

from configs.shapes import adapters_base, clip, detection

STEPS = 8


def rewards(c: ConfigDict, arg: str | None) -> ConfigDict:
    """The detector that learnt from renders, and CLIP as the constraint."""
    network = {**detection.get_config(arg).network.to_dict(), "kind": "detection"}
    c.rewards = ConfigDict({"detection": {"network": network, "workdir": "runs/detection", "weight": 1.0}})
    of_clip = clip.get_config(arg)
    encoders = {"vision": of_clip.image.to_dict(), "text": of_clip.inputs.text.to_dict()}
    network = {"kind": "reward", **encoders, "preprocessing": "signed", "padding": "hidden"}
    c.constraint = ConfigDict({"network": network, "workdir": "runs/clip", "weight": 1.0})
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for the text encoder, "network" for the network with a tuned encoder; "quick" and "quick_network" in
    the simpler world of single objects; or "runlocal" and "runlocal_network" for a run of a few seconds."""
    form = (arg or "").removesuffix("network").removesuffix("_") or None
    c = adapters_base.get_config(form)
    c.recipe = "reward_tuning"
    c.init_from = "runs/base"
    c.train_steps = 300
    c.batch_size = 16
    c.log_every_steps = 10
    c.optimizer = ConfigDict({"learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 20, "weight_decay": 0.0})
    c.optimizer.clip_norm = 0.15  # about what most batches have
    c.ema_decay = 0.97
    c.sampling = ConfigDict({"steps": STEPS, "guidance": 2.0, "shift": 3.0})
    c.backprop_steps = STEPS
    c.stop_input_gradient = True
    rewards(c, form)
    c.data.shapes.dense_share = 0.0  # the detector reads what phrases demand
    c.checkpoint.every_steps = 100
    c.evaluation = ConfigDict({"every_steps": 100, "during": ("rewards",), "final": ("rewards", "sample_grid")})
    if arg and arg.endswith("network"):
        c.trains = "network"
        c.optimizer.learning_rate = 1e-4
        c.tuned_text = "runs/reward"
    if form == "runlocal":
        c.train_steps = 6
        c.batch_size = 8
        c.log_every_steps = 3
        c.optimizer.warmup_steps = 2
        c.sampling.steps = 3
        c.backprop_steps = 2
        c.checkpoint.every_steps = 3
        c.evaluation.every_steps = 3
    return c
