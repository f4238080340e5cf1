"""The quickstart: a SnapGen UNet and its text encoder learn the shapes world from nothing.

    snapgen quickstart --workdir=quickstart

Machine: two CPU cores. Time: ten minutes, with scoring and export. Metric: `score.overall` 0.66 (0.61 to 0.70).
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None, or "runlocal" for a run of a few seconds that shows only that everything works."""
    if arg not in (None, "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "flow_matching"
    c.train_steps = 12_000
    c.batch_size = 16
    c.log_every_steps = 100
    # "mixed" captions are a superset that the score does not ask for; relations are what takes longest to learn.
    shares = {
        "single_object": 0.1,
        "two_objects": 0.16,
        "counting": 0.18,
        "colours": 0.12,
        "position": 0.24,
        "binding": 0.2,
        "mixed": 0.0,
    }
    shapes = {"size": 32, "shares": shares, "dense_share": 0.4}  # dense captions teach what words of place mean
    c.data = ConfigDict({"source": "shapes", "vocab_size": 512, "shapes": shapes})
    # The SnapGen layout with two stages. The transformers of the first stage stand on the way up, where the second has
    # already looked at the whole picture: at equal cost and images that lowers the loss at every time.
    c.network = ConfigDict(
        {
            "kind": "unet",
            "latent_channels": 48,
            "channels": (64, 64),
            "units": 1,
            "down_depth": (0, 1),
            "mid_depth": 1,
            "up_depth": (1, 1),
            "first_stage": "res",
            "self_attention": (True, True),
            "cross_attention": (True, True),
            "absolute_positions": True,  # which side is left
            "sampler": "sep",
            "head_dim": 32,
            "groups": 16,
            "context_width": 64,
            "pooled_width": 64,
            "embedding_width": 128,
        }
    )
    text = ConfigDict(
        {
            "vocab_size": 512,
            "width": 64,
            "heads": 2,
            "layers": 1,
            "max_tokens": 20,
            "projection": 64,
            "embedding_std": 1.0,
            "attention": "full",
            "neighbours": 4,  # whose colour is whose
        }
    )
    codec = {"kind": "patch", "patch": 4}
    c.inputs = ConfigDict({"kind": "captions", "image_sizes": ((32, 32),), "text": text, "codec": codec})
    c.prediction = "x_0"  # 48 channels of noise need not pass through a network 48 wide
    # Flat colours survive much noise: what a caption says is decided at t > 0.85 and where things go at t > 0.95. So
    # training begins there, and ends where outlines are drawn.
    c.schedule = ConfigDict({"kind": "flow", "density": "logit_normal", "mean": 1.7, "final_mean": 0.4, "std": 1.2})
    c.loss_full_from = 0.5  # with little noise the velocity's error is the image's many times over
    c.optimizer = ConfigDict({"learning_rate": 3e-3, "schedule": "linear", "warmup_steps": 200})
    c.ema_decay = 0.998
    c.sampling = ConfigDict({"steps": 24, "guidance": 2.0, "shift": 3.0})
    c.sample_prompts = (
        "a red circle",
        "a blue square",
        "a green star",
        "a ring",
        "a cross and a triangle",
        "two orange circles",
        "three squares",
        "four crosses",
        "a yellow triangle",
        "a black ring",
        "a circle left of a square",
        "a star above a ring",
        "a triangle below a circle",
        "a red circle and a blue cross",
        "a purple star and a green square",
        "a cyan triangle right of a black star",
    )
    c.checkpoint = ConfigDict({"every_steps": 2000})
    c.evaluation = ConfigDict({"every_steps": 2500, "during": ("sample_grid",), "final": ("sample_grid",)})
    if arg == "runlocal":
        c.train_steps = 20
        c.batch_size = 8
        c.log_every_steps = 5
        c.network = ConfigDict({"kind": "unet", "preset": "smoke", "latent_channels": 48})
        c.inputs.text = ConfigDict({"preset": "smoke", "vocab_size": 512, "max_tokens": 20})
        c.optimizer.warmup_steps = 5
        c.sampling.steps = 2
        c.checkpoint.every_steps = 10
        c.evaluation.every_steps = 10
    return c
