"""Prompts and other conditions to images from a trained run: what notebooks, evaluation and the command line all call.

generator = snapgen_jax.load("workdir")
images = generator.generate(["a red circle left of a blue square"], seed=0)   # uint8 [1, H, W, 3]
outputs = generator.run(conditions={"label": [3, 7]}, steps=28)   # {name: [2, ...]}
"""

from __future__ import annotations

import copy
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from snapgen_jax.conditions import chosen_options, condition_arrays, described, prompt_arrays, same_length
from snapgen_jax.config import Config, build, from_json, resolve, system_class
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from snapgen_jax.data.tokenizer import CaptionTokenizer
from snapgen_jax.data.tokenizer_specs import load_tokenizers
from snapgen_jax.diffusion.noise import word
from snapgen_jax.diffusion.stages import Staged, Stages
from snapgen_jax.networks.lora import merge
from snapgen_jax.networks.module import Network, Platform, narrowed
from snapgen_jax.parallel.mesh import make_mesh, mesh_of, put_batch
from snapgen_jax.systems.published import Generator as PublishedGenerator
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.folder import is_weights_folder, runs_of
from snapgen_jax.weights.frozen import is_published, load_network, load_players
from snapgen_jax.weights.peft import read_peft, roles_in

Tree = Any


class Generator:
    """A recipe with weights and a tokenizer.

    Attributes:
        recipe: what was trained.
        params: `{player: weights}`, averaged ones where the run keeps an average.
        frozen: the recipe's frozen networks.
        tokenizer: prompts to ids; None for a recipe that reads no text, which takes no prompts.
        mesh: of devices of this process, over which a batch is split; None for one device.
    """

    def __init__(
        self,
        recipe: Recipe,
        params: Tree,
        frozen: Tree,
        tokenizer: CaptionTokenizer | None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.recipe, self.params, self.frozen, self.tokenizer = recipe, params, frozen, tokenizer
        self.mesh = mesh
        self._jitted = functools.lru_cache(maxsize=16)(self._jit)

    def _jit(self, options: Any) -> Any:
        def generate(params: Tree, frozen: Tree, conditions: Tree, seed: jax.Array, indices: jax.Array) -> Tree:
            keys = example_keys(seed, indices)
            return self.recipe.generate(params, frozen, conditions, keys, options)

        return jax.jit(generate, out_shardings=on_every_host(self.params) if self.mesh is None else None)

    def with_weights(self, params: Tree, frozen: Tree) -> Generator:
        """The same with other arrays of the same shapes; what was compiled for one serves both."""
        other = copy.copy(self)
        other.params, other.frozen = params, frozen
        return other

    @property
    def devices(self) -> int:
        """Over how many devices a batch is split."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def takes_prompts(self) -> bool:
        """Whether the tokenizer makes an array that generation needs."""
        return self.tokenizer is not None and any(name in self.tokenizer.names for name in self.recipe.conditions())

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The arrays that generation needs and no prompt gives: labels, images to edit, stored text states."""
        made = () if self.tokenizer is None else self.tokenizer.names
        return tuple(name for name in self.recipe.conditions() if name not in made)

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        *,
        conditions: Mapping[str, Any] | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> np.ndarray:
        """The output "image" of `run`: `uint8 [N, H, W, 3]`. Arguments as for `run`.

        Raises:
            ValueError: as for `run`, or the recipe gives no "image".
        """
        outputs = self.run(prompts, conditions=conditions, seed=seed, indices=indices, batch_size=batch_size, **options)
        if "image" not in outputs:
            raise ValueError(
                f"this run gives no 'image' but {', '.join(map(repr, outputs))}; read those from `run(...)`"
            )
        return outputs["image"]

    def run(
        self,
        prompts: Sequence[str] | None = None,
        *,
        conditions: Mapping[str, Any] | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Everything that the recipe's `generate` returns, `{name: [N, ...]}`.

        Example n depends on (seed, indices[n], prompts[n], conditions[:][n]) and the options alone.

        Args:
            prompts: N texts; one longer than the encoder takes is cut, with a warning.
            conditions: `{name: [N, ...]}`, arrays of the recipe's batches as they are, such as class labels, images to
                edit or stored text states, and "noise". Alone, or beside prompts.
            seed: of the noise, from 0 to 2**32 - 1. An exported bundle draws the same from it; see `diffusion.noise`.
            indices: N integers within the same bounds, by default 0 .. N-1. An unconditional recipe takes N from them.
            batch_size: examples computed together; one program serves any N that is at least this. With a mesh, a
                multiple of its devices.
            options: fields of `recipe.options`, such as `steps` and `guidance`.

        Raises:
            ValueError: a condition is unknown or does not fit, one is missing, lengths differ, or a seed or an index is
                out of bounds.
            ConfigError: an option is unknown or does not fit, or the recipe takes no prompts and got some.
        """
        chosen = chosen_options(self.recipe.options, options)
        arrays = self._arrays(prompts, conditions or {})
        counts = {} if prompts is None else {"prompts": len(prompts)}
        counts |= {f"conditions[{name!r}]": len(arrays[name]) for name in conditions or {}}
        counts |= {} if indices is None else {"indices": len(indices)}
        if not counts:
            raise ValueError(f"there is nothing to draw: {self._wanted()}")
        count = same_length(counts)
        drawn_from = word("seed", seed)
        where = np.array([word("index", i) for i in (range(count) if indices is None else indices)])
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        jitted, size = self._jitted(chosen), min(batch_size, count)
        parts = []
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count  # the last batch is filled up, so that one program serves
            batch = {name: array[rows] for name, array in arrays.items()}
            batch, indices_here = (
                (batch, where[rows]) if self.mesh is None else put_batch((batch, where[rows]), self.mesh)
            )
            outputs = jitted(self.params, self.frozen, batch, drawn_from, indices_here)
            parts.append(jax.device_get(outputs))
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def staged(
        self,
        prompts: Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Staged:
        """The batch that `run` would draw with the same arguments, in stages; see `snapgen_jax.timing`.

        Raises:
            ValueError: as for `run`, or this recipe does not draw in stages.
        """
        if not isinstance(self.recipe, _HasStages):
            raise ValueError(f"a run of {type(self.recipe).__name__} does not draw in stages that could be timed")
        chosen, arrays = chosen_options(self.recipe.options, options), self._arrays(prompts, conditions or {})
        count = same_length({name: len(array) for name, array in arrays.items()})
        keys = jax.jit(example_keys)(word("seed", seed), np.arange(count, dtype=np.uint32))
        given = {"conditions": arrays, "keys": keys}
        if self.mesh is not None:
            given = put_batch(given, self.mesh)
        networks = self.recipe.weights(self.params, self.frozen)
        tokenize = None if prompts is None else functools.partial(self._arrays, prompts, conditions or {})
        return Staged(self.recipe.stages(chosen), networks, given, chosen.steps, count, tokenize)

    def _arrays(self, prompts: Sequence[str] | None, conditions: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All that generation reads, `{name: [N, ...]}`; N is not compared yet."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts is one text; give a list of texts, [{prompts!r}]")
        if prompts is not None and not self.takes_prompts:
            raise ConfigError(f"this run takes no prompts: it holds no text encoder and tokenizer; {self._wanted()}")
        arrays = condition_arrays(self.recipe, conditions)
        if prompts is not None:
            assert self.tokenizer is not None
            made = prompt_arrays(self.recipe, self.tokenizer, list(prompts), self.recipe.conditions())
            for name in made:
                if name in arrays:
                    raise ValueError(f"both the prompts and conditions[{name!r}] give {name!r}; leave one of them out")
            arrays = {**made, **arrays}
        missing = [name for name in self.recipe.conditions() if name not in arrays]
        if missing:
            raise ValueError(f"generation needs {', '.join(map(repr, missing))}: {self._wanted()}")
        return arrays

    def _wanted(self) -> str:
        """The end of an error about conditions: what to call instead."""
        if not self.recipe.conditions():
            return "the run is unconditional; call `run(indices=range(n))`"
        prompts = "give `prompts`" if self.takes_prompts else ""
        arrays = ", ".join(described(self.recipe, name) for name in self.condition_names)
        return " and ".join(filter(None, (prompts, f"give `conditions` (--condition) with {arrays}" if arrays else "")))


def on_every_host(params: Tree) -> jax.sharding.NamedSharding | None:
    """Where results must lie for each of several processes to read them whole; None for one process alone."""
    if jax.process_count() == 1 or (mesh := mesh_of(params)) is None:
        return None
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def load_config(workdir: epath.PathLike) -> ConfigDict:
    """The config of a workdir, or of a folder of weights, completed. The latter names the runs that lie inside of it.

    Raises:
        ConfigError: the folder is neither.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        bundle = (epath.Path(workdir) / "manifest.json").exists() and (epath.Path(workdir) / "program.json").exists()
        advice = (
            f"it is a bundle: name it by --bundle={workdir}, where the command takes one"
            if bundle
            else f"train one with `snapgen train --workdir={workdir}`"
        )
        raise ConfigError(f"{workdir} is not a workdir: it has no config.json; {advice}")
    config = from_json(path.read_text(), workdir)
    if is_weights_folder(workdir):
        try:
            with config.unlocked():
                config.update_from_flattened_dict(runs_of(workdir))
        except (WeightsError, KeyError, TypeError) as error:
            raise ConfigError(f"{workdir}: {error}") from error
    return config


def load_recipe(workdir: epath.PathLike, platform: str | None = None, decoder: epath.PathLike | None = None) -> Recipe:
    """The recipe of a workdir, from its `config.json`.

    Args:
        workdir: of the run.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX runs on.
        decoder: a run of `decoder_distillation` whose tiny decoder takes the place of the codec's decoder.

    Raises:
        ConfigError: a folder is no workdir, or the decoder does not fit.
    """
    config = load_config(workdir)
    if decoder is not None:
        config = _with_decoder(config, decoder)
    return resolve(config, name=str(workdir)).build(platform or jax.default_backend())


def load_drawing(
    workdir: epath.PathLike,
    platform: str | None = None,
    decoder: epath.PathLike | None = None,
    dtype: str | None = None,
    encoders: Mapping[str, str] | None = None,
) -> Recipe:
    """As `load_recipe`, but of a run on stored inputs with their encoders in place of what is stored, where its config
    names weights of these: the recipe that takes prompts and gives images. `dtype` and `encoders` are as for `load`."""
    config = load_config(workdir)
    config = config if decoder is None else _with_decoder(config, decoder)
    config = config if not encoders else _with_encoders(config, encoders)
    if dtype is not None:
        with config.unlocked():
            _set_dtype(config, dtype)
    resolved = resolve(config, name=str(workdir))
    return resolved.drawing().build(platform or jax.default_backend())


def _set_dtype(config: ConfigDict, dtype: str) -> None:
    """Every network's dtype that the platform would choose."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _set_dtype(value, dtype)
        elif name == "dtype" and value == "auto":
            config[name] = dtype


def _narrowed(networks: Mapping[str, Network], held: Tree) -> Tree:
    """What a player holds, `{role: parameters}`, as `module.narrowed` keeps networks."""
    return {role: narrowed(networks[role], tree) if role in networks else tree for role, tree in held.items()}


def _with_decoder(config: ConfigDict, decoder: epath.PathLike) -> ConfigDict:
    """The config of a generator with the tiny decoder of another run."""
    other = load_config(decoder)
    if other.recipe != "decoder_distillation":
        raise ConfigError(f"{decoder} is a run of {other.recipe!r}; a decoder is trained by 'decoder_distillation'")
    inputs: Any = config.inputs
    codec: Any = inputs.get("codec") or inputs.get("encoders", {}).get("codec")
    if codec is None or codec.kind != "autoencoder":
        raise ConfigError(
            "this run's latents are not those of an autoencoder, so there is nothing for a trained decoder to decode; "
            "train with inputs.codec.kind='autoencoder'"
        )
    with config.unlocked():
        codec.update(decoder="tiny", decoder_workdir=str(decoder), tiny_decoder=other.decoder)
    return config


def _with_encoders(config: ConfigDict, encoders: Mapping[str, str]) -> ConfigDict:
    """The config of a tuned model with further tuned text encoders, `{name: workdir}`."""
    if "others" not in config:
        raise ConfigError(
            f"a run of the recipe {config.recipe!r} mixes no text encoders; name one of 'reward_tuning', beside which "
            "others are added"
        )
    known: Any = config["others"]
    with config.unlocked():
        known.update(encoders)
    return config


def load(
    workdir: epath.PathLike,
    step: int | None = None,
    platform: str | None = None,
    decoder: epath.PathLike | None = None,
    adapters: str | os.PathLike[str] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    encoders: Mapping[str, str] | None = None,
) -> Generator:
    """The generator of a trained run. One on stored inputs runs their encoders, where its config names weights of them,
    so that it takes prompts and gives images.

    Args:
        workdir: local or object-store folder of the run, or a folder that `snapgen weights export` made of it.
        step: which checkpoint; the newest by default.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX runs on.
        decoder: a run of `decoder_distillation` whose tiny decoder takes the place of the codec's decoder.
        adapters: local folder of peft's files, one folder a network (`unet/`, `text/`), which are merged.
        mesh: of devices of this process, which each hold all weights and share out a batch; None for one device.
        dtype: in which the networks compute; by default float32 on a CPU and bfloat16 elsewhere. Where it is bfloat16
            their kernels are kept so, too.
        encoders: of a run of `reward_tuning`: further runs of it, by the names that its option `encoder_mix` mixes
            their text encoders by.

    Raises:
        ConfigError: there is no run, no checkpoint, or one of another shape; or the adapters or encoders do not fit.
    """
    workdir = epath.Path(workdir)
    recipe = load_drawing(workdir, platform, decoder, dtype, encoders)
    weights = load_weights(workdir, recipe, step)  # first: a run that has none yet may have no tokenizer either
    tokenizer = load_tokenizers(recipe.tokenizers(), workdir / "tokenizer.json")
    if isinstance(recipe, _HasNetworks):
        weights = {player: _narrowed(recipe.networks(), held) for player, held in weights.items()}
    if mesh is not None:
        weights = jax.device_put(weights, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    frozen = recipe.load_frozen(mesh, "generate")
    if adapters is not None:
        weights, frozen = with_adapters(recipe, weights, frozen, pathlib.Path(adapters))
    return Generator(recipe, weights, frozen, tokenizer, mesh)


@runtime_checkable
class _HasStages(Protocol):
    """A recipe whose `generate` is a chain of stages, from `{"conditions", "keys"}`."""

    def weights(self, params: Tree, frozen: Tree) -> Tree: ...

    def stages(self, options: Any) -> Stages: ...


@runtime_checkable
class _HasNetworks(Protocol):
    """A recipe whose roles are networks as they are."""

    def networks(self) -> dict[str, Network]: ...


def with_adapters(recipe: Recipe, params: Tree, frozen: Tree, folder: pathlib.Path) -> tuple[Tree, Tree]:
    """Weights with adapters merged, wherever the network that they are of is held.

    Args:
        recipe: of the run.
        params: `{player: weights}`.
        frozen: its frozen networks.
        folder: of peft's files, a folder each network (`unet/`, `text/`).

    Returns:
        The two trees; what is adapted is float32.

    Raises:
        ConfigError: the recipe holds no networks as they are, or the adapters do not fit.
    """
    if not isinstance(recipe, _HasNetworks):
        raise ConfigError(f"a run of {type(recipe).__name__} takes no further adapters; give the run that it adapts")
    networks = recipe.networks()
    try:
        for role in roles_in(folder):
            if role not in networks:
                raise ConfigError(f"{folder} has adapters of {role!r}; this run holds {', '.join(networks)}")
            found, scale = read_peft(folder / role, networks[role].config)
            merged = {name: merge(held, {role: found}, scale) for name, held in params.items() if role in held}
            params = {**params, **merged}
            frozen = merge(frozen, {role: found}, scale) if role in frozen else frozen
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return params, frozen


def load_weights(workdir: epath.PathLike, recipe: Recipe, step: int | None = None) -> Tree:
    """`{player: weights}` of a trained run, averaged ones where it keeps an average; nothing else is read.

    Args:
        workdir: of the run, or a folder of its weights.
        recipe: the run's recipe, see `load_recipe`.
        step: which checkpoint; the newest by default.

    Raises:
        ConfigError: there is no checkpoint, or one of another shape.
    """
    state = jax.eval_shape(recipe.init, key(0, 0, "init"))
    return load_players(workdir, {name: player.params for name, player in state.players.items()}, step)


def load_start(source: epath.PathLike) -> Tree:
    """`{player: weights}` that a run starts from: those of an earlier run, or of a published network.

    Raises:
        ConfigError: `source` is neither the workdir of one nor the folder of the other.
    """
    if is_published(epath.Path(source)):
        return {"model": load_network(source)}
    return load_weights(source, load_recipe(source))


def load_system(config: Config, folder: str | os.PathLike[str], platform: str | None = None) -> PublishedGenerator:
    """A published system with the weights and tokenizers of a local folder, ready to draw.

    Args:
        config: a completed config with `system`, such as `configs/teacher/sd35_large.py`.
        folder: in the layout of the system's repository.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX runs on.

    Raises:
        ConfigError: the config names no system, or does not fit the folder or the devices.
    """
    if "system" not in config:
        raise ConfigError(
            "this config trains something; --weights wants one with `system`, such as configs/teacher/sd35_large.py"
        )
    root, backend = pathlib.Path(folder), cast(Platform, platform or jax.default_backend())
    try:
        of = system_class(str(config["system"]))
        system_config = build(of.Config, config)
        system = of.from_folder(system_config, root, backend)
        mesh = make_mesh(system_config.mesh) if jax.device_count() > 1 else None
        system.latent_shape()
        params = system.load(root, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tokenizers = {name: PretrainedTokenizer.load(root / system.TOKENIZERS[name]) for name in system.text_encoders}
    return system.generator(params, tokenizers, mesh)
