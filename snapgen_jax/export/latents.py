"""A run on latents with the encoders and the decoder that its bundle carries.

Training drops each text encoder now and then, independently, and so the network draws without those that a bundle
leaves out. What was stored while it trained is computed here: a run on stored encodings becomes the same run on
captions, with published encoders in front of it and a decoder behind.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from snapgen_jax.generation import load_config, load_drawing, load_recipe
from snapgen_jax.inputs._encodings import Encoding
from snapgen_jax.inputs._images import CODEC, ImageCodec
from snapgen_jax.inputs.encoders import EncodersConfig, FrozenConfig
from snapgen_jax.inputs.stored import Stored
from snapgen_jax.inputs.stored_encodings import StoredEncodingsConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.context import ENCODERS
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.pruned import PrunedDecoderConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.weights.maps import clip, gemma2, sd3_autoencoder
from snapgen_jax.weights.published import read_config_file, read_json

Tree = Any


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a bundle carries beside the networks that its run trained.

    Attributes:
        encoders: text encoders, of `networks.context.ENCODERS`; None for those that have a folder.
        folders: `{encoder: local folder of its weights}`, beside those that the run's config names.
        tokenizers: `{encoder: local folder of its tokenizer}`; by default that of the weights.
        decoder: a run of a tiny decoder or of an autoencoder, or a folder of a published autoencoder; "" for the run's
            own.
    """

    encoders: Sequence[str] | None = None
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decoder: str = ""

    def named(self) -> bool:
        """Whether any text encoder is asked for."""
        return bool(self.encoders or self.folders or self.tokenizers)


def load_latents(workdir: epath.PathLike, carried: Carried) -> Any:
    """The recipe of a run, for the platform "cpu", whose `exports()` holds what the bundle carries; no weights.

    Args:
        workdir: of a run of flow matching or of a method built on it.
        carried: the text encoders and the decoder.

    Raises:
        ConfigError: an encoder or the decoder is not named, is not there, or is not what the run was trained with.
    """
    kind = getattr(load_config(workdir).get("inputs"), "kind", None)
    if kind not in ("stored", "stored_encodings", "encoders"):
        if carried.named():
            raise ConfigError(
                f"the run {str(workdir)!r} reads no published text encoder (inputs.kind is {kind!r}); leave out "
                "--encoders and the encoders' folders"
            )
        return load_drawing(workdir, "cpu", carried.decoder or None)
    recipe: Any = load_recipe(workdir, "cpu")
    inputs = recipe.config.inputs
    if kind == "stored":
        if carried.named():
            raise ConfigError(
                f"the run {str(workdir)!r} reads text states that were joined beforehand, and does not know its "
                "encoders; its bundle takes `sequence`, `mask` and `pooled`. Leave out --encoders and their folders"
            )
        return Decoded(recipe, _images(inputs, decoder_codec(carried.decoder, inputs))) if carried.decoder else recipe
    own: FrozenConfig = inputs.encoders if kind == "stored_encodings" else inputs
    used = _used(recipe, own, carried)
    changes = {"use": used} | {f"{name}_folder": _folder(name, own, carried) for name in used}
    changes |= {f"{name}_tokenizer": _tokenizer(name, own, carried) for name in used}
    if kind == "stored_encodings":
        inputs = _with_encoders(inputs, recipe.inputs.encodings.shapes, used, changes, carried)
    else:
        codec = decoder_codec(carried.decoder, inputs) if carried.decoder else inputs.codec
        inputs = dataclasses.replace(inputs, **changes, codec=codec)
    return type(recipe)(dataclasses.replace(recipe.config, inputs=inputs), "cpu")


# --- encoders --------------------------------------------------------------------------------------------------------


def _used(recipe: Any, named: FrozenConfig, carried: Carried) -> tuple[str, ...]:
    """The encoders of the bundle, of those that the network was trained with and without; `named` has the folders of
    the run's config."""
    inputs, asked = recipe.config.inputs, carried.encoders
    known = ", ".join(ENCODERS)
    for name in (*(asked or ()), *carried.folders, *carried.tokenizers):
        if name not in ENCODERS:
            raise ConfigError(f"the network was not trained with a text encoder {name!r}; its encoders are {known}")
    own = [name for name in ENCODERS if getattr(named, f"{name}_folder")]
    chosen = [*own, *carried.folders] if asked is None else asked
    if unused := [name for name in (*carried.folders, *carried.tokenizers) if name not in chosen]:
        raise ConfigError(
            f"--{unused[0]} names a folder, and --encoders={','.join(chosen)} leaves that encoder out; drop one of both"
        )
    if not chosen:
        raise ConfigError(
            "a bundle needs a text encoder to read prompts: give the folders of some, --clip_l=FOLDER --clip_g=FOLDER "
            "--language=FOLDER; those that are left out count as dropped"
        )
    share = recipe.inputs.encodings.shares[tuple(int(name in chosen) for name in ENCODERS)]
    if not share:
        left = [name for name in ENCODERS if name not in chosen]
        raise ConfigError(
            f"the network was never trained with the text encoders {', '.join(chosen)} alone, by its encoder_dropout "
            f"of {inputs.encoder_dropout}"
            + (f": leaving out {', '.join(left)} is unknown to it" if left else "")
            + "; give --encoders as it was trained"
        )
    return tuple(name for name in ENCODERS if name in chosen)


def _folder(name: str, named: FrozenConfig, carried: Carried) -> str:
    folder = carried.folders.get(name) or getattr(named, f"{name}_folder")
    if not folder:
        raise ConfigError(f"--encoders names {name}, and no folder has its weights: give --{name}=FOLDER")
    if not pathlib.Path(folder).is_dir():
        raise ConfigError(f"--{name}: {folder} is no folder; give the local one with its config.json and safetensors")
    return str(folder)


def _tokenizer(name: str, named: FrozenConfig, carried: Carried) -> str:
    own = "" if name in carried.folders else getattr(named, f"{name}_tokenizer")
    folder = carried.tokenizers.get(name) or own or _folder(name, named, carried)
    files = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any((pathlib.Path(folder) / file).is_file() for file in files):
        raise ConfigError(
            f"{folder} holds no tokenizer of {name} ({', '.join(files)}); give --{name}_tokenizer=FOLDER, as "
            "`tokenizer` or `tokenizer_2` of a Stable Diffusion repository"
        )
    return str(folder)


def _with_encoders(
    inputs: StoredEncodingsConfig,
    shapes: Mapping[str, Encoding],
    used: Sequence[str],
    changes: Mapping[str, Any],
    carried: Carried,
) -> EncodersConfig:
    """The same inputs with the networks that made what was stored, whose `shapes` those are."""
    if not carried.decoder and not inputs.encoders.codec.workdir:
        raise ConfigError(
            "a run on stored latents holds no decoder: give --decoder, a run of a tiny decoder or of an autoencoder, "
            "or a folder of a published one"
        )
    networks: dict[str, Any] = {}
    for name in ENCODERS:
        shape = shapes[name]
        if name not in used:  # only its widths are read
            sizes: dict[str, Any] = {"width": shape.width, "layers": 1, "heads": 1}
            networks[name] = (
                Gemma2Config(**sizes, kv_heads=1)
                if name == "language"
                else ClipTextConfig(**sizes, max_tokens=shape.tokens, projection=shape.pooled)
            )
            continue
        maps: Any = gemma2 if name == "language" else clip
        found = networks[name] = _read(pathlib.Path(changes[f"{name}_folder"]), maps.read_config, name)
        held = (shape.tokens, found.width, 0) if name == "language" else _shape(found)
        wanted = (shape.tokens, shape.width, 0 if name == "language" else shape.pooled)
        if held != wanted:
            raise ConfigError(
                f"the network was not trained with the text encoder in {changes[f'{name}_folder']}: its tokens, width "
                f"and pooled width are {held}, and those of the run's {name} {wanted}; give --{name} another folder"
            )
    return EncodersConfig(
        image_sizes=inputs.image_sizes,
        codec=decoder_codec(carried.decoder or inputs.encoders.codec.workdir, inputs),
        **networks,
        **changes,
        language_tokens=shapes["language"].tokens,
        conditioner=inputs.conditioner,
        encoder_dropout=inputs.encoder_dropout,
        caption_dropout=inputs.caption_dropout,
    )


def _shape(config: ClipTextConfig) -> tuple[int, int, int]:
    return config.max_tokens, config.width, config.projection or config.width


def _read(folder: pathlib.Path, read: Any, what: str) -> Any:
    try:
        return read_config_file(folder / "config.json", read)
    except ValueError as error:
        raise ConfigError(f"--{what}: {error}") from error


# --- the decoder -----------------------------------------------------------------------------------------------------


def decoder_codec(where: str, inputs: Any) -> CodecConfig:
    """The codec whose decoder a bundle of these inputs carries.

    Args:
        where: a run of a tiny decoder or of an autoencoder, or a folder of a published autoencoder.
        inputs: the config of the run's inputs.

    Raises:
        ConfigError: there is none, or it decodes other latents.
    """
    path = epath.Path(where) / "config.json"
    if not path.exists():
        raise ConfigError(f"--decoder: {where} is neither a run nor a published autoencoder: it has no config.json")
    try:
        name = read_json(path).get("recipe")
    except ValueError as error:
        raise ConfigError(f"--decoder: {error}") from error
    if name is None:
        network = _read(pathlib.Path(where), sd3_autoencoder.read_config, "decoder")
        codec = CodecConfig("autoencoder", autoencoder=network, workdir=str(where))
    else:
        config: Any = load_recipe(where, "cpu").config
        if name == "autoencoder":
            codec = CodecConfig("autoencoder", autoencoder=config.autoencoder, workdir=str(where))
        elif name == "decoder_distillation":
            codec = dataclasses.replace(
                config.inputs.codec, decoder="tiny", tiny_decoder=config.decoder, decoder_workdir=str(where)
            )
        else:
            raise ConfigError(
                f"--decoder: {where} is a run of {name!r}; a decoder is trained by 'decoder_distillation' or "
                "'autoencoder'"
            )
    _check_latents(where, _latents(codec), inputs)
    return codec


def _latents(codec: CodecConfig) -> dict[str, Any]:
    """What a decoder takes. A tiny one normalises as the autoencoder that it learnt from."""
    network: Any = codec.tiny_decoder if codec.decoder == "tiny" else codec.autoencoder
    network = network.autoencoder if isinstance(network, PrunedDecoderConfig) else network
    normalised = getattr(network, "normalisation", "") != "measured"
    return {
        "channels": network.latent_channels,
        "reduction": network.reduction,
        **({"scale": network.scale, "shift": network.shift} if normalised else {}),
    }


def _check_latents(where: str, held: Mapping[str, Any], inputs: Any) -> None:
    if inputs.kind == "encoders":
        wanted = _latents(inputs.codec)
    else:
        wanted = {"channels": inputs.latent_channels, "reduction": inputs.reduction}
        made = _latents(inputs.encoders.codec)
        if wanted.items() <= made.items():  # the config describes what made the latents
            wanted = made
    for name in wanted.keys() & held.keys():
        if wanted[name] != held[name]:
            raise ConfigError(
                f"--decoder: {where} decodes latents of {name} {held[name]}, and the run was trained on {name} "
                f"{wanted[name]}; give the decoder of the autoencoder that made them"
            )


def _images(inputs: Any, codec: CodecConfig) -> ImageCodec:
    return ImageCodec(codec, "cpu", inputs.image_sizes)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A recipe on stored latents with a decoder behind it: its exports and its generator give pictures.

    Attributes:
        recipe: on inputs of the kind "stored".
        images: the codec.
    """

    recipe: Any
    images: ImageCodec

    @property
    def options(self) -> Any:
        """The recipe's."""
        return self.recipe.options

    @property
    def inputs(self) -> Stored:
        """The recipe's."""
        return self.recipe.inputs

    def init(self, key: jax.Array) -> Any:
        """The recipe's."""
        return self.recipe.init(key)

    def tokenizers(self) -> dict[str, Any]:
        """None."""
        return {}

    def load_frozen(self, mesh: Any, use: Any) -> Tree:
        """What the recipe loads, and the codec."""
        return {**self.recipe.load_frozen(mesh, use), **self.images.load(mesh)}

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The recipe's, and the codec's."""
        return self.recipe.weights(params, frozen)

    def exports(self) -> ExportPlan:
        """The recipe's plan with the decoder behind it."""
        plan, shape = self.recipe.exports(), self.recipe.inputs.latent_shape()
        unit = self.images.export_unit()
        assert unit is not None  # the codec is an autoencoder
        spec = {unit.roles[0]: self._spec()[unit.roles[0]]}
        image = jax.eval_shape(unit.function, spec, latent=jax.ShapeDtypeStruct((1, *shape), jnp.float32))["image"]
        program = {
            **plan.program,
            "outputs": {"image": {"shape": list(image.shape[1:]), "dtype": "uint8"}},
            "decoder": {**self.images.describe(), "unit": unit.name},
        }
        return dataclasses.replace(plan, units=[*plan.units, unit], program=program)

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: Any
    ) -> dict[str, jax.Array]:
        """The recipe's latents, decoded."""
        made = self.recipe.generate(params, frozen, conditions, keys, options)
        return {**made, **self.images.decode(self.weights(params, frozen), made["latent"])}

    def _spec(self) -> dict[str, Tree]:
        spec = self.images.codec.spec()
        return {CODEC: spec} if CODEC in self.images.networks() else {f"{CODEC}/{n}": tree for n, tree in spec.items()}


def save_tokenizers(recipe: Any, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes the published tokenizers of a recipe as files of the `tokenizers` library.

    Returns:
        `{name in the bundle: file}`.

    Raises:
        DataError: a folder holds no tokenizer, or that of another encoder.
    """
    from snapgen_jax.data.tokenizer_specs import load_tokenizers

    specs = {name: spec for name, spec in recipe.tokenizers().items() if spec.kind == "pretrained"}
    if not specs:
        return {}
    (folder / "tokenizers").mkdir()
    found, loaded = {}, load_tokenizers(specs, None)
    for name, tokenizer in loaded.each.items():  # type: ignore[union-attr]
        found[f"tokenizers/{name}.json"] = folder / "tokenizers" / f"{name}.json"
        tokenizer.save(found[f"tokenizers/{name}.json"])
    return found
