"""The compositional score: of images drawn for prompts with a known right answer, how many show just that.

The six categories are those of GenEval (Ghosh et al. 2023, arXiv:2310.11513, table 1). There a prompt for one or two
objects asks for their presence only, since photographs show much else. The shapes world is exact, and so is the score:
in every category an image passes if it shows the objects asked for, in their numbers, in the colours that are named, in
the relation that is named, and nothing else. An object that the detector cannot name is something else.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.bounds import SEED, check
from snapgen_jax.data.prompts import CATEGORIES, Prompt, make_prompts
from snapgen_jax.evaluation.detector import detect
from snapgen_jax.evaluation.detector_validation import validate_detector
from snapgen_jax.evaluation.interfaces import EvaluationResult, ImageGenerator, ValidationData
from snapgen_jax.evaluation.outputs import draw, read_images
from snapgen_jax.evaluation.pictures import grid
from snapgen_jax.evaluation.requests import Requests
from snapgen_jax.evaluation.statistics import wilson_interval

PER_CATEGORY = 64  # half of them say combinations that training never shows
PROMPT_FILE = importlib.resources.files("snapgen_jax.evaluation") / "prompts" / "shapes.jsonl"


def prompt_lines() -> str:
    """The text of the prompt file, made anew. The file is kept so that scores compare when the grammar changes."""
    prompts = [p for c in CATEGORIES for heldout in (False, True) for p in make_prompts(c, heldout, PER_CATEGORY // 2)]
    return "".join(json.dumps(prompt.to_json()) + "\n" for prompt in prompts)


@functools.cache
def fixed_prompts() -> tuple[Prompt, ...]:
    """The prompts of the file, by category, seen combinations before held-out ones."""
    return tuple(Prompt.from_json(json.loads(line)) for line in PROMPT_FILE.read_text(encoding="utf-8").splitlines())


@dataclasses.dataclass(frozen=True)
class CompositionalScore:
    """Draws one image for each fixed prompt, and counts those that show what was asked for.

    Attributes:
        per_category: prompts in each category, an even number up to 64; fewer are the first of the 64.
        categories: those that are asked for and averaged. Fewer than all are for a model that was shown no others; such
            a score compares with none of other categories.
        seed: the image of prompt n of the file comes from (seed, n), however many prompts are used.
        output: which output of the generator is judged, images `uint8 [N, H, W, 3]`.
        options: options of the generator, such as `steps` and `guidance`.
    """

    per_category: int = PER_CATEGORY
    categories: Sequence[str] = CATEGORIES
    seed: int = 0
    output: str = "image"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, seed=SEED)
        if not 2 <= self.per_category <= PER_CATEGORY or self.per_category % 2:
            raise ValueError(f"per_category is {self.per_category}; choose an even number from 2 to {PER_CATEGORY}")
        if not self.categories or not set(self.categories) <= set(CATEGORIES):
            raise ValueError(f"categories are {tuple(self.categories)}; choose from {', '.join(CATEGORIES)}")

    def __call__(self, generator: ImageGenerator, dataset: ValidationData | None = None) -> EvaluationResult:
        """Numbers as in `score`; `score.chance`, and how the detector did on trial, see `validate_detector`.

        For each category a picture `score_<category>`, in which passes have a green frame and failures a red one.

        Raises:
            ValueError: the generator takes no prompts, or gives no images by that name.
        """
        del dataset
        half = PER_CATEGORY // 2
        asked = (i for i, prompt in enumerate(fixed_prompts()) if prompt.category in self.categories)
        chosen = [i for i in asked if i % half < self.per_category // 2]
        prompts = [fixed_prompts()[i] for i in chosen]
        texts = [prompt.prompt for prompt in prompts]
        wanted = Requests.of_prompts(texts)
        outputs = draw(generator, wanted, seed=self.seed, indices=chosen, options=self.options)
        images = read_images(outputs, self.output)
        passed = [p.requirement.met_by(detect(image)) for p, image in zip(prompts, images, strict=True)]
        trial = validate_detector(images.shape[1])
        numbers = {**score(prompts, passed), "score.chance": trial["detector.chance"], **trial}
        values = {f"score.{name}": np.array(group, np.float64) for name, group in _verdicts(prompts, passed).items()}
        return EvaluationResult(numbers, _pictures(prompts, images, passed), values)


def score(prompts: Sequence[Prompt], passed: Sequence[bool]) -> dict[str, float]:
    """Shares of passes: `score.<category>`; `score.overall`, `score.seen` and `score.heldout`, which are means over the
    categories; and `score.<category>.seen` and `.heldout`.

    All but the last two come with a Wilson 95% interval as `.low` and `.high`. Categories are of equal size, so that
    the mean over them is a share too.
    """
    numbers = {}
    for name, group in _verdicts(prompts, passed).items():
        numbers[f"score.{name}"] = float(np.mean(group))
        if "." not in name:
            numbers[f"score.{name}.low"], numbers[f"score.{name}.high"] = wilson_interval(sum(group), len(group))
    return numbers


def _verdicts(prompts: Sequence[Prompt], passed: Sequence[bool]) -> dict[str, list[bool]]:
    """Whether each passed, by the groups that `score` names."""
    groups: dict[str, list[bool]] = {}
    for prompt, verdict in zip(prompts, passed, strict=True):
        side = "heldout" if prompt.heldout else "seen"
        for name in ("overall", side, prompt.category, f"{prompt.category}.{side}"):
            groups.setdefault(name, []).append(verdict)
    return groups


def _pictures(prompts: Sequence[Prompt], images: np.ndarray, passed: Sequence[bool]) -> dict[str, np.ndarray]:
    pictures = {}
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        rows = [i for i, prompt in enumerate(prompts) if prompt.category == category]
        texts = [prompts[i].prompt for i in rows]
        pictures[f"score_{category}"] = grid(images[rows], texts, [passed[i] for i in rows])
    return pictures
