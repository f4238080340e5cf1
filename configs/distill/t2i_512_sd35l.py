"""Distillation of the 379M UNet from Stable Diffusion 3.5 Large, at 512 px.

    snapgen plan  --config=configs/distill/t2i_512_sd35l.py --topology=v5p:4x4x4
    snapgen train --config=configs/distill/t2i_512_sd35l.py --workdir=gs://BUCKET/t2i_512_kd \
        --config.init_from=gs://BUCKET/t2i_256 --config.teacher.weights=DIR/transformer --config.data.path=SHARDS
    snapgen train --config=configs/distill/t2i_512_sd35l.py:runlocal --workdir=/tmp/t2i_512_kd \
        --config.data.path=/tmp/t2i_512_kd_shards

The teacher is read from the folder `transformer/` of the published repository, in bfloat16, and split over `fsdp`; the
student is whole on every device. Latents and the text states of both are batch inputs, which `snapgen prepare encode`
makes with this config, as in `configs/pretrain/t2i_256.py`; `--config.teacher.inputs.text=tokens` stores the token ids
of the teacher's captions and runs its encoders in the step.

Where every encoder of the student is left out the teacher is told nothing either; where any is kept it reads the whole
caption. The student's highest stage on the way up is compared with the teacher's last block, 37 (SnapGen++, arXiv
2601.08303, eq. 7). The teacher attends by a kernel for TPUs; elsewhere add
`--config.teacher.network.attention=auto`. Losses are scaled by the paper's running ratio; what the shapes world shows
is the weighting without it, `--config.scaling.ratio=none`, and students that were worse with it (docs/measured.md).
`--config.teacher.precision=int8` multiplies the teacher's tokens in int8, at twice the rate of v5e, v5p and v6e
(docs/measured.md); on NVIDIA GPUs from Ada on `fp8` does so in e4m3.

Machine: 64 chips of TPU v5p; runlocal, a laptop in some minutes. Metric: the fixed-noise validation loss. Weights, taps
and lengths: SnapGen (arXiv 2412.09619) publishes none but the form of the loss. Batch and length are those with which
SnapGen++ distils at 1024 px, 2,048 for 100,000 updates; its 8,192 are of pretraining at 256 px. It has no distillation
at 512 px; that is ours. Guidance: swept as in `configs/pretrain/t2i_256.py`.
"""

from ml_collections import ConfigDict

from configs.pretrain import t2i_256, t2i_512


def stored_states(tokens: int, width: int, encoders: dict, pooled: int = 2048) -> dict:
    """What the teacher reads: the states of its own encoders, 77 of CLIP and 256 of T5, on the student's latents."""
    shape = {"context_tokens": tokens, "context_width": width, "pooled_width": pooled, "latent_channels": 0}
    return {"kind": "stored", "prefix": "teacher_", "encoders": encoders, **shape}


def published() -> dict:
    """The teacher's encoders, in the repository of Stable Diffusion 3.5."""
    return {**t2i_256.published(), "t5_folder": "sd35/text_encoder_3", "t5_tokenizer": "sd35/tokenizer_3"}


def tiny() -> dict:
    """Encoders that are drawn."""
    clips = {"clip_l": t2i_256.tiny_clip(6), "clip_g": t2i_256.tiny_clip(10)}
    return {**clips, "t5": {"preset": "smoke", "vocab_size": 512}, "t5_tokens": 5, "stand_ins": True}


def distilled(c: ConfigDict, devices: int, microbatches: int) -> ConfigDict:
    """A pretraining stage with a teacher. Its weights are gathered once for each microbatch, so that there are few."""
    c.recipe = "distillation"
    c.microbatches = microbatches
    c.network.remat = "blocks"
    c.mesh = ConfigDict({"data": 1, "fsdp": devices})
    c.shard_student = False
    c.teacher = ConfigDict(
        {
            "network": {"kind": "mmdit", "preset": "sd35_large", "attention": "flash"},
            "inputs": stored_states(tokens=333, width=4096, encoders=published()),
        }
    )
    c.student_taps = ("up_0",)
    c.teacher_taps = ("block_37",)
    return c


def run_locally(c: ConfigDict) -> ConfigDict:
    """The same with a teacher drawn at random: a tiny one, trained for no step."""
    c.mesh = ConfigDict({})
    c.microbatches = 1
    network = {"kind": "mmdit", "preset": "smoke", "latent_channels": 16, "position_size": 16, "position_base": 8}
    c.teacher = ConfigDict(
        {"random": True, "network": network, "inputs": stored_states(tokens=12, width=16, encoders=tiny(), pooled=16)}
    )
    c.teacher_taps = ("block_01",)
    return c


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of tiny networks on a laptop."""
    c = distilled(t2i_512.get_config(arg), devices=64, microbatches=2)
    return run_locally(c) if arg else c
