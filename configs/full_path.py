"""The whole way, from a folder of photographs to a verified bundle, with tiny networks in the published layouts.

    snapgen chain --config=configs/full_path.py:runlocal --workdir=full_path
    python -m benchmarks.full_path --scratch=/tmp/full_path      # killed at three random moments, it ends the same

Photographs, shards of images, shards of latents and encodings, pretraining at three sizes, distillation from a tiny
Stable Diffusion 3.5, four steps, a tiny decoder, weights, and a bundle that its own `verify.py` runs. Each stage is a
command of docs/pods.md, or a run of the config that a pod trains with tiny networks in it; a chain that was stopped
goes on where it was. The tiny Stable Diffusion 3.5 and Gemma lie in `tests/goldens/pipeline`, as diffusers and
transformers wrote them, with random weights: nothing here learns to draw.

Machine: two CPU cores. Time: some minutes. Metric: it ends, and `verify.py` says that the bundle is sound.
"""

from ml_collections import ConfigDict

from configs.decoder import sd3_tiny
from configs.distill import t2i_512_sd35l
from configs.fewstep import t2i_1024_4step
from configs.pretrain import t2i_256, t2i_512, t2i_1024

PUBLISHED = "tests/goldens/pipeline"
SIZES = {"256": (24, 24), "512": (32, 32), "1024": (48, 48)}  # that stand for those, in pixels
T5_TOKENS, LANGUAGE_TOKENS = 16, 8


def clip(width: int, activation: str, folder: str, tokenizer: str, name: str) -> dict:
    """A text encoder of CLIP, and where it lies."""
    shape = {"vocab_size": 310, "width": width, "layers": 2, "heads": 2, "projection": width, "activation": activation}
    network = {"preset": name, **shape, "bos_id": 308, "eos_id": 309, "pad_id": 309}
    return {name: network, f"{name}_folder": f"{PUBLISHED}/{folder}", f"{name}_tokenizer": f"{PUBLISHED}/{tokenizer}"}


def clips() -> dict:
    """Both CLIPs, and the autoencoder."""
    return {
        "codec": {"kind": "autoencoder", "autoencoder": {"preset": "smoke"}, "workdir": f"{PUBLISHED}/vae"},
        **clip(8, "quick_gelu", "text_encoder", "tokenizer", "clip_l"),
        **clip(16, "gelu", "text_encoder_2", "tokenizer_2", "clip_g"),
    }


def encoders() -> dict:
    """The student's."""
    shape = {"vocab_size": 341, "width": 20, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_width": 28}
    return {
        **clips(),
        "language": {"preset": "gemma2_2b", **shape, "query_scale": 12, "softcap": 1.5, "window": 5},
        "language_folder": f"{PUBLISHED}/gemma",
        "language_tokenizer": f"{PUBLISHED}/gemma",
        "language_tokens": LANGUAGE_TOKENS,
    }


def teacher_encoders() -> dict:
    """The teacher's."""
    return {
        **clips(),
        "t5": {
            "preset": "xxl",
            "vocab_size": 31,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "head_dim": 8,
            "ffn_width": 24,
        },
        "t5_folder": f"{PUBLISHED}/text_encoder_3",
        "t5_tokenizer": f"{PUBLISHED}/tokenizer_3",
        "t5_tokens": T5_TOKENS,
    }


def pretraining(c: ConfigDict, size: str) -> ConfigDict:
    """A stage of pretraining, on what the tiny encoders make."""
    c.inputs.image_sizes = (SIZES[size],)
    c.inputs.update({"reduction": 2, "latent_channels": 4})
    c.inputs.encoders = ConfigDict(encoders())
    c.inputs.conditioner = ConfigDict({"width": 24, "language_width": 20})
    c.network = ConfigDict({"kind": "unet", "preset": "smoke", "context_width": 24, "pooled_width": 24})
    c.train_steps = 6
    c.log_every_steps = 2
    c.checkpoint = ConfigDict({"every_steps": 3})
    c.evaluation = ConfigDict({"every_steps": 0, "final": ("validation_loss",)})
    c.data.validation_share = 0.2
    c.tensorboard = False
    return c


def taught(c: ConfigDict) -> ConfigDict:
    """The same with the tiny Stable Diffusion 3.5 as the teacher."""
    c = pretraining(c, "1024")
    c.mesh = ConfigDict({})
    shape = {"latent_channels": 4, "depth": 3, "heads": 4, "head_dim": 8, "context_width": 32, "pooled_width": 24}
    network = {"kind": "mmdit", **shape, "position_size": 24, "position_base": 8, "attention": "whole"}
    states = t2i_512_sd35l.stored_states(77 + T5_TOKENS, 32, teacher_encoders(), pooled=24)
    c.teacher = ConfigDict({"network": network, "inputs": states, "weights": f"{PUBLISHED}/transformer"})
    c.teacher_taps = ("block_02",)
    return c


def stage_config(stage: str) -> ConfigDict:
    """The config of a run of the chain."""
    if stage == "distilled":
        return taught(t2i_512_sd35l.distilled(t2i_1024.get_config("runlocal"), devices=1, microbatches=1))
    if stage == "four_steps":
        c = taught(t2i_1024_4step.get_config("runlocal"))
        c.teacher.few_step_times = t2i_1024_4step.TURBO
        c.trunk = "student"
        c.discriminator = ConfigDict({"preset": "smoke", "pooled_width": 24})
        return c
    if stage == "tiny_decoder":
        c = sd3_tiny.get_config("runlocal")
        c.inputs.codec = ConfigDict(clips()["codec"])
        c.tensorboard = False
        return c
    module, size = {"t2i_256": (t2i_256, "256"), "t2i_512": (t2i_512, "512"), "t2i_1024": (t2i_1024, "1024")}[stage]
    return pretraining(module.get_config("runlocal"), size)


RUNS = ("t2i_256", "t2i_512", "t2i_1024", "distilled", "four_steps", "tiny_decoder")


def commands(name: str, earlier: dict, *lines: str, fresh: tuple = (), gives: tuple = ()) -> dict:
    """A stage that runs commands, and leaves what `gives` names in its folder."""
    return {
        "name": name,
        "derive": "snapgen_jax.chain_command:run",
        "earlier": earlier,
        "options": {"commands": lines, "fresh": fresh},
        "example": dict.fromkeys(gives, "a folder"),
    }


def run(name: str, init_from: str = "", **filled: str) -> dict:
    """A stage that trains."""
    config = f"full_path.py:runlocal.{name}"
    return {"name": name, "config": config, "earlier": {"init_from": init_from} if init_from else {}, "filled": filled}


def prepared(count: int, stored: tuple) -> tuple:
    """The stages that make shards, for each of the configs in `stored`."""

    def encode(stage: str) -> str:
        config = f"configs/full_path.py:runlocal.{stage}"
        return f"prepare encode --config={config} --images={{collected}}/images --out={{here}}/{stage}"

    photographs = f"prepare photographs --out={{here}}/images --count={count}"
    collect = "prepare collect --path={photographs}/images --out={here}/images --config.shards=3"
    return (
        commands("photographs", {}, photographs, gives=("images",)),
        commands("collected", {"photographs": "photographs"}, collect, gives=("images",)),
        commands("encoded", {"collected": "collected"}, *map(encode, stored), gives=stored),
    )


def released(stage: str, decoder: str, earlier: dict, options: str = "--encoders=clip_l,clip_g") -> dict:
    """The stage that writes weights and a bundle of a run."""
    return commands(
        "released",
        {"trained": stage, **earlier},
        "weights export --workdir={trained} --out={here}/weights --license=apache-2.0",
        f"export --workdir={{here}}/weights --out={{here}}/bundle {options} --gpu=skip --decoder={decoder}",
        "python {here}/bundle/verify.py",
        fresh=("weights",),
        gives=("weights", "bundle"),
    )


def chain() -> ConfigDict:
    """All stages, in order."""
    stages = (
        *prepared(48, ("t2i_256", "t2i_512", "t2i_1024", "distilled")),
        run("t2i_256", **{"data.path": "encoded.t2i_256"}),
        run("t2i_512", "t2i_256", **{"data.path": "encoded.t2i_512"}),
        run("t2i_1024", "t2i_512", **{"data.path": "encoded.t2i_1024"}),
        run("distilled", "t2i_1024", **{"data.path": "encoded.distilled"}),
        run("four_steps", "distilled", **{"data.path": "encoded.distilled"}),
        run("tiny_decoder", **{"data.path": "photographs.images"}),
        released("four_steps", "{tiny_decoder}", {"tiny_decoder": "tiny_decoder"}),
    )
    return ConfigDict({"stages": stages, "scores": ()})


def shortest() -> ConfigDict:
    """One run, distilled from nothing, with the published decoder."""
    stages = (
        *prepared(16, ("distilled",)),
        run("distilled", **{"data.path": "encoded.distilled"}),
        released("distilled", f"{PUBLISHED}/vae", {}, "--encoders=clip_l --precisions=f32"),
    )
    return ConfigDict({"stages": stages, "scores": ()})


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for the chain, "shortest" for its ends with one run between them, "runlocal.STAGE" for one of
    its runs."""
    forms = {"runlocal": chain, "shortest": shortest}
    name, _, stage = (arg or "").partition(".")
    if name not in forms or (stage and (name, stage) not in {("runlocal", run) for run in RUNS}):
        known = ", ".join([*forms, *(f"runlocal.{run}" for run in RUNS)])
        raise ValueError(f"unknown argument {arg!r}; the argument is one of {known}")
    return stage_config(stage) if stage else forms[name]()
