"""The config of `reward_tuning`: what is tuned, by which rewards, and how a tuned model draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from snapgen_jax.bounds import at_least, check
from snapgen_jax.evaluation.interfaces import EvaluationConfig
from snapgen_jax.networks.lora import LoraConfig
from snapgen_jax.recipes._encoder_mix import ORIGINAL, TUNED, shares_of
from snapgen_jax.recipes._rewards import CONSTRAINT, RewardSourceConfig
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes.flow_matching import FlowMatchingConfig
from snapgen_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RewardSamplingConfig(SamplingConfig):
    """How images are made by a tuned model.

    Attributes:
        tuned_steps: how many of the last steps are those of the tuned weights, before which the original ones lead; 0
            gives the images of the original, bit for bit. None for all steps. The paper tunes through 5 of 25 and draws
            with 15.
        encoder_mix: of several text encoders: the share w of the tuned one, beside the original, from 0 to 1; or shares
            by name that sum to one, such as "original:0.1,tuned:0.2,NAME:0.7", where NAME is in the config's `others`.
            Of a tuned text encoder 0 gives the images of the original, bit for bit. Where the network is tuned behind
            one, 0 is the tuned network with the original encoder.
    """

    steps: int = 25
    guidance: float = 7.5
    tuned_steps: int | None = None
    encoder_mix: float | str = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, tuned_steps=at_least(0))
        if self.tuned_steps is not None and self.tuned_steps > self.steps:
            raise ValueError(f"tuned_steps={self.tuned_steps} of steps={self.steps}; give as many at most")
        shares_of(self.encoder_mix)

    @property
    def last_steps(self) -> int:
        """How many steps are those of the tuned weights."""
        return self.steps if self.tuned_steps is None else self.tuned_steps


@dataclasses.dataclass(frozen=True)
class RewardTuningConfig(FlowMatchingConfig):
    """Reward tuning of a trained model. The other fields are those of `flow_matching`: `network`, `prediction`,
    `schedule` and `inputs` are the trained run's, and the rest may differ.

    Attributes:
        init_from: of the experiment: where the trained weights begin, the trained run or an earlier run of this recipe.
        base: the trained run, whose averaged weights are the original ones; "" for `init_from`.
        trains: what is tuned: the "text" encoder, the "network", or either by adapters beside its weights.
        tuned_text: a run of this recipe whose text encoder the "network" is tuned with; "" for the original one.
        encoder: which text encoder of the inputs is the tuned one; "" for the first.
        lora: of adapters: which weights, and how.
        form: images that are "sampled" from noise, from the prompts of a batch alone; or "direct", one step from noised
            images of the data, the paper's baseline.
        backprop_steps: K, the steps through which gradients run.
        stop_input_gradient: of each of these steps the gradient reaches the weights and not the latent that the step's
            velocity is computed from, so that it comes to earlier steps along the sum of the velocities alone: no
            Jacobians of later steps multiply it, which with many steps grow it without bound. For a network that
            predicts the velocity this is DRTune (Wu et al. 2024, arXiv 2405.00760), which stops the input of the
            network and nothing else. From a prediction of x_0, eps or v the velocity is computed with the latent, and
            this stops that too. Of x_0 DRTune itself would teach the last step alone: the image is its prediction.
        rewards: by name.
        constraint: the reward that keeps images true to their prompts. It is needed, unless `leave_out` names it.
        leave_out: rewards to do without, by name; "constraint" for the constraint.
        others: further tuned encoders to draw with, `{name: run of this recipe}`; see `encoder_mix`.
        sampling: the sampler, in training too; `tuned_steps` and `encoder_mix` are for drawing.
    """

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, warmup_steps=0)
    ema_decay: float = 0.0
    sampling: RewardSamplingConfig = RewardSamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig(during=("rewards",), final=("rewards", "sample_grid"))
    init_from: str = ""
    base: str = ""
    trains: Literal["text", "network", "text_adapters", "network_adapters"] = "text"
    tuned_text: str = ""
    encoder: str = ""
    lora: LoraConfig = LoraConfig()
    form: Literal["sampled", "direct"] = "sampled"
    backprop_steps: int = 5
    stop_input_gradient: bool = False
    rewards: Mapping[str, RewardSourceConfig] = dataclasses.field(default_factory=dict)
    constraint: RewardSourceConfig = RewardSourceConfig()
    leave_out: tuple[str, ...] = ()
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, backprop_steps=at_least(1))
        if self.backprop_steps > self.sampling.steps:
            raise ValueError(
                f"backprop_steps={self.backprop_steps} of sampling.steps={self.sampling.steps}; give as many at most"
            )
        if self.stop_input_gradient and self.form == "direct":
            raise ValueError("stop_input_gradient is of sampled images, and form='direct' samples none; leave it out")
        if CONSTRAINT in self.rewards:
            raise ValueError(f"rewards: {CONSTRAINT!r} is the name of the field `constraint`; set that one")
        if unknown := [name for name in self.leave_out if name not in (*self.rewards, CONSTRAINT)]:
            known = ", ".join((*self.rewards, CONSTRAINT))
            raise ValueError(f"leave_out: there is no reward {unknown[0]!r}; there are {known}")
        if not self.used():
            raise ValueError("there is no reward; name one in `rewards`, or leave fewer out")
        if self.tuned_text and self.tunes_text:
            raise ValueError(
                f"tuned_text={self.tuned_text!r} beside trains={self.trains!r}; go on with its encoder by "
                "init_from, or set trains to 'network' or 'network_adapters'"
            )
        if taken := {ORIGINAL, TUNED} & set(self.others):
            raise ValueError(f"others: {min(taken)!r} has its meaning already; take another name")

    @property
    def tunes_text(self) -> bool:
        """Whether the text encoder is tuned, and not the network."""
        return self.trains in ("text", "text_adapters")

    @property
    def by_adapters(self) -> bool:
        """Whether adapters are trained in place of the weights."""
        return self.trains in ("text_adapters", "network_adapters")

    def used(self) -> dict[str, RewardSourceConfig]:
        """The rewards that count, the constraint among them."""
        every = {**self.rewards, CONSTRAINT: self.constraint}
        return {name: source for name, source in every.items() if name not in self.leave_out}
