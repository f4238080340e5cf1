"""Gates of the published Stable Diffusion 3.5 Large at 1024 px, by LazyDiT (arXiv 2412.12444); no result is published.

    snapgen plan  --config=configs/lazy/sd35_large.py --topology=v5p:4x4x4
    snapgen prepare encode --config=configs/lazy/sd35_large.py --images=IMAGES --out=SHARDS
    snapgen train --config=configs/lazy/sd35_large.py --config.data.path=SHARDS --workdir=gs://BUCKET/lazy_sd35

The repository of Stable Diffusion 3.5 Large lies in `sd35/`. Its MMDiT is split over `fsdp`, and gates are whole on
every chip. A block has three modules: the joint attention, and a feed-forward network of the image and of the text.
113 modules of 28 steps have vectors of 2,432: 7,694,848 numbers.

In some minutes on a laptop, from a folder of captioned pictures, with encoders that are drawn:

    snapgen prepare collect --path=PHOTOS --out=/tmp/photos
    snapgen prepare encode --config=configs/lazy/sd35_large.py:runlocal --images=/tmp/photos --out=/tmp/lazy_sd35_shards
    snapgen train --config=configs/lazy/sd35_large.py:runlocal,base --workdir=/tmp/lazy_sd35_base \
        --config.data.path=/tmp/lazy_sd35_shards
    snapgen train --config=configs/lazy/sd35_large.py:runlocal --workdir=/tmp/lazy_sd35 \
        --config.base=/tmp/lazy_sd35_base --config.data.path=/tmp/lazy_sd35_shards

Machine: 64 chips of TPU v5p; elsewhere add `--config.network.attention=auto`. Metric: `validation_loss.mean` beside
`validation_loss.skipped`. Optimizer and length are the paper's; steps, guidance and shift are the model card's and
its scheduler's. The price is that of the paper's 50-step DiT, a place to begin.
"""

from ml_collections import ConfigDict

from configs.distill import t2i_512_sd35l
from configs.lazy import dit_xl2_256
from configs.pretrain import t2i_256

SIZE = 1024


def gates() -> ConfigDict:
    """Gates of Stable Diffusion 3.5 Large on stored latents and text states."""
    c = dit_xl2_256.trained_gates()
    c.base = "sd35/transformer"
    c.batch_size = 64
    states = t2i_512_sd35l.stored_states(tokens=333, width=4096, encoders=t2i_512_sd35l.published())
    c.inputs = ConfigDict({**states, "prefix": "", "latent_channels": 16, "image_sizes": ((SIZE, SIZE),)})
    c.data = ConfigDict({"source": "stored", "workers": 4})
    c.network = ConfigDict({"kind": "mmdit", "preset": "sd35_large", "attention": "flash"})
    c.schedule = ConfigDict({"kind": "flow"})
    c.mesh = ConfigDict({"data": 1, "fsdp": -1})
    c.sampling = ConfigDict({"steps": 28, "guidance": 3.5, "shift": 3.0})
    return c


def run_locally(c: ConfigDict) -> ConfigDict:
    """The same gates as small as can be."""
    c = dit_xl2_256.shortened(c)
    encoders = {"codec": t2i_256.tiny_autoencoder(), **t2i_512_sd35l.tiny()}
    states = t2i_512_sd35l.stored_states(tokens=12, width=16, encoders=encoders, pooled=16)
    c.inputs = ConfigDict({**states, "prefix": "", "latent_channels": 16, "image_sizes": ((64, 64),)})
    c.data.workers = 0
    c.network = ConfigDict({"kind": "mmdit", "preset": "smoke", "latent_channels": 16})
    c.mesh = ConfigDict({})
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "runlocal" for six updates of tiny gates on a laptop; or "runlocal,base" for the run they are of."""
    dit_xl2_256.check(arg)
    c = gates()
    if arg is None:
        return c
    return dit_xl2_256.base_of(run_locally(c)) if "base" in arg else run_locally(c)
