"""What each kernel of attention takes, and which kernel a platform gets: one table for every network.

A config names a kernel in its field `attention`. "auto" leaves the choice to `module.for_platform`:

| platform | "auto" becomes |
|---|---|
| CPU, TPU | "whole" |
| GPU, bfloat16 or float16 | "cudnn" |
| GPU, float32; AMD; NVIDIA before Ampere | "whole" |

No kernel but "whole" takes every head width, batch and number of tokens. The calls of a network that its kernel does
not take run by "whole", without a message. An exported file holds "whole" alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp

AttentionKernel = Literal["whole", "chunked", "cudnn", "flash"]
AttentionChoice = Literal["auto", "whole", "chunked", "cudnn", "flash"]
ANY = range(1, 2**31)
AMPERE = 8.0  # compute capability


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel takes: queries `[B, L, H, D]`, keys and values `[B, M, K, D]`, all of one dtype. Every kernel has a
    gradient; those of "cudnn" and "flash" have no second one and no forward mode.

    Attributes:
        platforms: where it runs.
        dtypes: of queries, keys and values; none for any.
        head_dims: D.
        queries: L.
        rows: B.
        heads: "grouped" if K may be a divisor of H; "equal" if keys and values are repeated to H heads first.
        masks: "bias" for any floats added to the scores; "keys" for keys that no query attends to; "first keys" if the
            keys that count must be the first ones. See `attention_kernels.Mask`.
    """

    platforms: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    head_dims: tuple[range, ...] = (ANY,)
    queries: range = ANY
    rows: range = ANY
    heads: Literal["grouped", "equal"] = "grouped"
    masks: Literal["bias", "keys", "first keys"] = "bias"

    def takes(self, q: Any, k: Any, v: Any, mask: Any = None) -> bool:
        """Whether it takes a call on arrays (or `ShapeDtypeStruct`s) of these shapes and dtypes, with that mask."""
        rows, queries, _, head_dim = q.shape
        if mask is not None and self.masks == "first keys" and mask.lengths is None:
            return False
        if mask is not None and self.masks != "bias" and mask.bias.shape[1:3] != (1, 1):
            return False
        return (
            (not self.dtypes or (q.dtype == k.dtype == v.dtype and jnp.dtype(q.dtype).name in self.dtypes))
            and any(head_dim in widths for widths in self.head_dims)
            and queries in self.queries
            and rows in self.rows
        )


KERNELS: dict[AttentionKernel, Kernel] = {
    # All scores at once, by einsum.
    "whole": Kernel(platforms=("cpu", "gpu", "tpu")),
    # The scores of some queries at a time.
    "chunked": Kernel(platforms=("cpu", "gpu", "tpu"), masks="keys"),
    # cuDNN's flash attention, by `jax.nn.dot_product_attention`. From Hopper on it takes heads of up to 256; the limit
    # is that of Ampere, so that a config means the same on every card. CUDA's grids have fewer than 2^16 rows. Below
    # one tile of queries there are no scores worth sparing.
    "cudnn": Kernel(
        platforms=("gpu",),
        dtypes=("bfloat16", "float16"),
        head_dims=(range(8, 129, 8),),
        queries=range(64, ANY.stop),
        rows=range(1, 2**16),
        masks="first keys",
    ),
    # JAX's flash attention for TPUs, in Pallas.
    "flash": Kernel(
        platforms=("tpu",),
        dtypes=("bfloat16", "float32"),
        head_dims=(range(1, 128), range(128, 257, 128)),
        heads="equal",
        masks="keys",
    ),
}
AUTO_DTYPE = {"cpu": "float32", "gpu": "bfloat16", "tpu": "bfloat16"}
PLATFORMS = {"cpu": "CPUs", "gpu": "NVIDIA GPUs", "tpu": "TPUs"}


def choose(platform: str, dtype: str) -> AttentionKernel:
    """The kernel that "auto" stands for on a platform, for a network that computes in `dtype`."""
    cudnn = KERNELS["cudnn"]
    return "cudnn" if platform in cudnn.platforms and dtype in cudnn.dtypes and _has_cudnn() else "whole"


def _has_cudnn() -> bool:
    """Whether the GPU of this process has cuDNN's flash attention; True without one, where programs for GPUs are only
    lowered."""
    if jax.default_backend() != "gpu":
        return True
    capability = str(jax.local_devices()[0].compute_capability)  # "9.0"; "gfx942" of AMD
    return capability.replace(".", "", 1).isdigit() and float(capability) >= AMPERE


def fixed(attention: str, platform: str, dtype: str) -> str:
    """The value of a field `attention` on a platform: that of `choose` for "auto", and for a kernel that does not run
    there or not in `dtype`, so that a run goes on on another machine. Other values mean something else and stay."""
    if attention == "auto" or (attention in KERNELS and problem(attention, platform, dtype)):
        return choose(platform, dtype)
    return attention


def problem(attention: str, platform: str, dtype: str) -> str:
    """Why a kernel named in a config cannot be had: what is wrong, what is expected, what to change; "" if it can."""
    kernel = KERNELS.get(cast(AttentionKernel, attention))
    if kernel is None:
        return ""
    instead = f'set attention="auto", which is "{choose(platform, dtype)}" there'
    if platform not in kernel.platforms:
        where = " and ".join(PLATFORMS[name] for name in kernel.platforms)
        return f'attention="{attention}" runs on {where}, and this is for the platform "{platform}"; {instead}'
    if kernel.dtypes and dtype not in kernel.dtypes:
        return (
            f'attention="{attention}" computes in {" or ".join(kernel.dtypes)}, and the dtype is {dtype}; '
            f'set dtype="{kernel.dtypes[0]}", or {instead}'
        )
    return ""


def check_named(config: Any, platform: str, path: str = "") -> None:
    """Holds every kernel that a config, or a config inside it, names to the platform that a new run is compiled for.

    Raises:
        ValueError: a kernel does not run there, or not in the dtype of its network; names the field.
    """
    dtype = getattr(config, "dtype", "auto")
    dtype = AUTO_DTYPE[platform] if dtype == "auto" else dtype
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_named(value, platform, f"{path}{field.name}.")
        elif field.name == "attention" and (reason := problem(value, platform, dtype)):
            raise ValueError(f"{path}{reason}")


def kernel_of(config: Any) -> AttentionKernel:
    """The kernel of a network: `config.attention`, where "auto" reads as "whole"."""
    return "whole" if config.attention == "auto" else config.attention


assert set(KERNELS) == set(get_args(AttentionKernel))
