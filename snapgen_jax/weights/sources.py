"""Where the published weights are, and on which terms. Nothing is downloaded here; errors quote this table."""

from __future__ import annotations

import dataclasses
from typing import Literal

from snapgen_jax.typed import closest


@dataclasses.dataclass(frozen=True)
class Source:
    """A published set of weights.

    Attributes:
        title: what it is.
        repo: its repository.
        folder: the folder in that repository which holds the tensors; "" for its root, "*" for all of its folders.
        licence: name of the licence, as the publisher calls it.
        gated: whether the terms must be accepted on the repository's page, and the download needs a token.
        files: pattern of the files' names, in the root; a repository may hold several sets.
        pickle: name of the file, where only a pickle is published.
        host: where the repository is: the Hugging Face hub, or GitHub.
    """

    title: str
    repo: str
    folder: str
    licence: str
    gated: bool = False
    files: str = "*.safetensors*"
    pickle: str = ""
    host: Literal["huggingface.co", "github.com"] = "huggingface.co"

    @property
    def address(self) -> str:
        """Where its page is."""
        return f"https://{self.host}/{self.repo}"

    @property
    def advice(self) -> str:
        """How to get the weights, in a few lines."""
        pattern = self.pickle or (f"{self.folder}/*" if self.folder else self.files)
        lines = [f"{self.title}: {self.address} ({self.licence})"]
        if self.gated:
            lines.append("The repository is gated: accept its terms there and log in first (hf auth login).")
        if self.host == "github.com":
            lines.append(f"Fetch it with: curl --location --remote-name '{self.address}/raw/main/{pattern}'")
        else:
            lines.append(f"Fetch it with: hf download {self.repo} --include '{pattern}' --local-dir DIR")
        if self.pickle:
            lines.append("It is a pickle: save its tensors as safetensors once (docs/networks.md).")
        return "\n".join(lines)


def _openclip(title: str, repo: str) -> Source:
    """A CLIP in transformers' layout; OpenCLIP's lies beside it as `open_clip_model.safetensors`."""
    return Source(title, repo, "", "MIT", files="model*.safetensors*")


_NOT_VERIFIED = "its licence is not verified: see its page"
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
    "svd": Source(
        "Stable Video Diffusion", "stabilityai/stable-video-diffusion-img2vid", "*", _NOT_VERIFIED, gated=True
    ),
    "sd3_vae": Source("Stable Diffusion 3.5 autoencoder", f"{_SD35}-large", "vae", _STABILITY, gated=True),
    "sd1_vae": Source(
        "the autoencoder of Stable Diffusion 1 and 2, its decoder fine-tuned", "stabilityai/sd-vae-ft-mse", "", "MIT"
    ),
    "sdxl_vae": Source(
        "the autoencoder of Stable Diffusion XL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "vae",
        "CreativeML Open RAIL++-M",
    ),
    "clip_l": Source("CLIP ViT-L/14", "openai/clip-vit-large-patch14", "", "MIT, as the code it was published with"),
    "clip_g": _openclip("OpenCLIP ViT-bigG/14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
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
    "dit_xl_2": Source("DiT-XL/2 at 256 px", "facebook/DiT-XL-2-256", "transformer", "CC-BY-NC, non-commercial"),
    "clip_h": _openclip("OpenCLIP ViT-H/14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "clip_little_g": _openclip("OpenCLIP ViT-g/14", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
    "pickscore": Source("PickScore", "yuvalkirstain/PickScore_v1", "", _NOT_VERIFIED),
    "hpsv2": Source("HPSv2.1", "xswu/HPSv2", "", "Apache-2.0", pickle="HPS_v2.1_compressed.pt"),
    "aesthetic": Source(
        "LAION's improved aesthetic predictor",
        "christophschuhmann/improved-aesthetic-predictor",
        "",
        _NOT_VERIFIED,
        pickle="sac+logos+ava1-l14-linearMSE.pth",
        host="github.com",
    ),
    "gemma2_2b": Source("Gemma-2-2b", "google/gemma-2-2b", "", "Gemma Terms of Use", gated=True),
}


def autoencoder_name(scale: float) -> str:
    """Which published autoencoder has latents of that scale; that of Stable Diffusion 3 where none has."""
    return {0.18215: "sd1_vae", 0.13025: "sdxl_vae"}.get(scale, "sd3_vae")


def source(name: str) -> Source:
    """The entry called `name`; an unknown name raises with the closest match."""
    if name not in SOURCES:
        raise ValueError(f"no published weights called {name!r}{closest(name, SOURCES)}")
    return SOURCES[name]
