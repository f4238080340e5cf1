"""Where the published weights are, and on which terms. Nothing is downloaded here; errors quote this table."""

from __future__ import annotations

import dataclasses

from snapgen_jax.typed import closest


@dataclasses.dataclass(frozen=True)
class Source:
    """A published set of weights.

    Attributes:
        title: what it is.
        repo: its repository on the Hugging Face hub.
        folder: the folder in that repository which holds the tensors; "" for its root, "*" for all of its folders.
        licence: name of the licence, as the publisher calls it.
        gated: whether the terms must be accepted on the repository's page, and the download needs a token.
    """

    title: str
    repo: str
    folder: str
    licence: str
    gated: bool = False

    @property
    def advice(self) -> str:
        """How to get the weights, in three lines."""
        pattern = f"{self.folder}/*" if self.folder else "*.safetensors*"
        lines = [f"{self.title}: https://huggingface.co/{self.repo} ({self.licence})"]
        if self.gated:
            lines.append("The repository is gated: accept its terms there and log in first (hf auth login).")
        lines.append(f"Fetch it with: hf download {self.repo} --include '{pattern}' --local-dir DIR")
        return "\n".join(lines)


_STABILITY = "Stability AI Community License; free below USD 1M of yearly revenue"
_RAIL = "CreativeML Open RAIL-M"
_SD35 = "stabilityai/stable-diffusion-3.5"

SOURCES: dict[str, Source] = {
    "sd35_large": Source("Stable Diffusion 3.5 Large", f"{_SD35}-large", "transformer", _STABILITY, gated=True),
    "sd35_large_turbo": Source(
        "Stable Diffusion 3.5 Large Turbo", f"{_SD35}-large-turbo", "transformer", _STABILITY, gated=True
    ),
    "sd35_medium": Source("Stable Diffusion 3.5 Medium", f"{_SD35}-medium", "transformer", _STABILITY, gated=True),
    "sd15": Source("Stable Diffusion 1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "*", _RAIL),
    "sd21": Source("Stable Diffusion 2.1", "stabilityai/stable-diffusion-2-1", "*", "CreativeML Open RAIL++-M"),
    "sdxl": Source(
        "Stable Diffusion XL base 1.0", "stabilityai/stable-diffusion-xl-base-1.0", "*", "CreativeML Open RAIL++-M"
    ),
    "sd3_vae": Source("Stable Diffusion 3.5 autoencoder", f"{_SD35}-large", "vae", _STABILITY, gated=True),
    "sd1_vae": Source(
        "the autoencoder of Stable Diffusion 1 and 2, its decoder fine-tuned", "stabilityai/sd-vae-ft-mse", "", "MIT"
    ),
    "clip_l": Source("CLIP ViT-L/14", "openai/clip-vit-large-patch14", "", "MIT, as the code it was published with"),
    "clip_g": Source("OpenCLIP ViT-bigG/14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "", "MIT"),
    "t5_xxl": Source(
        "T5-XXL v1.1 encoder (Apache-2.0), as Stable Diffusion 3.5 distributes it in safetensors",
        f"{_SD35}-large",
        "text_encoder_3",
        _STABILITY,
        gated=True,
    ),
    "lpips": Source(
        "VGG-16, whose features LPIPS compares (`features.*`; the learnt weights `lin*` are those of the pip package "
        "lpips, see weights/maps/lpips.py)",
        "timm/vgg16.tv_in1k",
        "",
        "BSD-3-Clause",
    ),
    "gemma2_2b": Source("Gemma-2-2b", "google/gemma-2-2b", "", "Gemma Terms of Use", gated=True),
}


def source(name: str) -> Source:
    """The entry called `name`; an unknown name raises with the closest match."""
    if name not in SOURCES:
        raise ValueError(f"no published weights called {name!r}{closest(name, SOURCES)}")
    return SOURCES[name]
