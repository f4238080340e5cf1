"""DiT in diffusers' layout (`transformer/` of `facebook/DiT-XL-2-256`) and in that of facebookresearch/DiT.

Each holds two of our networks: `networks.dit.DiT`, and its table of classes, `networks.label.LabelEmbedding`. diffusers
repeats the embeddings of time and class in every block; those of the first one are read. facebookresearch/DiT publishes
a pickle, which this package does not read; make a safetensors file of it once:

    state = torch.load("DiT-XL-2-256x256.pt", weights_only=True)
    safetensors.torch.save_file(state, "DIR/dit.safetensors")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, conv, fused, linear, one
from snapgen_jax.weights.published import given

Layout = Literal["diffusers", "original"]
_TABLES = {
    "diffusers": "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    "original": "y_embedder.embedding_table.weight",
}
_REPEATED = r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.(timestep_embedder\.linear_[12]|class_embedder)\..*"


def read_config(values: Mapping[str, Any], **changes: Any) -> DiTConfig:
    """The config of a checkpoint from the values of diffusers' `config.json`; `changes` replaces our own fields.

    Raises:
        ValueError: the checkpoint is of a kind that `DiT` does not have.
    """
    values = given(values)
    channels, patch = values.get("in_channels", 4), values.get("patch_size", 2)
    out = values.get("out_channels", channels)
    for key, found, expected in (
        ("norm_type", values.get("norm_type", "ada_norm_zero"), "ada_norm_zero"),
        ("activation_fn", values.get("activation_fn", "gelu-approximate"), "gelu-approximate"),
        ("attention_bias", values.get("attention_bias", True), True),
        ("norm_elementwise_affine", values.get("norm_elementwise_affine", False), False),
        ("out_channels", out, out if out in (channels, 2 * channels) else 2 * channels),
    ):
        if found != expected:
            raise ValueError(f"this transformer has {key} = {found!r}; DiT can only read {expected!r}")
    fields = {
        "latent_channels": channels,
        "patch": patch,
        "depth": values.get("num_layers", 28),
        "heads": values.get("num_attention_heads", 16),
        "head_dim": values.get("attention_head_dim", 72),
        "sigma": "learned" if out == 2 * channels else "none",
        "base": values.get("sample_size", 32) // patch,
        "ffn_epsilon": values.get("norm_eps", 1e-5),
    }
    return DiTConfig(**{**fields, **changes})


def read_label_config(values: Mapping[str, Any], **changes: Any) -> LabelEmbeddingConfig:
    """The config of the table of classes from the values of diffusers' `config.json`."""
    values = given(values)
    width = values.get("num_attention_heads", 16) * values.get("attention_head_dim", 72)
    return LabelEmbeddingConfig(**{"classes": values.get("num_embeds_ada_norm", 1000), "width": width, **changes})


def layout_of(names: Iterable[str]) -> Layout:
    """The layout that the tensors of these names are in."""
    return "original" if any(name.endswith(_TABLES["original"]) for name in names) else "diffusers"


def weight_map(config: DiTConfig, layout: Layout = "diffusers") -> WeightMap:
    """The tensors of a `DiT`. The table of classes and, in the first layout, the positions are left in the file."""
    blocks = (rule for i in range(config.depth) for rule in _BLOCKS[layout](i))
    if layout == "original":
        rules = (
            *conv("patch", "x_embedder.proj"),
            *linear("time/inner", "t_embedder.mlp.0"),
            *linear("time/outer", "t_embedder.mlp.2"),
            *blocks,
            *linear("modulation_out", "final_layer.adaLN_modulation.1"),
            *linear("out", "final_layer.linear"),
        )
        return WeightMap(rules, ignored=("pos_embed", r"y_embedder\.embedding_table\.weight"))
    embedding = "transformer_blocks.0.norm1.emb.timestep_embedder"
    rules = (
        *conv("patch", "pos_embed.proj"),
        *linear("time/inner", f"{embedding}.linear_1"),
        *linear("time/outer", f"{embedding}.linear_2"),
        *blocks,
        *linear("modulation_out", "proj_out_1"),
        *linear("out", "proj_out_2"),
    )
    return WeightMap(rules, ignored=(_REPEATED, r"transformer_blocks\.0\.norm1\.emb\.class_embedder\..*"))


def label_map(config: LabelEmbeddingConfig, layout: Layout = "diffusers") -> WeightMap:
    """The table of classes of a checkpoint, whose other tensors are those of the `DiT`."""
    del config
    return WeightMap((one("table", _TABLES[layout]),), ignored=(".*",))


def _diffusers(i: int) -> tuple[Rule, ...]:
    path, name = f"blocks/block_{i:02d}", f"transformer_blocks.{i}"
    return (
        *linear(f"{path}/modulation", f"{name}.norm1.linear"),
        *linear(f"{path}/attention/query", f"{name}.attn1.to_q"),
        *linear(f"{path}/attention/key", f"{name}.attn1.to_k"),
        *linear(f"{path}/attention/value", f"{name}.attn1.to_v"),
        *linear(f"{path}/attention/back", f"{name}.attn1.to_out.0"),
        *linear(f"{path}/ffn/inner", f"{name}.ff.net.0.proj"),
        *linear(f"{path}/ffn/outer", f"{name}.ff.net.2"),
    )


def _original(i: int) -> tuple[Rule, ...]:
    path, name = f"blocks/block_{i:02d}", f"blocks.{i}"
    heads = [f"{path}/attention/{part}" for part in ("query", "key", "value")]
    return (
        *linear(f"{path}/modulation", f"{name}.adaLN_modulation.1"),
        *fused([f"{part}/kernel" for part in heads], f"{name}.attn.qkv.weight", "linear"),
        *fused([f"{part}/bias" for part in heads], f"{name}.attn.qkv.bias"),
        *linear(f"{path}/attention/back", f"{name}.attn.proj"),
        *linear(f"{path}/ffn/inner", f"{name}.mlp.fc1"),
        *linear(f"{path}/ffn/outer", f"{name}.mlp.fc2"),
    )


_BLOCKS = {"diffusers": _diffusers, "original": _original}
