"""The frozen network of an earlier run, or of published weights, that something small beside it is trained for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh

from snapgen_jax.inputs.class_labels import LABEL
from snapgen_jax.inputs.interfaces import Inputs, TokenizerSpec
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Network
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.recipes._assembly import specs_of, trained_roles
from snapgen_jax.recipes._run import check_output, run_config
from snapgen_jax.recipes.flow_matching import FlowMatching
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.frozen import is_published, load_dit, load_mmdit, load_run, load_sd_unet

Tree = Any


def load_base(base: str, method: FlowMatching, mesh: Mesh | None) -> Tree:
    """`{role: parameters}` of all networks of a method: its own from `base`, what the inputs bring from where they say.

    Args:
        base: a trained run, whose averaged weights are read; or the folder `transformer/` of a published Stable
            Diffusion 3.5 or DiT, or `unet/` of a Stable Diffusion before.
        method: whose config says what the base is.
        mesh: where the weights go; None for one device.

    Raises:
        ConfigError: there is no base, or it is not what the config says.
    """
    networks, inputs = method.networks(), method.inputs
    if not base:
        raise ConfigError("there is no network to start from: set base to a trained run, or to published weights")
    brought = inputs.load(inputs.pretrained(), mesh)
    own = {role: network for role, network in networks.items() if role not in brought}
    if is_published(epath.Path(base)):
        return {**_published(base, method, own, mesh), **brought}
    _check_run(base, method.config, inputs)
    return {**load_run(base, specs_of(own, own), mesh=mesh, rules=rules_of(own)), **brought}


def _published(base: str, method: FlowMatching, own: Mapping[str, Network], mesh: Mesh | None) -> Tree:
    """The networks of published weights: an MMDiT, a Stable Diffusion's UNet, or a DiT and its table of classes."""
    config, specs = method.config.network, specs_of(own, own)
    if isinstance(config, MMDiTConfig) and own.keys() == {method.role}:
        return {method.role: load_mmdit(base, config, specs[method.role], mesh)}
    if isinstance(config, SDUNetConfig) and own.keys() == {method.role}:
        return {method.role: load_sd_unet(base, config, specs[method.role], mesh)}
    if isinstance(config, DiTConfig) and own.keys() <= {method.role, LABEL}:
        return load_dit(base, config, own[LABEL].config if LABEL in own else None, specs, mesh)
    raise ConfigError(
        f"{base} holds published weights, of an MMDiT or a UNet alone or of a DiT and its classes: set network.kind to "
        "'mmdit' or 'sd_unet', and inputs whose text encoders are published or of a run; or network.kind to 'dit' and "
        "inputs.kind to 'class_labels'"
    )


def _check_run(base: str, config: Any, inputs: Inputs) -> None:
    """Raises where the base run is not what the config says of it."""
    run = run_config(base)
    check_output(base, run, config.prediction, config.schedule)
    if isinstance(of_run := run.get("inputs"), Mapping):
        # A text encoder that comes from the run itself fits it.
        parts = ("latent",) if trained_roles(inputs) else ("latent", "condition")
        inputs.check_run(base, of_run, parts)


def base_tokenizers(base: str, tokenizers: Mapping[str, TokenizerSpec]) -> dict[str, TokenizerSpec]:
    """The tokenizers of the inputs; where the base run trained one, that."""
    return {
        name: dataclasses.replace(spec, workdir=base) if spec.kind == "trained" and not spec.workdir else spec
        for name, spec in tokenizers.items()
    }
