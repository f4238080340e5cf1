"""Fonts for captions under pictures: one that shows every character of a text, or the text in characters that it has.

Pillow's own font holds little beyond Latin. Further ones are those of matplotlib, where that is installed, and of the
system, which fontconfig finds. A character that none of them shows becomes its base letter (s for s with a caron) or
its escape (\\u732b); never a box.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import pathlib
import subprocess
import unicodedata
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont
_OWN = ""  # Pillow's
_MISSING = "\U0010ffff"  # no font has this one: what is drawn for it is drawn for all that a font lacks

log = logging.getLogger(__name__)


def legible(text: str, size: int) -> tuple[str, Font]:
    """A text that is drawn without a box, and the font that draws it.

    Returns:
        The text as it is, and the first font that shows all of it. Where there is none, the text with other characters
        for those that the best font lacks, which is said once.
    """
    best = _OWN
    for path in _candidates(text):
        missing = lacks(path, text)
        if not missing:
            return text, _font(path, size)
        if len(missing) < len(lacks(best, text)):
            best = path
    missing = lacks(best, text)
    _say_once(missing)
    return "".join(_spelt(best, letter) if letter in missing else letter for letter in text), _font(best, size)


def lacks(path: str, text: str) -> str:
    """The characters of a text that the font in a file does not show, each once; "" names Pillow's own font."""
    return "".join(letter for letter in dict.fromkeys(text) if not _shows(path, letter))


def _candidates(text: str) -> Iterator[str]:
    """Files of fonts, the nearest at hand first."""
    yield _OWN
    if path := _of_matplotlib():
        yield path
    if path := _of_system(lacks(_OWN, text)):
        yield path


@functools.cache
def _of_matplotlib() -> str:
    """DejaVu Sans (Latin, Greek, Cyrillic and more), where matplotlib is installed; else ""."""
    found = importlib.util.find_spec("matplotlib")
    folders = (found.submodule_search_locations if found else None) or ()
    files = [pathlib.Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" for folder in folders]
    return next((str(file) for file in files if file.is_file()), "")


@functools.lru_cache(maxsize=1024)
def _of_system(letters: str) -> str:
    """The font that fontconfig thinks best for some characters; "" where it, or a font, is not there."""
    wanted = " ".join(f"{ord(letter):x}" for letter in letters)
    try:
        command = ["fc-match", "--format=%{file}", f":charset={wanted}"]
        file = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
        ImageFont.truetype(file)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return file


@functools.lru_cache(maxsize=64)
def _font(path: str, size: int) -> Font:
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "of a given size"
    return font


@functools.lru_cache(maxsize=65536)
def _shows(path: str, letter: str) -> bool:
    if unicodedata.category(letter) == "Cs":  # half of a character
        return False
    if letter.isspace() or unicodedata.category(letter) == "Cf":
        return True
    font = _font(path, 24)
    return _drawn(font, letter) != _drawn(font, _MISSING)


def _drawn(font: Font, letter: str) -> bytes:
    image = Image.new("L", (48, 48))
    ImageDraw.Draw(image).text((8, 8), letter, fill=255, font=font)
    return image.tobytes()


def _spelt(path: str, letter: str) -> str:
    """A character in those that a font has: its base letter, or its escape."""
    base = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    if base != letter and not lacks(path, base):
        return base
    return letter.encode("unicode_escape").decode("ascii")


@functools.cache
def _warned() -> set[str]:
    return set()


def _say_once(missing: str) -> None:
    new = [letter for letter in missing if letter not in _warned()]
    if new and not _warned():
        log.warning(
            "no font on this machine shows %s; captions under pictures spell such characters otherwise. Install one, "
            "fonts-noto-cjk or fonts-noto-core on Debian say",
            ", ".join(ascii(letter)[1:-1] for letter in new[:8]),
        )
    _warned().update(new)
