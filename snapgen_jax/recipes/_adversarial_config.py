"""What a generator of few steps is trained by: the config of the recipe `adversarial`, and what of it fits together."""

from __future__ import annotations

import dataclasses
from typing import Literal

from snapgen_jax import bounds
from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes._teacher import TeacherConfig
from snapgen_jax.recipes.distillation import DistillationConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class AdversarialConfig(DistillationConfig):
    """Distillation, and how a generator of few steps is trained.

    `sampling.steps` and `sampling.shift`, or `sampling.times`, are the times at which the generator is trained; its
    method is "renoise" and its guidance 1. A few-step teacher is asked at these times, so they are its own
    (`teacher.few_step_times`). The density of `schedule` is that of the critic's times.

    Attributes:
        trunk: what the discriminator looks through: a frozen copy of the student, or the teacher. It reads the text as
            the generator does: a text encoder that is trained beside the generator changes what the trunk says, unless
            the trunk is a teacher with a text encoder of its own.
        trunk_workdir: the run of that copy; "" for `init_from`. Its network has the student's architecture.
        init_from: of the experiment: the run that the generator starts from.
        discriminator: its heads; `taps` are features of the trunk.
        discriminator_optimizer, critic_optimizer: of these players, by the number of updates. The critic's default is
            that of SnapGen++.
        adversarial_weight: of the generator's adversarial loss; 0 leaves it and the discriminator out.
        penalty_weight: of R1 on the features of the data, which counts every cell; that of "Adversarial Diffusion
            Distillation", section 4.
        noise_mean, noise_std: of logit(s / t), where s < t is the noise that the discriminator looks through.
        critic_weight: of the distribution matching loss; 0 leaves it and the critic out.
        critic_times: bounds of the times at which the critic learns and is asked; those of DMD2.
        score_teacher: the full-step teacher that the critic is compared with, where the one that teaches output and
            features is another, such as a few-step one. None for `teacher`. Networks that both have are held once.
        generator_every: the generator steps in every so many updates, after its opponents, which step in each: 5 in
            DMD2 and SnapGen++. `train_steps` counts updates; the learning rate of `optimizer`, its warm-up and
            `ema_decay` go by the generator's own steps. In between its metrics stay those of its latest step.
        own_samples: share of examples at which the generator is trained where its own sampling leads, from noise
            through the times before ("backward simulation"; all in DMD2), in place of noised data. Costs one call less
            than there are times, for each turn of the players. No data belong to these, so the task's loss leaves
            them out.
    """

    trunk: Literal["student", "teacher"] = "student"
    trunk_workdir: str = ""
    init_from: str = ""
    discriminator: DiscriminatorConfig = DiscriminatorConfig.preset("shapes")
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, b1=0.0, b2=0.99, warmup_steps=0)
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, b1=0.0, b2=0.99, warmup_steps=0)
    adversarial_weight: float = 0.1
    penalty_weight: float = 1e-5
    noise_mean: float = 0.0
    noise_std: float = 1.0
    critic_weight: float = 0.0
    critic_times: tuple[float, float] = (0.02, 0.98)
    score_teacher: TeacherConfig | None = None
    generator_every: int = 1
    own_samples: float = 0.0
    feature_weight: float = 0.0
    sampling: SamplingConfig = SamplingConfig(steps=4, guidance=1.0, method="renoise", shift=3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("adversarial_weight", "penalty_weight", "critic_weight")
        bounds.check(self, **dict.fromkeys(weights, bounds.at_least(0)), generator_every=bounds.at_least(1))
        bounds.check(self, noise_mean=bounds.FINITE, noise_std=bounds.above(0), critic_times=bounds.SHARE)
        bounds.check(self, own_samples=bounds.SHARE)

    def check(self, taught: bool) -> None:
        """Raises `ConfigError` where these fields do not fit each other; `taught`: whether losses ask the teacher."""
        if self.sampling.method != "renoise":
            raise ConfigError(
                f"sampling.method={self.sampling.method!r} does not jump to the data, as this generator learns to; "
                "set it to 'renoise'"
            )
        if self.sampling.guidance != 1:
            raise ConfigError(
                f"sampling.guidance={self.sampling.guidance} asks the generator twice at each time, where it learns "
                "to be asked once; set it to 1, and teacher.guidance to what it is to learn"
            )
        scaling = self.scaling
        if self.own_samples and taught and scaling.alpha != "none" and scaling.ratio != "none":
            raise ConfigError(
                f"scaling.ratio={scaling.ratio!r} takes the task's loss, which the generator's own samples have none "
                "of; set scaling.ratio to 'none', or own_samples to 0"
            )
