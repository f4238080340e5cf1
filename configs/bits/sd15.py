"""Stable Diffusion 1.5's UNet in 1.99 bits a weight, as BitsFusion publishes its bits (arXiv 2406.04333, appendix H).

    snapgen plan  --config=configs/bits/sd15.py --topology=v5e:4x4 --batch_size=256
    snapgen train --config=configs/bits/sd15.py --workdir=gs://BUCKET/sd15_bits --config.data.path=SHARDS \
        --config.base=SD15 --config.init_from=SD15
    snapgen train --config=configs/bits/sd15.py:data --workdir=gs://BUCKET/sd15_bits_data --config.data.path=SHARDS \
        --config.base=SD15 --config.init_from=gs://BUCKET/sd15_bits

SD15 is `unet/` of the folder of `configs/teacher/sd15.py`, or a run whose `network` is this. Stage I is 20,000 updates
of 256 examples, stage II, `:data`, 50,000 of 1,024. Of the UNet's 831.2M stored weights each takes 2.05 bits; the
paper's 1.99 divides by the layers of time, too, which a table of 50 steps replaces. The file is 219 MB.

Machine: 16 chips of TPU v5e; runlocal, a laptop in a minute. Metric: the fixed-noise validation loss.
"""

from ml_collections import ConfigDict

# Bits of a transformer: project_in | self query, key, value, out | cross query, key, value, out | ffn inner, outer |
# project_out. Bits of a residual block: conv_1, conv_2 and, where there is one, skip. Stages count from the highest
# resolution, as in `networks/sd_unet.py`; published are the ways up from the lowest.
TRANSFORMERS = {
    "down/block_00": ("6|5,5,4,6|5,7,3,3|3,3|5", "4|3,4,6,5|5,7,2,3|3,3|6"),
    "down/block_01": ("4|3,3,4,4|3,5,4,3|2,2|4", "4|2,2,4,4|3,6,4,3|2,2|4"),
    "down/block_02": ("3|3,2,3,3|3,4,4,3|2,1|3", "4|4,2,3,3|3,4,4,3|2,2|4"),
    "up/block_02": ("3|2,1,2,3|3,4,4,2|2,2|3", "3|2,2,2,2|2,4,3,1|1,1|3", "3|1,1,2,2|1,3,2,1|1,1|2"),
    "up/block_01": ("4|2,2,3,3|1,2,1,1|1,1|3", "4|2,3,3,3|1,3,1,1|1,1|3", "4|2,2,2,3|2,3,1,1|1,1|3"),
    "up/block_00": ("4|2,2,6,3|2,3,1,1|1,1|4", "4|2,3,5,3|2,3,1,1|2,1|4", "6|2,3,4,3|4,5,1,1|3,2|4"),
}
MIDDLE = "2|3,1,2,2|1,4,4,3|2,1|3"
RESIDUALS = {
    "down/block_00": ((3, 3), (3, 4)),
    "down/block_01": ((3, 3, 7), (3, 2)),
    "down/block_02": ((3, 2, 4), (2, 1)),
    "down/block_03": ((1, 1), (1, 1)),
    "up/block_03": ((1, 2, 1), (1, 1, 1), (2, 1, 1)),
    "up/block_02": ((1, 1, 3), (1, 1, 3), (1, 1, 3)),
    "up/block_01": ((1, 2, 4), (1, 2, 4), (1, 1, 4)),
    "up/block_00": ((1, 2, 4), (2, 2, 4), (2, 2, 4)),
}
SAMPLERS = {"downsamplers": (4, 4, 1), "upsamplers": (3, 2, 1)}
IN_TRANSFORMER = (
    "project_in",
    *(
        f"blocks/block_00/{kind}_attention/{name}"
        for kind in ("self", "cross")
        for name in ("query", "key", "value", "out")
    ),
    "blocks/block_00/ffn/inner",
    "blocks/block_00/ffn/outer",
    "project_out",
)
IN_RESIDUAL = ("conv_1", "conv_2", "skip")


def published_bits() -> dict[str, int]:
    """`{layer: bits}` of the 256 layers."""
    found = {}

    def add(module: str, names: tuple[str, ...], bits: tuple[int, ...]) -> None:
        found.update({f"{module}/{name}": b for name, b in zip(names, bits, strict=False)})

    def transformer(module: str, bits: str) -> None:
        add(module, IN_TRANSFORMER, tuple(int(b) for b in bits.replace("|", ",").split(",")))

    for stage, layers in TRANSFORMERS.items():
        for i, bits in enumerate(layers):
            transformer(f"{stage}/block_{i:02d}/block_01", bits)
    for stage, layers in RESIDUALS.items():
        for i, bits in enumerate(layers):
            add(f"{stage}/block_{i:02d}/block_00", IN_RESIDUAL, bits)
    transformer("mid/block_01", MIDDLE)
    for block in ("mid/block_00", "mid/block_02"):
        add(block, IN_RESIDUAL, (1, 1))
    for samplers, all_bits in SAMPLERS.items():
        found.update({f"{samplers}/block_{i:02d}/conv": b for i, b in enumerate(all_bits)})
    return found


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None for stage I, "data" for stage II, or "runlocal" for a few updates of a tiny network of the kind."""
    if arg not in (None, "data", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is data, runlocal, or nothing")
    c = ConfigDict()
    c.recipe = "quantised"
    c.train_steps = 20_000
    c.batch_size = 256
    c.microbatches = 2
    c.log_every_steps = 100
    c.base = c.init_from = "sd15"
    c.network = ConfigDict({"kind": "sd_unet", "preset": "sd15", "remat": "blocks"})
    c.prediction = "eps"
    c.schedule = ConfigDict({"kind": "vp", "density_power": 3.0})
    c.inputs = ConfigDict({"kind": "stored_clip_captions", "image_sizes": ((512, 512),), "null": "empty_prompt"})
    c.inputs.encoders = ConfigDict({"clip_l": {"preset": "sd15"}})
    c.data = ConfigDict({"source": "stored", "workers": 4})
    c.mesh = ConfigDict({"data": 1, "fsdp": 16})  # a chip that held all of the state would have 7 GB left, of 17
    c.bits = published_bits()
    c.optimizer = ConfigDict({"learning_rate": 1e-5, "warmup_steps": 0, "weight_decay": 0.0})
    c.sampling = ConfigDict({"steps": 50, "guidance": 7.5})
    c.checkpoint = ConfigDict({"every_steps": 1_000})
    if arg == "data":
        c.learns_from = "data"
        c.train_steps = 50_000
        c.batch_size = 1_024
        c.microbatches = 8
        c.init_from = "sd15_bits"
    if arg == "runlocal":
        c.train_steps = 6
        c.batch_size = 8
        c.microbatches = 1
        c.mesh = ConfigDict({"fsdp": 1})
        c.log_every_steps = 2
        c.data.workers = 0
        c.network = ConfigDict({"kind": "sd_unet", "preset": "smoke", "context_width": 6})
        clip = {"preset": "smoke", "vocab_size": 512, "width": 6, "max_tokens": 7, "projection": 6, "eos_id": 511}
        encoders = {"clip_l": clip, "stand_ins": True}
        c.inputs = ConfigDict({"kind": "stored_clip_captions", "image_sizes": ((64, 64),), "encoders": encoders})
        c.bits = {}
        c.sampling.steps = 2
        c.checkpoint.every_steps = 3
    return c
