"""Prompts to images from a trained run: what notebooks, evaluation and the command line all call.

generator = snapgen_jax.load("workdir")
images = generator.generate(["a red circle left of a blue square"], seed=0)   # uint8 [1, H, W, 3]
"""

from __future__ import annotations

import copy
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from snapgen_jax.config import Config, build, from_json, recipe_class
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer, PretrainedTokenizers
from snapgen_jax.data.tokenizer import CaptionTokenizer, Tokenizer
from snapgen_jax.networks.module import Platform
from snapgen_jax.parallel.mesh import make_mesh
from snapgen_jax.systems import sd35
from snapgen_jax.systems.sd35 import SD35, SD35Config, SD35Generator
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import example_keys, key
from snapgen_jax.training.recipe import Recipe, frozen_for_generation

Tree = Any


class Generator:
    """A recipe with weights and a tokenizer.

    Attributes:
        recipe: what was trained.
        params: `{player: weights}`, averaged ones where the run keeps an average.
        frozen: the recipe's frozen networks.
        tokenizer: prompts to ids; None for a recipe that takes stored text states, which draws nothing from prompts.
    """

    def __init__(self, recipe: Recipe, params: Tree, frozen: Tree, tokenizer: CaptionTokenizer | None):
        self.recipe, self.params, self.frozen, self.tokenizer = recipe, params, frozen, tokenizer
        self._jitted = functools.lru_cache(maxsize=16)(self._jit)

    def _jit(self, options: tuple[tuple[str, Any], ...]) -> Any:
        def generate(params: Tree, frozen: Tree, conditions: Tree, seed: jax.Array, indices: jax.Array) -> Tree:
            keys = example_keys(seed, indices, "generate")
            return self.recipe.generate(params, frozen, conditions, keys, **dict(options))

        return jax.jit(generate, out_shardings=on_every_host(self.params))

    def with_weights(self, params: Tree, frozen: Tree) -> Generator:
        """The same with other arrays of the same shapes; what was compiled for one serves both."""
        other = copy.copy(self)
        other.params, other.frozen = params, frozen
        return other

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> np.ndarray:
        """Images `uint8 [N, H, W, 3]`; image n depends on (seed, indices[n], prompts[n]) and the options alone.

        Args:
            prompts: N texts; one longer than the encoder takes is cut, with a warning.
            seed: of the noise.
            indices: N integers, by default 0 .. N-1.
            batch_size: images computed together; one program serves any number of prompts that is at least this.
            options: static options of the recipe's `generate`, such as `steps` and `guidance`.
        """
        return self.run(prompts, seed=seed, indices=indices, batch_size=batch_size, **options)["image"]

    def run(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Everything that the recipe's `generate` returns, `{name: [N, ...]}`. Arguments as for `generate`."""
        prompts = list(prompts)
        where = np.arange(len(prompts)) if indices is None else np.asarray(indices)
        if not prompts or len(where) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts came with {len(where)} indices; give at least one prompt, and one index each"
            )
        if self.tokenizer is None:
            raise ConfigError(
                "this run takes no prompts: it was trained on stored text states, or on images alone, and it "
                "holds no text encoder; call `recipe.generate(params, frozen, conditions, keys)` with the like of those"
            )
        arrays = prompt_arrays(self.recipe, self.tokenizer, prompts)
        jitted = self._jitted(tuple(sorted(options.items())))
        size = min(batch_size, len(prompts))
        parts = []
        for start in range(0, len(prompts), size):
            rows = np.arange(start, start + size) % len(
                prompts
            )  # the last batch is filled up, so that one program serves
            conditions = {name: array[rows] for name, array in arrays.items()}
            drawn = jitted(self.params, self.frozen, conditions, np.int32(seed), where[rows].astype(np.int32))
            parts.append(jax.device_get(drawn))
        return {name: np.concatenate([part[name] for part in parts])[: len(prompts)] for name in parts[0]}


def prompt_arrays(recipe: Recipe, tokenizer: CaptionTokenizer, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `[N, L]` that stand for N prompts in a recipe's batches."""
    specs = next(iter(recipe.batch_specs().values()))
    return tokenizer.arrays(prompts, {name: specs[name].shape[1] for name in tokenizer.names if name in specs})


def published_tokenizer(recipe: Recipe) -> PretrainedTokenizers | None:
    """The tokenizers of the published text encoders that a recipe uses; None where it uses none.

    Raises:
        DataError: one is missing, or is that of another encoder.
    """
    folders = getattr(recipe, "tokenizer_folders", {})
    return PretrainedTokenizers.load(folders, getattr(recipe, "vocab_sizes", {})) if folders else None


def on_every_host(params: Tree) -> jax.sharding.NamedSharding | None:
    """Where results must lie for each of several processes to read them whole; None for one process alone."""
    if jax.process_count() == 1:
        return None
    mesh = next(leaf.sharding.mesh for leaf in jax.tree.leaves(params))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def load_config(workdir: epath.PathLike) -> ConfigDict:
    """The config of a workdir, completed.

    Raises:
        ConfigError: the folder is no workdir.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(
            f"{workdir} is not a workdir: it has no config.json; train one with `snapgen train --workdir={workdir}`"
        )
    return from_json(path.read_text())


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
    cls = recipe_class(str(config.recipe))
    try:
        return cls(build(cls.Config, config), platform or jax.default_backend())
    except ValueError as error:
        raise ConfigError(f"{workdir}: {error}") from error


def _with_decoder(config: ConfigDict, decoder: epath.PathLike) -> ConfigDict:
    """The config of a generator with the tiny decoder of another run."""
    other = load_config(decoder)
    if other.recipe != "decoder_distillation":
        raise ConfigError(f"{decoder} is a run of {other.recipe!r}; a decoder is trained by 'decoder_distillation'")
    codec: Any = config.get("codec")
    if codec is None or codec.kind != "autoencoder":
        raise ConfigError(
            "this run's latents are not those of an autoencoder, so there is nothing for a trained decoder to decode; "
            "train with codec.kind='autoencoder'"
        )
    with config.unlocked():
        codec.update(decoder="tiny", decoder_workdir=str(decoder), tiny_decoder=other.decoder)
    return config


def load(
    workdir: epath.PathLike,
    step: int | None = None,
    platform: str | None = None,
    decoder: epath.PathLike | None = None,
) -> Generator:
    """The generator of a trained run.

    Args:
        workdir: local or object-store folder of the run.
        step: which checkpoint; the newest by default.
        platform: "cpu", "gpu" or "tpu"; by default the one JAX runs on.
        decoder: a run of `decoder_distillation` whose tiny decoder takes the place of the codec's decoder.

    Raises:
        ConfigError: there is no run, no checkpoint, or one of another shape.
    """
    workdir = epath.Path(workdir)
    recipe = load_recipe(workdir, platform, decoder)
    return Generator(
        recipe, load_weights(workdir, recipe, step), frozen_for_generation(recipe), _tokenizer(recipe, workdir)
    )


def _tokenizer(recipe: Recipe, workdir: epath.Path) -> CaptionTokenizer | None:
    if any(getattr(recipe, "tokenizer_folders", {}).values()):
        return published_tokenizer(recipe)
    own = workdir / "tokenizer.json"
    return Tokenizer.load(own) if own.exists() else None


def load_weights(workdir: epath.PathLike, recipe: Recipe, step: int | None = None) -> Tree:
    """`{player: weights}` of a trained run, averaged ones where it keeps an average; nothing else is read.

    Args:
        workdir: of the run.
        recipe: the run's recipe, see `load_recipe`.
        step: which checkpoint; the newest by default.

    Raises:
        ConfigError: there is no checkpoint, or one of another shape.
    """
    checkpointer = Checkpointer(workdir)
    try:
        found = checkpointer.latest_step() if step is None else step
        if found is None:
            raise ConfigError(
                f"{workdir} has no complete checkpoint yet; train on with `snapgen train --workdir={workdir}`"
            )
        state = jax.eval_shape(recipe.init, key(0, 0, "init"))
        spec = {name: player.params for name, player in state.players.items()}
        return checkpointer.restore_weights(spec, found)
    finally:
        checkpointer.close()


def load_system(config: Config, folder: str | os.PathLike[str], platform: str | None = None) -> SD35Generator:
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
        system_config = build(SD35Config, config)
        system = SD35(system_config, sd35.read_configs(root), backend)
        mesh = make_mesh(system_config.mesh) if jax.device_count() > 1 else None
        system.latent_shape()
        params = system.load(root, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    tokenizers = {name: PretrainedTokenizer.load(root / sd35.TOKENIZERS[name]) for name in system.text_encoders}
    return SD35Generator(system, params, tokenizers, mesh)
