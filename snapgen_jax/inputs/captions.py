"""Images and captions: a codec makes the latents, and one text encoder, trained beside the network or frozen, reads the
captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.diffusion.guidance import draw_kept, keep
from snapgen_jax.inputs._export import text_unit
from snapgen_jax.inputs._images import ImageCodec, OfImages, Size, image_specs
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree, is_kept
from snapgen_jax.networks.clip import ClipTextConfig, null_tokens
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, frozen_spec
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import InputsExport
from snapgen_jax.weights.frozen import load_run

TEXT = "text"


@dataclasses.dataclass(frozen=True)
class CaptionsConfig:
    """Images with captions.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        text: architecture of the text encoder.
        text_workdir: a run whose text encoder, frozen, and tokenizer are used, such as one of the recipe `contrastive`;
            "" trains both beside the network.
        codec: between images and latents.
        caption_dropout: share of captions replaced by the empty one in training.
    """

    kind: Literal["captions"] = "captions"
    image_sizes: tuple[Size, ...] = ((32, 32),)
    text: ClipTextConfig = ClipTextConfig.preset("shapes")
    text_workdir: str = ""
    codec: CodecConfig = CodecConfig()
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1), caption_dropout=SHARE)

    def build(self, batch_size: int, platform: Platform) -> Captions:
        """Raises `ValueError` where an image size does not divide as the codec needs."""
        return Captions(self, batch_size, platform)


class Captions(OfImages):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: CaptionsConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.images = ImageCodec(config.codec, platform, config.image_sizes)
        self.text = build(for_platform(config.text, platform))[0]

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`, `tokens` int32 `[B, L]`, `mask` float32 `[B, L]`."""
        shape = self.batch_size, self.config.text.max_tokens
        captions = {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32),
            "mask": jax.ShapeDtypeStruct(shape, jnp.float32),
        }
        return image_specs(self.batch_size, self.config.image_sizes, captions)

    def conditions(self) -> tuple[str, ...]:
        """The token ids and their mask."""
        return "tokens", "mask"

    def networks(self) -> dict[str, Network]:
        """ "text", and "codec" where that is a network."""
        return {TEXT: self.text, **self.images.networks()}

    def pretrained(self) -> tuple[str, ...]:
        """The codec, and the text encoder where it is an earlier run's."""
        return (*([TEXT] if self.config.text_workdir else []), *self.images.networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the text encoder of `text_workdir` and the codec, where they are asked for."""
        loaded = {}
        if TEXT in roles:
            spec, rules = {TEXT: frozen_spec(self.text)}, rules_of({TEXT: self.text})
            loaded = load_run(self.config.text_workdir, spec, mesh=mesh, rules=rules)
        return {**loaded, **self.load_codec(roles, mesh)}

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """That of "tokens", which goes with the text encoder."""
        config = self.config
        return {"tokens": TokenizerSpec("trained", config.text.max_tokens, config.text.vocab_size, config.text_workdir)}

    # --- examples and conditions ---

    def unconditional_share(self) -> float:
        """`caption_dropout`."""
        return self.config.caption_dropout

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{"text": bool [B]}`, false with probability `caption_dropout`."""
        return {TEXT: draw_kept(key, batch_size, self.config.caption_dropout)}

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """Token ids and mask, those of the empty caption where the text is not kept."""
        del networks, key
        caption, rows = {name: batch[name] for name in self.conditions()}, is_kept(kept, TEXT)
        return caption if rows is None else keep(rows, caption, self._null())

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """What the text encoder makes of the captions."""
        return apply(self.text, networks[TEXT], drawn["tokens"], drawn["mask"])

    def null_condition(self, networks: Networks) -> TextContext:
        """What it makes of the empty caption, `[1, ...]`."""
        return self.condition(networks, {name: jnp.asarray(x)[None] for name, x in self._null().items()})

    def _null(self) -> dict[str, np.ndarray]:
        tokens, mask = null_tokens(self.config.text, self.config.text.max_tokens)
        return {"tokens": tokens, "mask": mask}

    # --- out again ---

    def check_run(self, workdir: str, inputs: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Raises where an earlier run had other latents, or read other text states than are made here."""
        super().check_run(workdir, inputs, parts)
        if "condition" not in parts or "text_workdir" not in inputs:
            return
        if not inputs["text_workdir"]:
            if self.config.text_workdir and epath.Path(self.config.text_workdir) == epath.Path(workdir):
                return  # the student reads that one
            raise ConfigError(
                f"the run {workdir!r} trained a text encoder of its own; set inputs.text_workdir to it, or give "
                "teacher.inputs with its `text`"
            )
        if not self.config.text_workdir or not same_tokens(workdir, self.config.text_workdir):
            raise ConfigError(
                f"the run {workdir!r} reads the text encoder of {inputs['text_workdir']!r} and the student "
                f"{self.config.text_workdir or 'its own'!r}; set inputs.text_workdir to the same"
            )

    def exports(self) -> InputsExport:
        """The text encoder, the tokenizer's arrays and, where the codec is a network, the decoder."""
        text = self.config.text
        frame = {"begin": [text.bos_id], "end": [text.eos_id], "pad": text.pad_id}
        return InputsExport(
            [text_unit(TEXT, text)],
            self._null(),
            self.images.describe(),
            self.images.export_unit(),
            tokenizers=[{"file": "tokenizer.json", **{name: name for name in self.conditions()}, **frame}],
        )


def same_tokens(*workdirs: epath.PathLike) -> bool:
    """Whether runs have one tokenizer, as those with one text encoder do wherever they were moved to; where it cannot
    be told they do."""
    files = [epath.Path(workdir) / "tokenizer.json" for workdir in workdirs]
    return not all(file.exists() for file in files) or len({file.read_bytes() for file in files}) == 1
