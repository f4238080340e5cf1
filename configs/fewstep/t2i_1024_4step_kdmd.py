"""Four-step generator by K-DMD, as SnapGen++ (arXiv 2601.08303) trains it: two teachers, a critic, and no adversary.

    snapgen plan  --config=configs/fewstep/t2i_1024_4step_kdmd.py --topology=v5p:4x4x4 --part=generator
    snapgen train --config=configs/fewstep/t2i_1024_4step_kdmd.py --workdir=gs://BUCKET/t2i_4step_kdmd \
        --config.init_from=gs://BUCKET/t2i_1024_kd --config.teacher.weights=TURBO/transformer \
        --config.score_teacher.weights=LARGE/transformer \
        --config.data.path=SHARDS
    snapgen train --config=configs/fewstep/t2i_1024_4step_kdmd.py:runlocal --workdir=/tmp/t2i_4step_kdmd \
        --config.data.path=/tmp/t2i_4step_kdmd_shards

    L = L_DMD + L_out + L_feat

The critic is compared with Stable Diffusion 3.5 Large, guided by 4; output and features are those of its Turbo, at
Turbo's own times and on the generator's own samples. The generator steps in every fifth update. docs/few_step.md says
what of this is published and where it departs: LoRA there, whole networks here, and so a tenth of the learning rate.

Machine: 64 chips of TPU v5p, not planned yet; runlocal, a laptop in some minutes. Metric: as for `t2i_1024_4step.py`.
"""

from ml_collections import ConfigDict

from configs.fewstep import t2i_1024_4step


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for twenty steps of tiny networks on a laptop."""
    c = t2i_1024_4step.few_step(arg)
    c.score_teacher = ConfigDict({**c.teacher.to_dict(), "guidance": 4.0})
    c = t2i_1024_4step.from_turbo(c)
    c.train_steps = 20 if arg else 10_000
    c.output_weight = c.feature_weight = 1.0
    c.scaling = ConfigDict({"alpha": "constant", "constant": 0.0, "alpha_bounds": (0.0, 1.0), "ratio": "none"})
    c.adversarial_weight = 0.0
    c.critic_weight = 1.0
    c.critic_optimizer = ConfigDict({"learning_rate": 1e-5, "b1": 0.0, "b2": 0.99, "warmup_steps": 0})
    c.schedule = ConfigDict({"kind": "flow", "density": "uniform", "shift": 3.0})
    c.generator_every = 5
    c.own_samples = 1.0
    c.optimizer.warmup_steps = 2 if arg else 100  # of its own steps
    return c
