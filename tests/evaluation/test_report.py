"""The report: self-contained, escaped, whole, and nothing without its numbers."""

import html.parser
import json
import math

import numpy as np
import pytest
from etils import epath

from snapgen_jax.data.prompts import CATEGORIES
from snapgen_jax.evaluation.curves import Series, line_chart
from snapgen_jax.evaluation.pictures import png_bytes
from snapgen_jax.evaluation.report import REQUIRED, write_report

EVIL = "<script>alert('x')</script>"
NUMBERS = {
    **dict.fromkeys(REQUIRED, 0.5),
    "images_seen": 288_000,
    "export.flex_ops": 0,
    "export.unet.rel_l2_f32": 3e-7,
    "export.unet.rel_l2_f16": 9e-3,
    "score.position.low": 0.41,
    "score.position.high": 0.59,
}


@pytest.fixture
def workdir(tmp_path):
    """A run's folder, with hostile texts wherever a text comes from outside."""
    (tmp_path / "metrics").mkdir()
    (tmp_path / "samples").mkdir()
    rows = [{"step": s, "finite": True, "loss": 1 / s, f"share_{EVIL}": 0.1} for s in range(1, 1001)]
    rows[500]["loss"] = None  # how the record writes a number that was not finite
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics" / "train.jsonl").write_text(lines + '{"step": 1001, "lo')
    rows = [
        {"step": s, "evaluator": "validation_loss", "validation_loss.t=0.05": 1.0, "validation_loss.t=0.95": 2.0}
        for s in (500, 1000)
    ]
    (tmp_path / "metrics" / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = png_bytes(np.zeros((8, 8, 3), np.uint8))
    for name in ("prompts", "bundle", "score_position", *(f"samples_{s:08d}" for s in range(100, 1000, 100))):
        (tmp_path / "samples" / f"{name}.png").write_bytes(picture)
    (tmp_path / "run.json").write_text(json.dumps({"machine": EVIL, "commit": "abc", "packages": {"jax": "0.10"}}))
    (tmp_path / "config.json").write_text(json.dumps({"data": {"path": EVIL}}))
    return tmp_path


class Page(html.parser.HTMLParser):
    """Tags that are open at the end, all tags with their attributes, and the text between them."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "polyline", "polygon", "circle") or tag in self.open:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page(workdir, **options) -> Page:
    write_report(workdir, NUMBERS, **options)
    return Page((workdir / "report.html").read_text())


def test_the_json_holds_the_numbers_flat(workdir):
    given = {**NUMBERS, "params": np.int64(7), "score.chance": np.float32(0.25), "frechet.distance": math.nan}
    returned = write_report(workdir, given)
    stored = json.loads((workdir / "report.json").read_text())
    assert stored == returned == {**NUMBERS, "params": 7, "score.chance": 0.25, "frechet.distance": None}
    assert {"minutes", "params", "score.overall", "score.heldout", "score.chance", "export.flex_ops"} <= stored.keys()
    assert {f"score.{category}" for category in CATEGORIES} <= stored.keys()


def test_missing_numbers_are_all_named_and_nothing_is_written(workdir):
    numbers = {name: value for name, value in NUMBERS.items() if name not in ("minutes", "score.counting")}
    with pytest.raises(ValueError, match=r"minutes \(missing\), params \(nan\), score.counting \(missing\)"):
        write_report(workdir, {**numbers, "params": math.nan})
    assert not list(workdir.glob("report*"))


def test_every_text_from_outside_is_escaped(workdir):
    found = page(workdir, title=EVIL, prompts=["a star", EVIL, '" onerror="alert(1)'])
    assert "script" not in {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.text.count(EVIL) >= 4  # title, heading, prompt, machine: shown as they are
    assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in found.tags)


def test_the_page_is_well_formed_and_needs_no_other_file(workdir):
    found = page(workdir)
    assert found.open == []
    sources = [attributes[name] for _, attributes in found.tags for name in ("src", "href") if name in attributes]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert (
        "@import" not in (workdir / "report.html").read_text() and "url(" not in (workdir / "report.html").read_text()
    )


def test_it_shows_samples_scores_curves_and_export(workdir):
    found = page(workdir, title="A run", prompts=["a star"])
    for text in ("A run", "a star", "Compositional score", "0.41 - 0.59", "validation loss by timestep", "3.0e-07"):
        assert text in found.text
    assert "9.0e-03 missed" in found.text  # beyond the limit of float16
    assert "after 100 steps" in found.text and "after 900 steps" in found.text
    assert sum(tag == "img" for tag, _ in found.tags) == 3 + 4  # of the pictures of training, a few


def test_it_says_how_to_open_the_page_that_draws_where_there_is_one(tmp_path):
    folder = tmp_path / "a run"
    (folder / "export" / "web").mkdir(parents=True)
    write_report(folder, NUMBERS)
    assert "browser" not in (folder / "report.html").read_text()
    (folder / "export" / "web" / "serve.py").touch()
    write_report(folder, NUMBERS)
    page = Page((folder / "report.html").read_text())
    assert f"python3 '{folder}/export/web/serve.py'" in page.text
    assert ("a", {"href": "http://localhost:8000/"}) in page.tags


def test_a_bare_workdir_still_gets_its_report(tmp_path):
    found = page(tmp_path / "new")
    assert "Compositional score" in found.text and "Training" not in found.text


def test_a_crash_while_writing_leaves_the_old_report(workdir, monkeypatch):
    page(workdir, title="first")

    def write_half(path, data):
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(epath.Path(workdir)), "write_bytes", write_half)
        with pytest.raises(OSError, match="no space left"):
            write_report(workdir, {**NUMBERS, "minutes": 1.0}, title="second")
    assert "<h1>first</h1>" in (workdir / "report.html").read_text()
    assert json.loads((workdir / "report.json").read_text())["minutes"] == NUMBERS["minutes"]
    page(workdir, title="third")
    assert "<h1>third</h1>" in (workdir / "report.html").read_text() and not list(workdir.glob("*.tmp"))


# --- charts ----------------------------------------------------------------------------------------------------------


def points(chart: str) -> list[list[tuple[float, float]]]:
    lines = [attributes["points"] for tag, attributes in Page(chart).tags if tag == "polyline"]
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_a_chart_follows_its_values():
    (line,) = points(line_chart("loss", [Series("loss", range(10), [5.0 - n / 2 for n in range(10)])]))
    xs, ys = zip(*line, strict=True)
    assert len(line) == 10 and list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # SVG counts downwards: falling values, rising y
    assert np.allclose(np.diff(xs), np.diff(xs)[0], atol=0.11) and np.allclose(np.diff(ys), np.diff(ys)[0], atol=0.11)


def test_an_automatic_axis_makes_an_exponential_decay_straight():
    (line,) = points(line_chart("loss", [Series("loss", range(50), np.exp(-np.arange(50) / 5.0))], axis="auto"))
    assert np.allclose(np.diff([y for _, y in line]), line[1][1] - line[0][1], atol=0.11)


def test_long_lines_are_averaged_and_gaps_left_out():
    noisy = np.where(np.arange(100_000) % 7 == 0, np.nan, np.arange(100_000) % 2)
    (line,) = points(line_chart("noise", [Series("noise", range(100_000), noisy)]))
    assert len(line) <= 240 and np.ptp([y for _, y in line]) < 2


def test_nothing_to_draw_is_no_chart():
    assert line_chart("loss", []) == line_chart("loss", [Series("loss", [1, 2], [math.nan, math.inf])]) == ""


def test_one_point_is_a_dot():
    assert "<circle" in line_chart("loss", [Series("loss", [7], [0.0])])
