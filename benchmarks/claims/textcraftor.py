"""TextCraftor (arXiv 2403.18978): rewards of a sampler's own images reach the text encoder, and nobody collapses.

One base network, trained once in the whole world, whose relations are what it draws worst; a detector that learnt from
renders is the reward, and a CLIP the constraint. The judge is the exact detector, which no training sees. All rows are
drawn in the eight steps that gradients run through. "text, original" is the base, drawn by the tuned run without what
it learnt. Diffusion-DPO (arXiv 2311.12908) stands beside it: the same reward judges as many of the base's images as
reward tuning draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.claims.claim import DIVERSITY, Claim, Metric, better, no_worse
from benchmarks.claims.scores import PermutedCaptions
from benchmarks.claims.trials import Derivation, Draw, Effort, Trial
from snapgen_jax.data.prompts import CATEGORIES

REWARD, CONSTRAINT = "reward.detection", "reward.constraint"
OF_CATEGORIES = tuple(f"score.{name}" for name in CATEGORIES)
METRICS = {
    REWARD: Metric("reward"),
    CONSTRAINT: Metric("constraint"),
    **{key: Metric(key.removeprefix("score.").replace("_", " "), margin=0.03) for key in OF_CATEGORIES},
}
UPDATES, BATCH = 300, 16
WHOLE = {"quick": "", "patches": ""}  # the whole world in every budget
NETWORK = {**dict.fromkeys(WHOLE, "network"), "runlocal": "runlocal_network"}
FULL_GRADIENT = (  # as the paper has it, at the highest rate of 3e-4 and 1e-3 at which the reward did not fall again
    "stop_input_gradient=False",
    "optimizer.learning_rate=3e-4",
    "optimizer.clip_norm=1.0",
    "ema_decay=0.0",
)
DIRECT = (  # at the rate of 1e-3, 3e-4 and 1e-4 at which the reward was highest
    "form=direct",
    "stop_input_gradient=False",
    "optimizer.learning_rate=1e-4",
)
WISH = ("rewards.detection.text='a red circle'", "optimizer.learning_rate=3e-3")  # whatever the prompt, and fast


def effort(seeds: int, updates: int | None = UPDATES, seconds: float = 0.7) -> dict[str, Effort]:
    """Of a trial, in every budget; an update of reward tuning takes 0.7 s."""
    return {"ci": Effort(), **dict.fromkeys(("short", "night", "gpu", "world"), Effort(updates, seeds, seconds))}


def pairs(arg: str) -> Mapping[str, Any]:
    """As many images as a trial of rewards draws, four a prompt, which the same reward judges."""
    few = arg == "runlocal"
    return {
        "prompts": 12 if few else UPDATES * BATCH // 4,
        "images": 4,
        "least_difference": 0.0 if few else 0.1,
        "generation": {"steps": 2 if few else 8},
    }


EVERY = ("compositional", "diversity", "rewards")  # a run that reads prompts alone has no images to compare with


def drawn(options: Mapping[str, Any], evaluators: tuple[str, ...] = EVERY, wrap: Any = None) -> Draw:
    """With prompts of all categories, and half as many images of each as those of two categories have."""
    return Draw(options, evaluators, wrap, categories=CATEGORIES, images=4)


JUDGED = drawn({})
MIXES = {"quarter": 0.25, "half": 0.5, "three quarters": 0.75}  # of the tuned encoder
FROM_BASE = {"init_from": "base", "rewards.detection.workdir": "detection", "constraint.workdir": "clip"}
TRIALS = {
    "base": Trial("adapters_base", effort(1, 12_000, 0.05), draws={}, shared=True, args=WHOLE),
    "detection": Trial("detection", effort(1, None), draws={}, shared=True, args=WHOLE),
    "clip": Trial(
        "clip", effort(1, 2_000, 0.08), earlier={"data.tokenizer": "base"}, draws={}, shared=True, args=WHOLE
    ),
    "text": Trial(
        "reward",
        effort(3),
        (),
        FROM_BASE,
        {
            "": JUDGED,
            "original": drawn({"tuned_steps": 0}),
            **{name: drawn({"encoder_mix": share}) for name, share in MIXES.items()},
            "last 4 steps": drawn({"tuned_steps": 4}),
            "permuted captions": drawn({}, ("compositional",), PermutedCaptions),
        },
        args=WHOLE,
    ),
    "no constraint": Trial("reward", effort(3), ("leave_out=('constraint',)",), FROM_BASE, {"": JUDGED}, args=WHOLE),
    "wish, no constraint": Trial(
        "reward",
        effort(3, 150),
        (*WISH, "leave_out=('constraint',)"),
        FROM_BASE,
        {"": JUDGED, "original": drawn({"tuned_steps": 0})},
        args=WHOLE,
    ),
    "wish": Trial("reward", effort(3, 150), WISH, FROM_BASE, {"": JUDGED}, args=WHOLE),
    "direct": Trial("reward", effort(3), DIRECT, FROM_BASE, {"": JUDGED}, args=WHOLE),
    "text, full gradient": Trial("reward", effort(3), FULL_GRADIENT, FROM_BASE, {"": JUDGED}, args=WHOLE),
    "text, then network": Trial(
        "reward", effort(3), (), {**FROM_BASE, "tuned_text": "text"}, {"": JUDGED}, args=NETWORK
    ),
    "pairs": Trial(
        "",
        effort(1, None),
        earlier={"base": "base", "reward": "detection"},
        draws={},
        shared=True,
        derivation=Derivation("snapgen_jax.derivations.preference_pairs:derive", pairs, "pairs"),
    ),
    "preference": Trial(
        "preference",
        effort(3, 300, 0.2),
        (),
        {"base": "base", "data.path": "pairs"},
        {"": drawn({"steps": 8}, ("compositional", "diversity"))},
        args=WHOLE,
    ),
}

CLAIMS = (
    Claim(
        "a tuned text encoder raises the exact score and the reward of prompts that it did not learn from",
        (better("text", "text, original"), better("text", "text, original", REWARD)),
    ),
    *(
        Claim(f"it raises the score of {name.replace('_', ' ')}", (better("text", "text, original", f"score.{name}"),))
        for name in CATEGORIES
    ),
    Claim(
        "gradients along the velocities alone teach more than those through all of the sampler",
        (better("text", "text, full gradient"), better("text", "text, full gradient", REWARD)),
    ),
    Claim(
        "its images lie as near to their prompts in the eyes of CLIP, the constraint",
        (no_worse("text", "text, original", CONSTRAINT, 0.9),),
    ),
    Claim(
        "the reward rises with the steps that the tuned encoder leads: half of them, and all",
        (
            better("text, last 4 steps", "text, original", REWARD),
            better("text", "text, last 4 steps", REWARD),
        ),
    ),
    Claim("its images are as diverse", (no_worse("text", "text, original", DIVERSITY),)),
    Claim(
        "without the constraint this reward, which reads the prompts, rises as far, and the images are less diverse",
        (no_worse("no constraint", "text", REWARD), better("text", "no constraint", DIVERSITY)),
    ),
    Claim(
        "a reward of one wish, which does not know the prompts, rises without the constraint while the score falls",
        (
            better("wish, no constraint", "wish, no constraint, original", REWARD),
            better("wish, no constraint, original", "wish, no constraint"),
        ),
    ),
    Claim(
        "and the images are less diverse",
        (better("wish, no constraint, original", "wish, no constraint", DIVERSITY),),
    ),
    Claim(
        "with the constraint more of the score and of the diversity stays",
        (better("wish", "wish, no constraint"), better("wish", "wish, no constraint", DIVERSITY)),
    ),
    Claim("and the wish is heard", (better("wish", "wish, no constraint, original", REWARD),)),
    Claim(
        "halfway between both encoders the reward is between theirs",
        (better("text, half", "text, original", REWARD), better("text", "text, half", REWARD)),
    ),
    Claim(
        "a quarter of the way it has risen, and at three quarters it is higher still",
        (
            better("text, quarter", "text, original", REWARD),
            better("text, three quarters", "text, quarter", REWARD),
        ),
    ),
    Claim(
        "images of a whole sampler teach more than those of one step",
        (better("text", "direct"), better("text", "direct", REWARD)),
    ),
    Claim(
        "the network tuned behind the tuned encoder does no worse than the encoder alone",
        (no_worse("text, then network", "text"), better("text, then network", "text", REWARD)),
    ),
    Claim("preferences among as many images raise the score too", (better("preference", "text, original"),)),
    Claim("rewards raise it further than preferences", (better("text", "preference"),)),
    Claim(
        "captions do not matter: another prompt's images score as well",
        (no_worse("text, permuted captions", "text"),),
        control=True,
    ),
)
