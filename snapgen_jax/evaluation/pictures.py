"""Pictures for people: clips and maps as images, a grid of images with their captions below, and PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from snapgen_jax.evaluation.fonts import Font, legible

PAPER, INK = (250, 250, 250), (60, 60, 67)
PASSED, FAILED = (22, 152, 92), (214, 64, 69)
GAP, BORDER, LINE_HEIGHT, FONT_SIZE, MOST_LINES = 10, 4, 14, 11, 4
MOST_FRAMES, FRAME_GAP, FRAME_PIXELS = 8, 2, 64


def enlarge(image: np.ndarray, least_pixels: int) -> np.ndarray:
    """Repeats pixels by the smallest whole factor that makes the longer side of `[H, W, 3]` at least `least_pixels`."""
    factor = max(1, -(-least_pixels // max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def png_bytes(image: np.ndarray) -> bytes:
    """`uint8 [H, W, 3]` as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def as_pictures(array: np.ndarray) -> np.ndarray:
    """Images, clips or maps as `uint8 [N, H', W', 3]`.

    Args:
        array: `[N, H, W, C]`, or clips `[N, F, H, W, C]`, which become film strips. uint8 with C of 3 or 1 is shown as
            it is; a float map, C of 1, as grey from its own smallest value to its own largest, see `normalised`.

    Raises:
        ValueError: an array of another rank or type.
    """
    values, channels = array, array.shape[-1] if array.ndim in (4, 5) else 0
    if array.dtype != np.uint8 and channels == 1 and np.issubdtype(array.dtype, np.floating):
        values = np.stack([normalised(one) for one in array]) if len(array) else array.astype(np.uint8)
    if values.dtype != np.uint8 or channels not in (1, 3):
        raise ValueError(
            f"{array.dtype} {list(array.shape)} is no picture; give images uint8 [N, H, W, 3], maps [N, H, W, 1] or "
            "clips of either [N, F, H, W, C]"
        )
    values = np.broadcast_to(values, (*values.shape[:-1], 3))
    return np.stack([film_strip(clip) for clip in values]) if array.ndim == 5 and len(values) else values


def normalised(values: np.ndarray) -> np.ndarray:
    """A float map of any shape as uint8 grey: 0 at its smallest finite value, 255 at its largest.

    A constant map is middle grey; what is not finite is black.
    """
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    share = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return np.where(finite, np.round(255 * np.where(finite, share, 0)), 0).astype(np.uint8)


def film_strip(clip: np.ndarray, most_frames: int = MOST_FRAMES) -> np.ndarray:
    """A clip `uint8 [F, H, W, 3]` as one picture `uint8 [H', W', 3]`: frames side by side, time from left to right.

    Args:
        clip: at least one frame, drawn larger by a whole factor until a side has `FRAME_PIXELS`.
        most_frames: of a longer clip so many, evenly chosen; the first and the last are among them.

    Raises:
        ValueError: there is no frame.
    """
    if not len(clip):
        raise ValueError("a film strip needs at least one frame and got none")
    chosen = np.linspace(0, len(clip) - 1, min(len(clip), most_frames)).round().astype(int)
    frames = [enlarge(clip[n], FRAME_PIXELS) for n in chosen]
    gap = np.full((frames[0].shape[0], FRAME_GAP, 3), PAPER, np.uint8)
    return np.concatenate([part for frame in frames for part in (gap, frame)][1:], axis=1)


def grid(
    images: np.ndarray,
    captions: Sequence[str] = (),
    passed: Sequence[bool] = (),
    *,
    columns: int = 8,
    least_pixels: int = 112,
) -> np.ndarray:
    """Lays images out in rows, each with its caption below and, where `passed` is given, a green or a red frame.

    Args:
        images: `uint8 [N, H, W, 3]`, drawn larger by a whole factor until a side has `least_pixels`.
        captions: N texts, wrapped to the width of an image and cut after four lines; or none. Characters that no font
            on this machine shows are spelt in others, see `fonts.legible`.
        passed: N verdicts; or none.

    Returns:
        `uint8 [H', W', 3]`.

    Raises:
        ValueError: no image, or another number of captions or verdicts than of images.
    """
    count = len(images)
    if not count:
        raise ValueError("a grid needs at least one image and got none")
    for name, items in (("captions", captions), ("verdicts", passed)):
        if len(items) not in (0, count):
            raise ValueError(f"{count} images came with {len(items)} {name}; give one for each image, or none")
    large = [enlarge(image, least_pixels) for image in images]
    height, width = large[0].shape[:2]
    texts = [legible(caption, FONT_SIZE) for caption in captions]
    lines = [_wrap(text, font, width) for text, font in texts] or [[]] * count

    columns = min(columns, count)
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    frame = BORDER if len(passed) else 0
    cell_width = width + 2 * frame + GAP
    row_heights = [height + 2 * frame + GAP + LINE_HEIGHT * max(len(lines[n]) for n in row) for row in rows]
    canvas = Image.new("RGB", (columns * cell_width + GAP, sum(row_heights) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, n in enumerate(row):
            left = GAP + column * cell_width
            if frame:
                box = (left, top, left + width + 2 * frame - 1, top + height + 2 * frame - 1)
                draw.rectangle(box, fill=PASSED if passed[n] else FAILED)
            canvas.paste(Image.fromarray(large[n]), (left + frame, top + frame))
            for number, line in enumerate(lines[n]):
                below = top + height + 2 * frame + 2 + number * LINE_HEIGHT
                draw.text((left + frame, below), line, fill=INK, font=texts[n][1])
        top += row_height
    return np.asarray(canvas)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    words = [part for word in text.split() for part in _parts(word, font, width)]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + " ..."]
    return lines


def _parts(word: str, font: Font, width: int) -> list[str]:
    """A word in parts that fit into a line: of Chinese, or an address, whole captions are one word."""
    parts = [""]
    for letter in word:
        if parts[-1] and font.getlength(parts[-1] + letter) > width:
            parts.append("")
        parts[-1] += letter
    return parts
