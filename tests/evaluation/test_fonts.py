"""Captions under pictures in any script: letters, or a spelling of them, and never boxes in silence."""

import os

import numpy as np
import pytest

from snapgen_jax.evaluation import fonts
from snapgen_jax.evaluation.fonts import lacks, legible
from snapgen_jax.evaluation.pictures import FONT_SIZE, _wrap, grid

DEJAVU = fonts._of_matplotlib()
TEXTS = ["a café in Łódź", "μια γάτα", "рыжая кошка", "a ﬁve-pointed ½ star"]


@pytest.fixture
def bare(monkeypatch):
    """A machine with no font but Pillow's own, where nothing was said yet."""
    monkeypatch.setattr(fonts, "_of_matplotlib", lambda: "")
    monkeypatch.setenv("PATH", "")
    fonts._of_system.cache_clear()
    fonts._warned.cache_clear()
    yield
    fonts._of_system.cache_clear()


def picture(caption):
    return grid(np.zeros((1, 112, 112, 3), np.uint8), [caption])


@pytest.mark.skipif(not DEJAVU, reason="matplotlib is not installed")
@pytest.mark.parametrize("text", TEXTS)
def test_accents_greek_and_cyrillic_are_shown_as_they_are(text):
    written, font = legible(text, FONT_SIZE)
    assert written == text and not lacks(str(font.path), text)


@pytest.mark.skipif(not DEJAVU, reason="matplotlib is not installed")
def test_what_is_drawn_are_letters():
    """Boxes would make one picture of any three letters."""
    assert (picture("кот") != picture("дом")).any()
    assert (picture("\U0010fffe" * 3) != picture("\U0010fffd" * 3)).any(), "an escape"


def test_a_text_in_plain_letters_needs_no_other_font(bare):
    text, font = legible("a red circle left of 2 squares!", FONT_SIZE)
    assert text == "a red circle left of 2 squares!" and font.getname()[0] == "Aileron"


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("caf\u0113 na\u00efve", "cafe naive"),
        ("a \u732b", r"a \u732b"),
        ("half \ud83d of one", r"half \ud83d of one"),
        ("\U0001f600\n\x00", "\\U0001f600\n\\x00"),
    ],
)
def test_a_letter_that_no_font_has_is_its_base_letter_or_its_escape(bare, text, spelt):
    written, font = legible(text, FONT_SIZE)
    assert written == spelt and not lacks("", written)
    assert font.getlength(written.split("\n")[0]) > 0


def test_what_no_font_shows_is_said_once(bare, caplog):
    for text in ("\u732b", "\u72ac and \u732b"):
        picture(text)
    assert [record.message.partition(";")[0] for record in caplog.records] == [r"no font on this machine shows \u732b"]
    assert "fonts-noto-cjk" in caplog.text


@pytest.mark.skipif(not DEJAVU or os.name != "posix", reason="needs a font and a shell")
def test_fontconfig_is_asked_for_a_font_of_the_system(bare, monkeypatch, tmp_path):
    asked = tmp_path / "asked"
    (tmp_path / "fc-match").write_text(f'#!/bin/sh\necho "$@" > {asked}\nprintf %s {DEJAVU}\n')
    (tmp_path / "fc-match").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    text, font = legible("рыжая", FONT_SIZE)
    assert text == "рыжая" and font.path == DEJAVU
    assert asked.read_text().split() == ["--format=%{file}", ":charset=440", "44b", "436", "430", "44f"]


def test_a_word_that_is_wider_than_a_picture_is_broken():
    text, font = legible("x" * 60 + " end", FONT_SIZE)
    lines = _wrap(text, font, 112)
    assert len(lines) > 2 and all(font.getlength(line) <= 112 for line in lines)
    assert "".join(lines) == "x" * 60 + " end"
