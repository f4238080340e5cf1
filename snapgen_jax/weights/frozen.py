"""Networks that a recipe uses and does not train: their weights, from an earlier run or from published files."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding

from snapgen_jax.networks.codec import Codec, CodecConfig
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Network, build, flatten, frozen_spec, init, stand_in, unflatten
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.parallel.sharding import Rules, tree_shardings
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.checkpoint import Tensor, WeightsError, read_folder
from snapgen_jax.weights.folder import held, is_weights_folder, read_manifest, read_weights, tensor_name
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import WeightMap
from snapgen_jax.weights.maps import clip as clip_map
from snapgen_jax.weights.maps import dit as dit_map
from snapgen_jax.weights.maps import gemma2 as gemma2_map
from snapgen_jax.weights.maps import lpips as lpips_map
from snapgen_jax.weights.maps import rewards, sd3_autoencoder, sd3_mmdit, sd_unet
from snapgen_jax.weights.maps import t5 as t5_map
from snapgen_jax.weights.published import read_config_file, read_json
from snapgen_jax.weights.sources import autoencoder_name, source

Tree = Any
Path = tuple[str, ...]
_STARTS: dict[str, tuple[str, Any]] = {
    "UNet2DConditionModel": ("sd15", sd_unet),
    "AutoencoderKL": ("sd1_vae", sd3_autoencoder),
}
_STAND_IN = 2412  # the seed of the networks that stand in for trained ones

log = logging.getLogger(__name__)


def load_run(
    workdir: epath.PathLike,
    spec: Tree,
    *,
    player: str = "model",
    step: int | None = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> Tree:
    """Weights of a trained run, the averaged ones where it keeps an average, in the dtypes that are asked for.

    Args:
        workdir: of the run, or a folder of its weights (`weights.folder`).
        spec: nested dict of `ShapeDtypeStruct`: which of the player's weights are wanted; the others are left out.
        player: whose.
        step: which checkpoint; the newest by default.
        mesh: where the weights go; without one onto one device.
        rules: how they are split over the mesh.

    Raises:
        ConfigError: there is no checkpoint, or it does not hold these weights; names those that differ.
    """
    wanted, places = flatten(spec), _places(spec, mesh, rules)
    if is_weights_folder(workdir):
        with _told():
            of_player = _by_path({player: spec}, _held_at(workdir, step))
            check_weights(f"the folder {str(workdir)!r}", flatten({player: spec}), of_player)
            return read_weights(workdir, {player: spec}, {player: places})[player]
    with _checkpoints(workdir, step) as (checkpointer, found):
        saved = {
            tuple(name.split("/")[1:]): jax.ShapeDtypeStruct(shape, np.dtype(dtype))
            for name, (shape, dtype) in checkpointer.meta(found)["shapes"].items()
            if name.startswith("ema/")
        }
        of_player = {path[1:]: leaf for path, leaf in saved.items() if path[0] == player}
        check_weights(f"the run {str(workdir)!r}", wanted, of_player)
        read = flatten(checkpointer.restore_weights(unflatten(saved), found))
    weights = {path: np.asarray(read[player, *path]).astype(leaf.dtype) for path, leaf in wanted.items()}
    return jax.device_put(unflatten(weights), places)


def load_players(workdir: epath.PathLike, spec: Tree, step: int | None = None) -> Tree:
    """All weights of a trained run on the first device: averaged ones where it keeps an average.

    Args:
        workdir: of the run, or a folder of its weights (`weights.folder`).
        spec: `{player: tree of ShapeDtypeStruct}`, all that the run has.
        step: which checkpoint; the newest by default.

    Raises:
        ConfigError: there is no checkpoint, or it holds other weights.
    """
    if is_weights_folder(workdir):
        with _told():
            tensors, known = _held_at(workdir, step), {tensor_name(path) for path in flatten(spec)}
            check_weights(f"the folder {str(workdir)!r}", flatten(spec), _by_path(spec, tensors))
            if surplus := sorted(tensors.keys() - known):
                raise ConfigError(
                    f"the folder {str(workdir)!r} holds what its config.json does not describe: "
                    f"{', '.join(surplus[:10])}; fetch it again"
                )
            return read_weights(workdir, spec, _places(spec, None, ()))
    with _checkpoints(workdir, step) as (checkpointer, found):
        return checkpointer.restore_weights(spec, found)


@contextlib.contextmanager
def _checkpoints(workdir: epath.PathLike, step: int | None) -> Iterator[tuple[Checkpointer, int]]:
    """The checkpoints of a run, and which of them is meant."""
    checkpointer = Checkpointer(workdir)
    try:
        found = checkpointer.latest_step() if step is None else step
        if found is None:
            lacks = "it has no complete checkpoint yet" if epath.Path(workdir).exists() else "there is no such folder"
            raise ConfigError(
                f"{str(workdir)!r} is no trained run: {lacks}; train it with `snapgen train --config=... "
                f"--workdir={workdir}`, or name another"
            )
        yield checkpointer, found
    finally:
        checkpointer.close()


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with weights, as an error for the user."""
    try:
        yield
    except WeightsError as error:
        raise ConfigError(str(error)) from error


def _by_path(spec: Tree, tensors: Mapping[str, Tensor]) -> dict[Path, Tensor]:
    return {path: tensors[tensor_name(path)] for path in flatten(spec) if tensor_name(path) in tensors}


def _held_at(folder: epath.PathLike, step: int | None) -> dict[str, Tensor]:
    """The tensors of a folder of weights, which must be those of `step` where that is asked for."""
    has = read_manifest(folder).step
    if step not in (None, has):
        raise ConfigError(f"{str(folder)!r} holds the weights of step {has} alone, not of {step}; leave the step out")
    return held(folder)


def check_weights(who: str, wanted: Mapping[Path, Any], held: Mapping[Path, Any]) -> None:
    """Compares the shapes of weights.

    Args:
        who: holds them, for the message: "the run 'runs/teacher'".
        wanted: by path, what the config describes.
        held: by path, what there is.

    Raises:
        ConfigError: one is missing or has another shape; names the first ten.
    """
    lines = [
        f"  {'/'.join(path)}: {list(held[path].shape) if path in held else 'none'}, the config says {list(leaf.shape)}"
        for path, leaf in wanted.items()
        if path not in held or held[path].shape != leaf.shape
    ]
    if lines:
        more = [f"  ... and {len(lines) - 10} more"] if len(lines) > 10 else []
        message = f"{who} holds another network than the config describes; make their sections equal:"
        raise ConfigError("\n".join([message, *lines[:10], *more]))


def load_codec(config: CodecConfig, codec: Codec, mesh: Mesh | None = None) -> Tree:
    """The parameters of a codec, a tree like `codec.spec()`; `{}` for a codec without any.

    Args:
        config: names the runs, or the folders of published weights, that hold them.
        codec: `build_codec(config, ...)`.
        mesh: where the parameters go; without one onto one device.

    Raises:
        ConfigError: a run or folder is not named, is not there, or holds another network.
    """
    if config.kind != "autoencoder":
        return {}
    spec: Tree = codec.spec()
    if config.decoder == "autoencoder":
        return _load_autoencoder(config, spec, mesh)
    if not config.decoder_workdir:
        raise ConfigError("the tiny decoder has no weights: set codec.decoder_workdir to a run that trained one")
    tiny = load_run(config.decoder_workdir, {"decoder": spec["decoder"]}, mesh=mesh, rules=config.tiny_decoder.rules())
    return {**tiny, "encoder": _load_autoencoder(config, spec["encoder"], mesh)}


def _load_autoencoder(config: CodecConfig, spec: Tree, mesh: Mesh | None) -> Tree:
    name = autoencoder_name(config.autoencoder.scale)
    if not config.workdir:
        raise ConfigError(
            "the autoencoder has no weights: set codec.workdir to a run of the recipe 'autoencoder', or to a folder of "
            f"published weights.\n{source(name).advice}"
        )
    folder = epath.Path(config.workdir)
    if not is_published(folder):
        held = load_run(folder, {"autoencoder": spec}, mesh=mesh, rules=config.autoencoder.rules())
        return held["autoencoder"]
    return _load_published(name, folder, sd3_autoencoder, config.autoencoder, spec, mesh)


def load_network(folder: epath.PathLike) -> dict[str, Tree]:
    """A published network that a run may start from: the UNet of a Stable Diffusion before the third, or an
    autoencoder. Its `config.json` says which, and of which size.

    Args:
        folder: `unet/` or `vae/` of the repository.

    Returns:
        `{role: parameters}`, float32 on the first device; the role is the kind of the network's config.

    Raises:
        ConfigError: the folder holds another network, or none whole.
    """
    file = epath.Path(folder) / "config.json"
    with _told():
        found = read_json(file).get("_class_name", "")
        if found not in _STARTS:
            raise ConfigError(
                f"{str(folder)!r} holds a published {found or 'network that its config.json does not name'}; a run "
                f"starts from an earlier run, or from a published {' or '.join(_STARTS)}"
            )
        name, maps = _STARTS[found]
        config = read_config_file(pathlib.Path(file), maps.read_config)
    return {config.kind: _load_published(name, folder, maps, config, build(config)[1], None)}


def load_sd_unet(folder: epath.PathLike, config: SDUNetConfig, spec: Tree, mesh: Mesh | None = None) -> Tree:
    """The UNet of a published Stable Diffusion before the third, slice by slice onto the mesh.

    Args:
        folder: of its safetensors files, `unet/` of the repository.
        config: its architecture.
        spec: nested dict of `ShapeDtypeStruct`.
        mesh: where the parameters go; without one onto one device.

    Raises:
        ConfigError: the folder is not there, or holds another network.
    """
    return _load_published("sd15", folder, sd_unet, config, spec, mesh)


def load_mmdit(folder: epath.PathLike, config: MMDiTConfig, spec: Tree, mesh: Mesh | None = None) -> Tree:
    """A published MMDiT, slice by slice onto the mesh.

    Args:
        folder: of its safetensors files, `transformer/` of a Stable Diffusion 3.5 repository.
        config: its architecture.
        spec: nested dict of `ShapeDtypeStruct`.
        mesh: where the parameters go; without one onto one device.

    Raises:
        ConfigError: the folder is not there, or holds another network.
    """
    return _load_published("sd35_large", folder, sd3_mmdit, config, spec, mesh)


def load_dit(
    folder: epath.PathLike,
    config: DiTConfig,
    label: LabelEmbeddingConfig | None,
    spec: Mapping[str, Tree],
    mesh: Mesh | None = None,
) -> dict[str, Tree]:
    """A published DiT and its table of classes, slice by slice onto the mesh.

    Args:
        folder: of their safetensors files, `transformer/` of `facebook/DiT-XL-2-256`, or the original ones as
            `weights.maps.dit` says.
        config: the architecture.
        label: the table; None to leave it in the file.
        spec: `{"dit": ..., "label": ...}` of `ShapeDtypeStruct`.
        mesh: where the parameters go; without one onto one device.

    Returns:
        a tree like `spec`.

    Raises:
        ConfigError: the folder is not there, or holds another network.
    """
    name = "dit_xl_2"
    with _told():
        layout = dit_map.layout_of(read_folder(pathlib.Path(folder), source=source(name)))
    loaded = {"dit": _load_mapped(name, folder, dit_map.weight_map(config, layout), config, spec["dit"], mesh)}
    if label is not None:
        table = dit_map.label_map(label, layout)
        loaded["label"] = _load_mapped(name, folder, table, label, spec["label"], mesh)
    return loaded


def load_text_encoder(network: Network, name: str, folder: str, mesh: Mesh | None = None) -> Tree:
    """A published text encoder, slice by slice onto the mesh.

    Args:
        network: of `networks.clip.ClipText`, `networks.gemma2.Gemma2` or `networks.t5.T5Encoder`.
        name: "clip_l", "clip_g", "gemma2_2b" or "t5_xxl".
        folder: of its safetensors files.
        mesh: where the parameters go; without one onto one device.

    Raises:
        ConfigError: no folder is named, it is not there, or it holds another network.
    """
    if not folder:
        raise ConfigError(
            f"the text encoder {name} has no weights: set its folder among `encoders`\n{source(name).advice}"
        )
    read_map = {"gemma2_2b": gemma2_map.weight_map, "t5_xxl": t5_map.weight_map}.get(name, clip_map.read_map)
    return _load_mapped(name, folder, read_map(network.config), network.config, frozen_spec(network), mesh)


def load_reward(network: Network, name: str, folder: str, head_folder: str = "", mesh: Mesh | None = None) -> Tree:
    """A published reward, slice by slice onto the mesh.

    Args:
        network: of `networks.rewards.Reward`.
        name: "clip_l", "clip_h", "pickscore", "hpsv2" or "aesthetic".
        folder: of its CLIP's safetensors files, by transformers' names or by OpenCLIP's.
        head_folder: of those of the aesthetic predictor's own layers.
        mesh: where the parameters go; without one onto one device.

    Raises:
        ConfigError: a folder is not named or not there, or holds another network; says where to get it, on which terms.
    """
    config, spec = network.config, dict(frozen_spec(network))
    head = spec.pop("head", None)
    clip_name = "clip_l" if head else name
    for given, missing in ((folder, clip_name), *([(head_folder, name)] if head else [])):
        if not given:
            raise ConfigError(f"the reward {name} has no weights: name their folder\n{source(missing).advice}")
    with _told():
        layout = rewards.layout_of(read_folder(folder, source=source(clip_name)))
    loaded = _load_mapped(clip_name, folder, rewards.weight_map(config, layout), config, spec, mesh)
    if head:
        loaded |= _load_mapped(name, head_folder, rewards.head_map(config), config, {"head": head}, mesh)
    return loaded


def draw_stand_ins(networks: dict[str, Network], rules: Rules = (), mesh: Mesh | None = None) -> Tree:
    """Drawn parameters for networks whose weights are not at hand, always the same and in their dtypes: a step on them
    shows its speed and memory.

    Args:
        networks: by name.
        rules: how their parameters are split over the mesh.
        mesh: where they go; without one onto one device.
    """
    spec = {name: frozen_spec(network) for name, network in networks.items()}

    def draw() -> Tree:
        drawn = {name: stand_in(network, _STAND_IN + i) for i, (name, network) in enumerate(networks.items())}
        return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), drawn, spec)

    return jax.jit(draw, out_shardings=_places(spec, mesh, rules))()


def in_eight_bits(params: Tree, network: Network, mesh: Mesh | None = None) -> Tree:
    """The parameters of a frozen network as it was trained, rounded where they lie. Until the caller drops them the
    kernels are held in both forms.

    Args:
        params: of `eight_bit_network.as_trained(network)`.
        network: of an `EightBitConfig`.
        mesh: where the parameters are; without one on one device.

    Returns:
        a tree like `frozen_spec(network)`.
    """
    config, flat = network.config, flatten(params)
    kernels = {path: flat[path] for path in config.kernels()}
    places = _places(jax.eval_shape(config.rounded, kernels), mesh, config.rules())
    return unflatten({**flat, **flatten(jax.jit(config.rounded, out_shardings=places)(kernels))})


def load_perceptual(network: Network, folder: str = "", mesh: Mesh | None = None) -> Tree:
    """The parameters of a perceptual distance; without a folder of published weights they are drawn, always the same.

    Args:
        network: of `networks.lpips.PerceptualDistance`.
        folder: of safetensors files as `weights.maps.lpips` says, or "".
        mesh: where the parameters go; without one onto one device.

    Raises:
        ConfigError: the folder is not there, or holds another network.
    """
    spec = frozen_spec(network)
    if not folder:
        log.warning(
            "perceptual_weights is not set: a fixed random network of %d stages stands in for LPIPS, and its distances "
            "compare with each other alone",
            len(network.config.channels),
        )
        drawn = jax.jit(init, static_argnums=0)(network, jax.random.key(_STAND_IN))
        drawn = jax.tree.map(lambda s, x: np.asarray(x).astype(s.dtype), spec, drawn)
        return jax.device_put(drawn, _places(spec, mesh, network.config.rules()))
    return _load_published("lpips", folder, lpips_map, network.config, spec, mesh)


def _load_published(name: str, folder: epath.PathLike, maps: Any, config: Any, spec: Tree, mesh: Mesh | None) -> Tree:
    """The network of `config`, published as `name`, by the map that the module `maps` makes of its tensors."""
    return _load_mapped(name, folder, maps.weight_map(config), config, spec, mesh)


def _load_mapped(
    name: str, folder: epath.PathLike, weight_map: WeightMap, config: Any, spec: Tree, mesh: Mesh | None
) -> Tree:
    """The network of `config`, or the part of it that `spec` holds."""
    dtype, places = jax.tree.leaves(spec)[0].dtype, _places(spec, mesh, config.rules())
    try:
        return load(pathlib.Path(folder), weight_map, spec, places, dtype=dtype, source=source(name))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def is_published(folder: epath.Path) -> bool:
    """A folder with a network's `config.json`, and not the workdir of a run, whose config names a recipe."""
    path = folder / "config.json"
    try:
        return path.exists() and "recipe" not in read_json(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _places(spec: Tree, mesh: Mesh | None, rules: Rules) -> Tree:
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), spec)
    return tree_shardings(spec, rules, mesh)
