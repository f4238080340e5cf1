"""The rewards that a recipe adds up: which networks, where their weights are, which tokens they read, and the sum."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from snapgen_jax.bounds import above, check
from snapgen_jax.inputs.captions import same_tokens
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec
from snapgen_jax.networks.detection import DetectionConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, frozen_spec
from snapgen_jax.networks.registry import RewardNetworkConfig
from snapgen_jax.networks.rewards import RewardConfig
from snapgen_jax.recipes._run import run_config
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.frozen import draw_stand_ins, load_reward, load_run

Tree = Any
OF_PLATFORM = ("dtype", "depthwise", "separable_block", "attention", "remat")  # how, and not what, a network computes
CONSTRAINT = "constraint"
Published = Literal["", "clip_l", "clip_h", "clip_little_g", "pickscore", "hpsv2", "aesthetic"]
_OF_CONTRASTIVE = {"vision": "image", "text": "text"}  # parts of a reward by the roles of that recipe


@dataclasses.dataclass(frozen=True)
class RewardSourceConfig:
    """One reward `R(images, tokens) -> [B]`, and where its weights are: a run, published files, or nowhere.

    Attributes:
        network: what it is, told apart by `kind`: "reward", a CLIP or a reward on top of one; "matching"; or
            "detection", which reads what a caption of the shapes world demands, and no tokens.
        weight: gamma, its factor in the sum.
        workdir: a trained run: of `contrastive`, whose image and text encoder are compared (`network.preprocessing`
            is then "signed" and `network.padding` "hidden"); or of another recipe, whose network has the role
            `network.kind`.
        published: in place of a run, whose weights `folder` holds.
        folder: of the safetensors files of a published reward.
        head_folder: of those of the aesthetic predictor's own layers.
        stand_in: in place of either, a network as it is drawn: to try speed and memory with.
        tokens: which array of token ids of the inputs it reads; "" for the first.
        tokenizer: folder of a tokenizer of its own, whose ids it reads in place of the inputs'. A published reward that
            reads texts needs it where the inputs' tokenizer is a trained one; a run has none beside its own.
        text: that all images are compared with, each in place of its own prompt, such as "a beautiful photograph"; ""
            for the prompts. Such a reward does not know what was asked for.
    """

    network: RewardNetworkConfig = RewardConfig.preset("clip_h")
    weight: float = 1.0
    workdir: str = ""
    published: Published = ""
    folder: str = ""
    head_folder: str = ""
    stand_in: bool = False
    tokens: str = ""
    tokenizer: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        check(self, weight=above(0, "leave a reward out by its name in `leave_out`"))
        named = [name for name in ("workdir", "published", "stand_in") if getattr(self, name)]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} each say where the weights are; give one of them")
        if self.tokens and self.tokenizer:
            raise ValueError(f"tokens={self.tokens!r} and tokenizer={self.tokenizer!r}: give one of them")
        if isinstance(self.network, DetectionConfig) and (self.tokens or self.tokenizer):
            raise ValueError(
                f"tokens={self.tokens!r} and tokenizer={self.tokenizer!r}: a reward of the kind 'detection' reads "
                "what a caption demands, and needs neither; leave both out"
            )


class Rewards:
    """Rewards by name, the constraint among them.

    Attributes:
        sources: `{name: RewardSourceConfig}`.
    """

    def __init__(
        self, sources: Mapping[str, RewardSourceConfig], tokenizers: Mapping[str, TokenizerSpec], platform: Platform
    ):
        """`tokenizers`: those of the inputs.

        Raises:
            ConfigError: a reward cannot read the tokens.
        """
        self.sources = dict(sources)
        self._inputs = dict(tokenizers)
        self._networks = {
            name: build(for_platform(source.network, platform))[0] for name, source in self.sources.items()
        }
        for name in self.sources:
            self._check_tokens(name)

    def _check_tokens(self, name: str) -> None:
        source, text = self.sources[name], self._text(name)
        if source.tokenizer and text is None:
            raise ConfigError(f"the reward {name!r} reads no text; leave its tokenizer out")
        if source.text and text is None and not isinstance(source.network, DetectionConfig):
            raise ConfigError(f"the reward {name!r} reads no text; leave its text out")
        if self._has_ids(name):
            return
        if not self._inputs:
            raise ConfigError(f"the inputs read no text, and the reward {name!r} compares images with texts")
        if source.tokens and source.tokens not in self._inputs:
            known = ", ".join(self._inputs)
            raise ConfigError(f"the reward {name!r} reads the tokens {source.tokens!r}; the inputs have {known}")
        spec = self._inputs[self._shared(name)]
        if text is not None and (spec.vocab_size > text.vocab_size or spec.length > text.max_tokens):
            raise ConfigError(
                f"the reward {name!r} reads {text.max_tokens} tokens of {text.vocab_size} ids, and "
                f"{self._shared(name)!r} of the inputs are {spec.length} of {spec.vocab_size}; name its own tokenizer, "
                "or a reward of the same"
            )
        if text is not None and source.published and spec.kind == "trained":
            raise ConfigError(
                f"the reward {name!r} is the published {source.published!r}, which knows the ids of its own tokenizer, "
                f"and {self._shared(name)!r} of the inputs are ids of a trained one; set its `tokenizer` to the folder "
                f"of the tokenizer that was published with it"
            )

    def _text(self, name: str) -> Any:
        """Config of a reward's text encoder; None for one that has none."""
        config = self._networks[name].config
        return None if isinstance(config, DetectionConfig) else config.text

    def _has_ids(self, name: str) -> bool:
        """Whether a reward reads ids that are not those of the inputs."""
        return isinstance(self._networks[name].config, DetectionConfig) or bool(self.sources[name].tokenizer)

    def _shared(self, name: str) -> str:
        """The array of the inputs whose tokenizer a reward knows."""
        return self.sources[name].tokens or next(iter(self._inputs))

    def _own(self, name: str) -> TokenizerSpec | None:
        """What makes an array of its own for a reward; None where it reads one of the inputs'."""
        config, source = self._networks[name].config, self.sources[name]
        if isinstance(config, DetectionConfig):
            return TokenizerSpec("demands", config.length, config.demand_ids, text=source.text)
        if source.tokenizer:
            text = config.text
            return TokenizerSpec(
                "pretrained", text.max_tokens, text.vocab_size, folder=source.tokenizer, text=source.text
            )
        if not source.text:
            return None
        return dataclasses.replace(self._inputs[self._shared(name)], like=self._shared(name), text=source.text)

    def _array(self, name: str) -> str:
        """The array of token ids that a reward reads."""
        return self._shared(name) if self._own(name) is None else f"{name}_tokens"

    # --- shapes and networks ---

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """Those that rewards have of their own."""
        return {self._array(name): spec for name in self.sources if (spec := self._own(name)) is not None}

    def specs(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of token ids int32 `[B, L]` that the inputs do not have."""
        return {
            name: jax.ShapeDtypeStruct((batch_size, spec.length), jnp.int32) for name, spec in self.tokenizers().items()
        }

    def arrays(self) -> tuple[str, ...]:
        """The arrays of token ids that are read."""
        return tuple(dict.fromkeys(self._array(name) for name in self.sources))

    def networks(self) -> dict[str, Network]:
        """`{role: network}`."""
        return {role_of(name): network for name, network in self._networks.items()}

    def load(self, mesh: Mesh | None, tokenizers: Mapping[str, TokenizerSpec]) -> dict[str, Tree]:
        """Reads all of them onto the mesh, or draws them: `{role: parameters}`.

        Args:
            mesh: where they go; None for one device.
            tokenizers: of the inputs, with the run of each that was trained.

        Raises:
            ConfigError: weights are not named, are not there, or are others; or a run has another tokenizer.
        """
        return {role_of(name): self._load(name, mesh, tokenizers) for name in self.sources}

    def _load(self, name: str, mesh: Mesh | None, tokenizers: Mapping[str, TokenizerSpec]) -> Tree:
        source, network = self.sources[name], self._networks[name]
        if source.stand_in:
            return draw_stand_ins({name: network}, network.config.rules(), mesh)[name]
        if source.published:
            return load_reward(network, source.published, source.folder, source.head_folder, mesh)
        if not source.workdir:
            raise ConfigError(
                f"the reward {name!r} has no weights: set its workdir to a trained run, or `published` and `folder` to "
                f"published ones; `leave_out` leaves it out by its name"
            )
        used = tokenizers[self._array(name)]
        if used.kind == "trained" and used.workdir and not same_tokens(source.workdir, used.workdir):
            raise ConfigError(
                f"the reward {name!r} of {source.workdir!r} knows another tokenizer than {used.workdir!r}, whose token "
                f"ids it would read; train it with data.tokenizer={used.workdir}/tokenizer.json"
            )
        own = epath.Path(source.workdir) / "tokenizer.json"
        if used.kind == "pretrained" and self._text(name) is not None and own.exists():
            raise ConfigError(
                f"the reward {name!r} of {source.workdir!r} knows the ids of {str(own)!r}, and would read those of the "
                f"published tokenizer {used.folder!r}; leave its `tokenizer` out and let `tokens` name an array of the "
                "inputs that is made by that file, or take a published reward"
            )
        try:
            return _of_run(source, network, mesh)
        except ConfigError as error:
            raise ConfigError(f"{'' if name == CONSTRAINT else 'rewards.'}{name}.workdir: {error}") from error

    # --- in the step ---

    def __call__(self, networks: Networks, images: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """`{name: [B]}` float32, of each image with its own text.

        Args:
            networks: `{role: parameters}`.
            images: `[B, H, W, 3]` float32 in [0, 1].
            batch: token ids by the names of `arrays`.
        """

        def reward(name: str) -> jax.Array:
            # What a reward keeps for its gradient need not lie beside what the others keep.
            def of(params: Tree, images: jax.Array, tokens: jax.Array) -> jax.Array:
                return apply(self._networks[name], params, images, tokens).astype(jnp.float32)

            return jax.checkpoint(of)(networks[role_of(name)], images, batch[self._array(name)])

        return {name: reward(name) for name in self.sources}

    def total(self, rewards: Mapping[str, jax.Array]) -> jax.Array:
        """sum_i gamma_i R_i, `[B]`."""
        parts = [self.sources[name].weight * value for name, value in rewards.items()]
        return sum(parts[1:], parts[0])


def role_of(name: str) -> str:
    """The role of the network of a reward."""
    return f"reward/{name}"


def _of_run(source: RewardSourceConfig, network: Network, mesh: Mesh | None) -> Tree:
    """The network of a trained run."""
    spec, rules, run = frozen_spec(network), network.config.rules(), run_config(source.workdir)
    kind, recipe = network.config.kind, run.get("recipe", "")
    wanted = "contrastive" if kind == "reward" else kind
    if recipe not in ("", wanted):
        raise ConfigError(
            f"{source.workdir!r} is a run of {recipe!r}, and a network of the kind {kind!r} is that of a run of "
            f"{wanted!r}; set network.kind to the run's, or name another run"
        )
    if kind != "reward":
        _check_alike("network", run.get("network", {}), source.network)
        return load_run(source.workdir, {kind: spec}, mesh=mesh, rules=rules)[kind]
    if set(spec) != set(_OF_CONTRASTIVE):
        raise ConfigError(
            f"{source.workdir!r} is a run of 'contrastive', which is a cosine of image and text; set network.score to "
            "'cosine' and network.text to its text encoder"
        )
    _check_alike("network.vision", run.get("image", {}), network.config.vision)
    _check_alike("network.text", run.get("inputs", {}).get("text", {}), network.config.text)
    own = {_OF_CONTRASTIVE[part]: tree for part, tree in spec.items()}
    read = load_run(source.workdir, own, mesh=mesh, rules=rules)
    return {part: read[role] for part, role in _OF_CONTRASTIVE.items()}


def _check_alike(where: str, run: Mapping[str, Any], config: Any) -> None:
    """Raises ConfigError where a network of the config is not that of a run: what shapes of weights do not show."""
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, value in asked.items():
        if name not in run or name in OF_PLATFORM or run[name] == value:
            continue
        if isinstance(value, Mapping) and isinstance(run[name], Mapping):
            _check_alike(f"{where}.{name}", run[name], value)
            continue
        raise ConfigError(
            f"the run was trained with {where}.{name}={run[name]!r}, and the config says {value!r}; set it to the run's"
        )
