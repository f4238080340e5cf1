"""What the published systems share: their parts, read from the folder of a repository, and drawing from prompts."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.diffusion.schedules import Prediction, VPSchedule
from snapgen_jax.diffusion.stages import Staged, Stages, run_stages
from snapgen_jax.networks.autoencoder import AutoencoderCodec
from snapgen_jax.networks.codec import to_uint8
from snapgen_jax.networks.module import Network, Platform, build, for_platform
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.parallel.sharding import Rules, tree_shardings
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.published import given, read_config_file, read_json
from snapgen_jax.weights.sources import source

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}
# What a scheduler spaces its steps by where its file does not say.
_SPACING = {"EulerDiscreteScheduler": "linspace", "DPMSolverMultistepScheduler": "linspace"}
Tree = Any
NetworkConfigs = dict[str, Any]
CLIP_TOKENS = 77


class Part(NamedTuple):
    """One network of a system: its folder, how the folder is read, and the entry of `weights.sources`."""

    folder: str
    maps: ModuleType
    source: str
    optional: bool = False


def read_parts(folder: pathlib.Path, parts: Mapping[str, Part], title: str, wanted: str = "") -> NetworkConfigs:
    """The configs of the networks in a folder; an optional one is missing where its folder is.

    Args:
        folder: of the repository.
        parts: its networks.
        title: of all systems with such parts, for messages.
        wanted: the entry of `weights.sources` that a message advises; that of the part where none is given.

    Raises:
        WeightsError: a part is missing, or is of a kind that our networks are not.
    """
    configs = {}
    for name, part in parts.items():
        file = folder / part.folder / "config.json"
        if not file.is_file():
            if part.optional and not file.parent.exists():
                continue
            raise WeightsError(
                f"{folder} is no folder of {title}: it has no {part.folder}/config.json. Expected the layout of its "
                f"repository, with {', '.join(p.folder for p in parts.values())} and the tokenizers.\n"
                f"{source(wanted or part.source).advice}"
            )
        configs[name] = read_config_file(file, part.maps.read_config)
    return configs


@dataclasses.dataclass(frozen=True)
class Training:
    """How a denoiser was trained.

    Attributes:
        schedule: its noise.
        prediction: what its output stands for.
        empty_is_zero: an empty text was states of zeros.
    """

    schedule: VPSchedule = VPSchedule.preset("sd15")
    prediction: Prediction = "eps"
    empty_is_zero: bool = False

    @classmethod
    def preset(cls, schedule: str) -> Training:
        """That of a published schedule of `VPSchedule`, which predicts the noise."""
        return cls(VPSchedule.preset(schedule))


def read_training(folder: pathlib.Path) -> Training:
    """How the denoiser of a folder was trained, from `scheduler/scheduler_config.json`.

    Raises:
        WeightsError: the file of the scheduler is missing, or describes noise that we do not have.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    values = given(read_json(file))
    kind = values.get("_class_name", "")
    if "beta_schedule" not in values:
        raise WeightsError(f"{file} says no beta_schedule ({kind}); a model that is trained on discrete steps has one")
    betas: Any = {"squaredcos_cap_v2": "cosine"}.get(values["beta_schedule"], values["beta_schedule"])
    prediction = values.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS or values.get("trained_betas") is not None:
        raise WeightsError(f"{file}: prediction_type is {prediction!r}; we have {', '.join(_PREDICTIONS)}")
    try:
        schedule = VPSchedule(
            betas=betas,
            beta_start=values.get("beta_start", 1e-4),
            beta_end=values.get("beta_end", 0.02),
            native_steps=values.get("num_train_timesteps", 1000),
            zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
            spacing=values.get("timestep_spacing", _SPACING.get(kind, "leading")),
            steps_offset=values.get("steps_offset", 0),
        )
        schedule.table()
    except ValueError as error:
        raise WeightsError(f"{file}: {error}") from error
    index = folder / "model_index.json"
    zero = bool(read_json(index).get("force_zeros_for_empty_prompt")) if index.is_file() else False
    return Training(schedule, _PREDICTIONS[prediction], zero)


def check_size(part: str, size: str, found: Any, expected: Any, fields: Sequence[str]) -> None:
    """Holds the network of a folder to that of a published size.

    Args:
        part: what the network is, for the message.
        size: what was asked for.
        found, expected: the configs.
        fields: those that tell the sizes apart.

    Raises:
        WeightsError: the folder holds another; names the fields that differ.
    """
    wrong = [f"{f} = {getattr(found, f)}" for f in fields if getattr(found, f) != getattr(expected, f)]
    if wrong:
        raise WeightsError(
            f"the {part} in this folder is not {size} ({', '.join(wrong)}); give the folder of that size, or "
            "--config.size=any to take what the folder holds"
        )


def drawn(pixels: jax.Array, latent: jax.Array) -> dict[str, jax.Array]:
    """What a system returns: `image` uint8 `[N, H, W, 3]`, `pixels` float32 in [-1, 1] before rounding, and
    `latent`."""
    return {"image": to_uint8(pixels), "pixels": pixels, "latent": latent}


class System:
    """A system without its parameters, which are an argument everywhere: `{part: tree}`.

    Attributes:
        config: how it is used; has `dtype` and `image_size`.
        networks, specs: by part; an optional one may be missing.
    """

    PARTS: ClassVar[Mapping[str, Part]]
    TOKENIZERS: ClassVar[Mapping[str, str]]  # {text encoder: folder of its tokenizer}

    def __init__(self, config: Any, networks: NetworkConfigs, platform: Platform):
        self.config = config
        self.networks: dict[str, Network] = {}
        self.specs: dict[str, Tree] = {}
        for name, network_config in networks.items():
            chosen = dataclasses.replace(network_config, dtype=config.dtype)
            self.networks[name], self.specs[name] = build(for_platform(chosen, platform))

    @property
    def text_encoders(self) -> list[str]:
        """Those that it has, each with a tokenizer of its own."""
        return [name for name in self.TOKENIZERS if name in self.networks]

    def generator(self, params: Tree, tokenizers: dict[str, Any], mesh: Mesh | None) -> Generator:
        """The system, ready to draw."""
        return Generator(self, params, tokenizers, mesh)

    def lengths(self) -> dict[str, int]:
        """Tokens of a text, by encoder; that of CLIP where none is said."""
        return {}

    def tokens(self, prompts: list[str], tokenizers: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`{encoder: [N, L] int32}` of N prompts; `tokenizers` by encoder, see `Generator`."""
        lengths = self.lengths()
        return {
            name: tokenizer.encode(prompts, lengths.get(name, CLIP_TOKENS))[0] for name, tokenizer in tokenizers.items()
        }

    def spec(self) -> Tree:
        """`{part: tree of ShapeDtypeStruct}` in the dtype in which the parameters are kept."""
        return {
            name: jax.tree.map(lambda leaf, name=name: jax.ShapeDtypeStruct(leaf.shape, self._dtype(name)), spec)
            for name, spec in self.specs.items()
        }

    def rules(self) -> Rules:
        """Those of the networks, each under the name of its part."""
        return rules_of(self.networks)

    def load(self, folder: pathlib.Path, mesh: Mesh | None) -> Tree:
        """Reads the parameters from a folder straight onto a mesh, slice by slice; without one onto one device.

        Raises:
            WeightsError: names what is missing, surplus or misshapen.
        """
        if mesh is None:
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            places: dict[str, Any] = dict.fromkeys(self.networks, here)
        else:
            places = tree_shardings(self.specs, self.rules(), mesh)
        return {
            name: load(
                folder / self.PARTS[name].folder,
                self.PARTS[name].maps.weight_map(network.config),
                self.specs[name],
                places[name],
                dtype=self._dtype(name),
                source=source(self._source(name)),
            )
            for name, network in self.networks.items()
        }

    def _source(self, name: str) -> str:
        return self.PARTS[name].source

    def _dtype(self, name: str) -> Any:
        return jnp.dtype(self.networks[name].config.dtype)

    def codec(self, params: Tree) -> AutoencoderCodec:
        """The autoencoder with its parameters."""
        return AutoencoderCodec(self.networks["autoencoder"], params["autoencoder"])

    def unit(self) -> int:
        """Sides of an image are multiples of so many pixels."""
        return self.networks["autoencoder"].config.reduction

    def latent_shape(self) -> tuple[int, ...]:
        """(h, w, c) of the latents of `config.image_size`.

        Raises:
            ValueError: a side is no multiple of `unit`.
        """
        auto, unit = self.networks["autoencoder"].config, self.unit()
        height, width = self.config.image_size
        if height % unit or width % unit:
            raise ValueError(f"image_size = {height} x {width}: both sides must be multiples of {unit}; change them")
        return height // auto.reduction, width // auto.reduction, auto.latent_channels

    def generate(
        self, params: Tree, tokens: dict[str, jax.Array], null: dict[str, jax.Array], noise: jax.Array
    ) -> dict[str, jax.Array]:
        """Images from token ids and noise. To be jitted.

        Args:
            params: `{part: tree}`.
            tokens: `{encoder: [B, L] int32}`.
            null: the same of the empty (or negative) prompt, `[1, L]`.
            noise: `[B, *latent_shape]`.

        Returns:
            `image` uint8 `[B, H, W, 3]`, `pixels` float32 in [-1, 1] before rounding, and `latent` `[B, h, w, c]`.

        Raises:
            ValueError: the system draws from something else.
        """
        return run_stages(self.stages(), params, {"tokens": tokens, "null": null, "noise": noise})

    def stages(self) -> Stages:
        """Those of `generate`, from `{"tokens", "null", "noise"}`.

        Raises:
            ValueError: the system draws from something else.
        """
        raise ValueError(f"{type(self).__name__} draws from no prompts")

    def decoder(self, params: Tree, latent: jax.Array) -> dict[str, jax.Array]:
        """The last of `stages`: images of latents `[B, h, w, c]`."""
        return drawn(self.codec(params).decode(latent), latent)


class Generator:
    """Prompts to images: a system with its parameters and tokenizers."""

    def __init__(self, system: System, params: Tree, tokenizers: dict[str, Any], mesh: Mesh | None = None):
        """`tokenizers`: by encoder, each with `encode(texts, length) -> (tokens, mask)`."""
        self.system, self.params, self.tokenizers, self.mesh = system, params, tokenizers, mesh
        self._jitted = jax.jit(system.generate)

    def run(
        self,
        prompts: list[str],
        *,
        negative_prompt: str = "",
        seed: int = 0,
        indices: Sequence[int] | None = None,
        noise: Any = None,
    ) -> dict[str, np.ndarray]:
        """One image after the other, since a teacher fills the memory: everything that `System.generate` returns.

        Args:
            prompts: N texts.
            negative_prompt: what guidance leads away from.
            seed: of the noise, see `diffusion.noise`; image n depends on (seed, indices[n], prompt n) alone.
            indices: N integers, by default 0 .. N-1.
            noise: `[N, h, w, c]` in place of noise from the seed.
        """
        system = self.system
        tokens, null = (system.tokens(texts, self.tokenizers) for texts in (list(prompts), [negative_prompt]))
        shape, where = system.latent_shape(), range(len(prompts)) if indices is None else indices
        parts = []
        for n, index in enumerate(where):
            start = draw_noise(seed, index, shape)[None] if noise is None else noise[n : n + 1]
            one = {name: ids[n : n + 1] for name, ids in tokens.items()}
            parts.append(jax.device_get(self._jitted(self.params, *self._placed((one, null, start)))))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def staged(
        self, prompts: Sequence[str] | None = None, conditions: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Staged:
        """The drawing of the first prompt in stages; see `snapgen_jax.timing`. Raises as `generate`."""
        first = self._prompts(prompts, conditions)[:1]

        def tokenize() -> tuple[Tree, Tree]:
            return self.system.tokens(first, self.tokenizers), self.system.tokens([""], self.tokenizers)

        tokens, null = tokenize()
        noise = draw_noise(seed, 0, self.system.latent_shape())[None]
        given = self._placed({"tokens": tokens, "null": null, "noise": noise})
        return Staged(self.system.stages(), self.params, given, self.system.config.steps, 1, tokenize)

    def _placed(self, arrays: Tree) -> Tree:
        """Arrays whole on every device of the mesh."""
        return arrays if self.mesh is None else jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec()))

    @staticmethod
    def _prompts(prompts: Sequence[str] | None, conditions: Mapping[str, Any] | None) -> list[str]:
        if conditions or not prompts:
            raise ValueError("this system draws from prompts; give --prompt, and no --condition")
        return list(prompts)

    def generate(
        self,
        prompts: list[str] | None,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        negative_prompt: str = "",
        conditions: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """Images uint8 `[N, H, W, 3]`; arguments as for `run`.

        Raises:
            ValueError: there is no prompt, or a condition, which this system does not take.
        """
        asked = self._prompts(prompts, conditions)
        return self.run(asked, seed=seed, indices=indices, negative_prompt=negative_prompt)["image"]
