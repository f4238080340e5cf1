"""The compositional score: its prompts are fixed and balanced, and a perfect model scores one."""

import collections
import dataclasses

import numpy as np
import pytest

from snapgen_jax.data.prompts import CATEGORIES, Demand, Requirement
from snapgen_jax.data.shapes import COLOURS, Scene, SceneObject, holds, render
from snapgen_jax.evaluation.compositional import PROMPT_FILE, CompositionalScore, fixed_prompts, prompt_lines, score
from snapgen_jax.evaluation.detector import detect
from tests.generators_for_tests import by_label

CORNERS = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
SIDES = {"left of": (0.27, 0.5), "right of": (0.73, 0.5), "above": (0.5, 0.27), "below": (0.5, 0.73)}
OTHER = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def draw(requirement: Requirement) -> np.ndarray:
    """The simplest picture that a requirement allows."""
    wanted = [demand for demand in requirement.demands for _ in range(demand.count)]
    places = CORNERS
    if requirement.relation is not None:
        places = [SIDES[requirement.relation], SIDES[OTHER[requirement.relation]]]
    objects = [SceneObject(d.kind, d.colour or "green", 0.36, x, y) for d, (x, y) in zip(wanted, places, strict=False)]
    return render(Scene(tuple(objects), (), "mixed"), 32)


class Painter:
    """Draws what a prompt demands, or, for the prompts of `fails`, nothing; keeps what it was asked."""

    def __init__(self, fails=()):
        self.fails = fails
        self.requirements = {prompt.prompt: prompt.requirement for prompt in fixed_prompts()}

    def generate(self, prompts, *, seed=0, indices=None, **options):
        self.asked = {"seed": seed, "indices": indices, **options}
        blank = np.full((32, 32, 3), 240, np.uint8)
        return np.stack([blank if p in self.fails else draw(self.requirements[p]) for p in prompts])


def test_the_prompt_file_is_what_the_grammar_makes():
    assert PROMPT_FILE.read_text(encoding="utf-8") == prompt_lines(), (
        "the grammar no longer makes evaluation/prompts/shapes.jsonl: scores would not compare with earlier ones; "
        "if that is meant, write `prompt_lines()` to it"
    )


def test_every_category_has_64_different_prompts_half_of_them_held_out():
    prompts = fixed_prompts()
    count = collections.Counter((prompt.category, prompt.heldout) for prompt in prompts)
    assert count == {(category, heldout): 32 for category in CATEGORIES for heldout in (False, True)}
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)


def test_a_perfect_model_scores_one():
    numbers = CompositionalScore()(Painter()).numbers
    assert numbers["score.overall"] == numbers["score.seen"] == numbers["score.heldout"] == 1.0
    assert all(numbers[f"score.{category}"] == 1.0 for category in CATEGORIES)
    assert 0.98 < numbers["score.overall.low"] < 1.0 < numbers["score.overall.high"] + 1e-9
    assert 0.02 < numbers["score.chance"] < 0.10


def test_failures_count_where_they_belong():
    fails = {p.prompt for p in fixed_prompts() if p.category == "position" and p.heldout}
    found = CompositionalScore()(Painter(fails))
    numbers = found.numbers
    assert found.values["score.overall"].tolist() == [float(p.prompt not in fails) for p in fixed_prompts()]
    assert all(values.mean() == pytest.approx(numbers[name]) for name, values in found.values.items())
    assert numbers["score.position"] == 0.5
    assert (numbers["score.position.seen"], numbers["score.position.heldout"]) == (1.0, 0.0)
    assert numbers["score.heldout"] == pytest.approx(5 / 6)
    assert numbers["score.overall"] == pytest.approx(11 / 12)
    assert numbers["score.position.low"] < 0.5 < numbers["score.position.high"]


def test_the_overall_score_is_the_mean_of_the_categories():
    prompts = fixed_prompts()
    passed = np.random.default_rng(0).random(len(prompts)) < 0.4
    numbers = score(prompts, passed.tolist())
    assert numbers["score.overall"] == pytest.approx(np.mean([numbers[f"score.{c}"] for c in CATEGORIES]))
    assert numbers["score.overall"] == pytest.approx((numbers["score.seen"] + numbers["score.heldout"]) / 2)


def test_fewer_prompts_keep_the_noise_of_each():
    painter = Painter()
    CompositionalScore(per_category=4, seed=3, options={"steps": 5})(painter)
    half = [0, 1, 32, 33]
    assert painter.asked["indices"] == [64 * c + i for c in range(6) for i in half]
    assert (painter.asked["seed"], painter.asked["steps"]) == (3, 5)
    with pytest.raises(ValueError, match="even number"):
        CompositionalScore(per_category=7)


def test_fewer_categories_are_a_score_of_their_own():
    fails = {p.prompt for p in fixed_prompts() if p.category not in ("colours", "counting")}
    found = CompositionalScore(categories=("colours", "counting"))(Painter(fails))
    assert found.numbers["score.overall"] == found.numbers["score.colours"] == 1.0
    assert set(found.pictures) == {"score_colours", "score_counting"}
    with pytest.raises(ValueError, match="choose from single_object, two_objects"):
        CompositionalScore(categories=("colors",))


def test_the_output_that_is_judged_is_named():
    class Run(Painter):
        """A run that also gives the empty picture."""

        recipe = params = frozen = None
        takes_prompts, condition_names = True, ()

        def run(self, prompts, *, conditions=None, seed=0, indices=None, **options):
            images = self.generate(prompts)
            return {"image": np.full_like(images, 240), "edited": images, "grey": images[..., 0]}

    score = CompositionalScore(per_category=2)
    assert score(Run()).numbers["score.overall"] == 0.0
    assert dataclasses.replace(score, output="edited")(Run()).numbers["score.overall"] == 1.0
    with pytest.raises(ValueError, match=r"'grey' is uint8 \[N, 32, 32\], .* gives 'image' uint8 \[N, 32, 32, 3\]"):
        dataclasses.replace(score, output="grey")(Run())
    with pytest.raises(ValueError, match="takes no prompts"):
        score(by_label())


def test_pictures_frame_passes_green_and_failures_red():
    first = fixed_prompts()[0]
    pictures = CompositionalScore(per_category=2)(Painter({first.prompt})).pictures
    assert set(pictures) == {f"score_{category}" for category in CATEGORIES}
    failed, passed = pictures["score_single_object"][10, 10], pictures["score_counting"][10, 10]
    assert failed[0] > failed[1] and passed[1] > passed[0]


@pytest.mark.parametrize(
    ("objects", "passes"),
    [
        ([("circle", "red", 0.3, 0.3), ("square", "blue", 0.7, 0.3)], True),
        ([("circle", "blue", 0.3, 0.3), ("square", "red", 0.7, 0.3)], False),  # colours bound to the other object
        ([("square", "blue", 0.3, 0.3), ("circle", "red", 0.7, 0.3)], False),  # on the other side
        ([("circle", "red", 0.3, 0.3)], False),  # one is missing
        ([("circle", "red", 0.3, 0.3), ("square", "blue", 0.7, 0.3), ("star", "red", 0.5, 0.75)], False),  # surplus
        ([("circle", "red", 0.5, 0.27), ("square", "blue", 0.5, 0.73)], False),  # above, not left of
    ],
)
def test_an_image_must_show_just_what_was_asked(objects, passes):
    asked = Requirement((Demand("circle", 1, "red"), Demand("square", 1, "blue")), "left of")
    scene = Scene(tuple(SceneObject(k, c, 0.32, x, y) for k, c, x, y in objects), (), "position")
    assert asked.met_by(detect(render(scene, 64))) is passes


def test_relations_hold_in_the_picture_as_in_the_scene():
    rng = np.random.default_rng(0)
    for _ in range(40):
        angle = rng.uniform(0, 2 * np.pi)
        a = (0.5 + 0.27 * np.cos(angle), 0.5 + 0.27 * np.sin(angle))
        b = (1 - a[0], 1 - a[1])
        names = list(COLOURS)
        pair = tuple(SceneObject("circle", c, 0.32, *at) for c, at in ((names[0], a), (names[5], b)))
        first, second = sorted(detect(render(Scene(pair, (), "position"), 64)), key=lambda o: o.colour != names[0])
        for relation in SIDES:
            steep = abs(abs(np.cos(angle)) - 0.5) < 0.05 or abs(abs(np.sin(angle)) - 0.5) < 0.05
            assert steep or holds(relation, (first.x, first.y), (second.x, second.y)) == holds(relation, a, b)
