"""Where drawn images go, as it is written on a command line:

    samples.png                     one sheet of all, with the prompts below
    folder/                         folder/000.png, folder/001.png ...; an existing folder needs no slash
    out_{index}.png, out_%03d.png   one file an image; {index:03d} too

The end of the name says the format: .png, .jpg, .jpeg or .webp (without loss).
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from snapgen_jax.evaluation.pictures import grid
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole

FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG", "optimize": True},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True},
}
_KNOWN = ".png, .jpg, .jpeg or .webp"
_NUMBER = re.compile(r"\{index(?::(\d*)d?)?\}|%(\d*)d")


@dataclasses.dataclass(frozen=True)
class Destination:
    """One sheet, or one file an image.

    Attributes:
        folder: of the files; made where it is missing.
        name: of the sheet; or of each image, with `{index}` in it.
    """

    folder: epath.Path
    name: str

    @property
    def is_sheet(self) -> bool:
        """Whether all images go into one file."""
        return not _NUMBER.search(self.name)

    def file(self, index: int) -> epath.Path:
        """The file of image number `index`."""
        return self.folder / _NUMBER.sub(lambda found: format(index, f"{found[1] or found[2] or ''}d"), self.name)

    def write(self, images: np.ndarray | Sequence[np.ndarray], titles: Sequence[str]) -> list[epath.Path]:
        """Writes images `uint8 [N, H, W, 3]`; returns the files. Each is whole; none is written before all are encoded.

        Args:
            images: as they were drawn; a sheet enlarges small ones.
            titles: N texts, for the sheet.

        Raises:
            ConfigError: the format does not hold a picture of this size.
        """
        pictures = [grid(np.asarray(images), titles)] if self.is_sheet else list(images)
        files = [self.file(index) for index in range(len(pictures))]
        encoded = [_encoded(picture, file) for picture, file in zip(pictures, files, strict=True)]
        for file, data in zip(files, encoded, strict=True):
            write_whole(file, data)
        return files

    def write_one(self, image: np.ndarray, index: int) -> epath.Path:
        """Writes image number `index`, uint8 `[H, W, 3]`; returns its file. Raises as `write`."""
        file = self.file(index)
        write_whole(file, _encoded(image, file))
        return file


def destination(out: str) -> Destination:
    """What `--out` asks for.

    Raises:
        ConfigError: the suffix is of no format that is written, the name is no pattern of file names, or a file lies
            where its folder would.
    """
    path = epath.Path(out)
    above = next((folder for folder in path.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise ConfigError(f"--out={out}: {above} is a file, and no folder to write into; give another place")
    if out.endswith("/") or path.is_dir():
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out={out} is a file; leave the slash out to write a sheet, or name a folder")
        return Destination(path, "{index:03d}.png")
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--out={out} ends in no format of images; let it end in {_KNOWN}, or in / for a folder")
    if _NUMBER.search(str(path.parent)):
        raise ConfigError(f"--out={out} numbers a folder; put {{index}} or %03d into the name of the file alone")
    if re.search(r"[{}]", _NUMBER.sub("", path.name)):
        raise ConfigError(f"--out={out}: only {{index}}, {{index:03d}} or %03d is filled in; leave other braces out")
    return Destination(path.parent, path.name)


def _encoded(picture: np.ndarray, file: epath.Path) -> bytes:
    buffer = io.BytesIO()
    try:
        Image.fromarray(picture).save(buffer, **FORMATS[file.suffix.lower()])
    except (ValueError, OSError) as error:
        height, width = picture.shape[:2]
        raise ConfigError(f"{file} cannot hold a picture of {width} x {height} px ({error}); write .png") from error
    return buffer.getvalue()
