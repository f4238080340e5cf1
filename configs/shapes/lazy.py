"""LazyDiT in the shapes world: gates that skip attention and feed-forward calls of a trained DiT's 20-step sampler.

    snapgen train --config=configs/shapes/lazy_base.py --workdir=runs/dit
    snapgen train --config=configs/shapes/lazy.py --workdir=runs/lazy --config.base=runs/dit
    snapgen sample --workdir=runs/lazy --lazy=0.3 --prompt="a red circle"

`docs/lazydit.md` says what the options are. Machine: two CPU cores. Time: a few minutes. Metric:
`validation_loss.mean`, the squared error that skipping makes, beside `validation_loss.skipped`.
"""

from ml_collections import ConfigDict

from configs.shapes import lazy_base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `lazy_base.py`."""
    c = lazy_base.get_config(arg)
    c.recipe = "lazy_gates"
    c.base = "runs/dit"
    c.train_steps = 500
    c.log_every_steps = 20
    # The paper's rate, 1e-4, is for sums over 256 tokens of width 1152; a logit here is a sum of 17 times fewer terms.
    c.optimizer = ConfigDict({"learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.0})
    c.ema_decay = 0.0
    c.sampling = ConfigDict({"steps": 20, "guidance": 2.0, "shift": 3.0})
    c.rho_attention = c.rho_ffn = 1e-3
    c.checkpoint.every_steps = 250
    c.evaluation = ConfigDict({"every_steps": 250, "during": (), "final": ("validation_loss", "sample_grid")})
    if arg == "runlocal":
        c.train_steps = 6
        c.log_every_steps = 2
        c.sampling.steps = 4
        c.checkpoint.every_steps = 3
    return c
