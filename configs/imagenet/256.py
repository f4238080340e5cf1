"""ImageNet-1K at 256 px, the paper's headline (FID 2.06 with 371.78M parameters): class names through CLIP-L, latents
of the 4-channel autoencoder of Stable Diffusion 1, both frozen inside the step.

    snapgen plan  --config=configs/imagenet/256.py --topology=v5e:16x16
    snapgen train --config=configs/imagenet/256.py --config.data.path=TFDS --workdir=gs://BUCKET/imagenet
    snapgen draw  --workdir=gs://BUCKET/imagenet --count=50000 --classes=uniform --out=gs://BUCKET/drawn --npz=drawn.npz
    snapgen train --config=configs/imagenet/256.py:runlocal --workdir=/tmp/imagenet

TFDS is a folder with `imagenet2012`, prepared as `docs/imagenet.md` says, which also says where the weights, the
tokenizer and the class names come from and how to get the FID. `:stored` reads latents and token ids that were made
beforehand (and are not mirrored): the autoencoder's encoder is more arithmetic than the UNet's update.

Guidance is swept, as its band of times is:

    for w in 1.2 1.4 1.6 1.8 2.0; do for high in 0.6 0.7 0.8; do
      snapgen draw --workdir=RUN --count=10000 --classes=uniform --guidance=$w --guidance_interval=0,$high \
          --out=drawn/$w-$high --npz=drawn/$w-$high.npz
    done; done

The default, 1.8 for times up to 0.7, is what SiT-XL/2 of the same path and autoencoder was best at in REPA (arXiv
2410.06940).

Machine: 256 chips of TPU v5e, at best 0.29 days or 1,787 chip-hours on stored latents; 64 chips of v5p, 0.18 days or
276 chip-hours (`docs/measured.md`); runlocal, a laptop in a minute. Metric: FID of 50,000 images. SnapGen
publishes neither length, batch, learning rate nor guidance: here they are 800 epochs (of SiT's 1,400), 1,024 and 1e-4.
"""

from ml_collections import ConfigDict

from configs.imagenet import ablation


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "stored" for stored latents, "runlocal" for 200 updates of a tiny network on a laptop; None for images."""
    if arg not in (None, "stored", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are stored and runlocal, or nothing")
    c = ablation.experiment(epochs=800)
    forms = {None: lambda c: c, "stored": ablation.on_stored_latents, "runlocal": ablation.run_locally}
    return forms[arg](c)
