"""Text-to-image pretraining of the 379M UNet at 256 px as in `t2i_256.py`, from images and captions: the autoencoder of
Stable Diffusion 3, CLIP-L, CLIP-bigG and Gemma-2-2b run inside the step, frozen.

    snapgen plan  --config=configs/pretrain/t2i_256_images.py --topology=v5e:4x4
    snapgen train --config=configs/pretrain/t2i_256_images.py:runlocal --workdir=/tmp/t2i_256_images
    snapgen train --config=configs/pretrain/t2i_256_images.py:folder --workdir=gs://BUCKET/t2i_256 \
        --config.data.path=PHOTOS --config.inputs.language_folder=gemma --config.inputs.language_tokenizer=gemma

The last one reads captioned images, the repository of Stable Diffusion 3.5 in `sd35/` and that of Gemma 2 in `gemma/`;
every caption goes through the tokenizer of each encoder. "tfds" in place of "folder" takes COCO's images by TFDS.

It costs no storage for latents and text states, and every epoch the arithmetic of the encoders. They hold 3.5e9
parameters: no chip of 16 GB keeps them beside the state, and so all is shared out over groups of 16 chips.

Machine: 256 chips of TPU v5e; runlocal, a laptop in a minute. Time: `benchmarks/results/plan/`, at best. Metric: the
fixed-noise validation loss.
"""

from ml_collections import ConfigDict

from configs.pretrain import t2i_256


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "folder" or "tfds" for the source of images and captions, "runlocal" for twenty steps of tiny networks on
    a laptop; None for random batches."""
    if arg not in (None, "folder", "tfds", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are folder, tfds and runlocal, or nothing")
    c = t2i_256.get_config("runlocal" if arg == "runlocal" else None)
    c.data = ConfigDict({"source": "synthetic"})
    c.mesh = ConfigDict({"fsdp": 16})
    inputs = {
        "kind": "encoders",
        "image_sizes": c.inputs.image_sizes,
        "codec": {"kind": "autoencoder", "autoencoder": {"preset": "sd3"}, "workdir": "sd35/vae"},
        "clip_l_folder": "sd35/text_encoder",
        "clip_g_folder": "sd35/text_encoder_2",
        "language_folder": "",
        "clip_l_tokenizer": "sd35/tokenizer",
        "clip_g_tokenizer": "sd35/tokenizer_2",
        "language_tokenizer": "",
    }
    if arg == "folder":
        c.data = ConfigDict({"source": "folder", "path": "", "workers": 8})
    if arg == "tfds":
        c.data = ConfigDict({"source": "tfds", "name": "coco_captions", "validation_split": "val", "workers": 8})
    if arg == "runlocal":
        c.mesh = ConfigDict({"fsdp": 1})
        c.network.update({"latent_channels": 4, "context_width": 32, "pooled_width": 32})
        inputs = {
            "kind": "encoders",
            "image_sizes": c.inputs.image_sizes,
            "codec": {"kind": "autoencoder", "autoencoder": {"preset": "smoke"}},
            "clip_l": {"preset": "smoke"},
            "clip_g": {"preset": "smoke"},
            "language": {"preset": "smoke"},
            "language_tokens": 6,
            "conditioner": {"width": 32, "language_width": 16},
            "stand_ins": True,
        }
    c.inputs = ConfigDict(inputs)
    return c
