"""Many images of a trained run, a file each, over all hosts and devices: what a FID of 50,000 images is computed from.

    <folder>/draw.json          what the images were drawn from, and how
    <folder>/000000.png ...     whole or absent; the number is the image's index

Image i depends on (seed, i), what it is told, the weights and the options alone. A device draws one block of
consecutive images at a time, always in the same order, so that the number of hosts and devices changes nothing. A block
of which an image is missing is drawn again, and the missing ones are written. Hosts share out the blocks.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from snapgen_jax.conditions import chosen_options
from snapgen_jax.config import resolve
from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.digits import WORDS
from snapgen_jax.data.words import class_caption, read_class_names
from snapgen_jax.generation import Generator, load, load_config
from snapgen_jax.parallel.hosts import Cluster, current
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training.checkpoint import complete_steps
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import whole_file, write_whole
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.lifetime import Lifetime
from snapgen_jax.typed import plain

RECORD = "draw.json"
_WRITERS = 8


@dataclasses.dataclass(frozen=True)
class Told:
    """What each image is told: image i the text `texts[i % N]`, or the class `i % classes` of `label`, so that every
    class has as many images as any other; nothing where both are empty.

    Attributes:
        texts: prompts.
        label: name of the array of class labels.
        classes: how many there are.
    """

    texts: Sequence[str] = ()
    label: str = ""
    classes: int = 0

    def of(self, indices: Sequence[int]) -> dict[str, Any]:
        """The arguments `prompts` and `conditions` of `Generator.generate`."""
        if self.texts:
            return {"prompts": [self.texts[i % len(self.texts)] for i in indices]}
        return {"conditions": {self.label: np.asarray(indices) % self.classes}} if self.label else {}

    def describe(self) -> dict[str, Any]:
        """Plain JSON, the same for the same texts."""
        digest = hashlib.sha256("\n".join(self.texts).encode()).hexdigest()[:32] if self.texts else ""
        return {"texts": len(self.texts), "sha256": digest, "label": self.label, "classes": self.classes}


def told_prompts(file: str) -> Told:
    """The prompts of a text file, one a line; empty lines are none.

    Raises:
        ConfigError: there are none, or the file is not UTF-8.
    """
    try:
        lines = [line.strip() for line in epath.Path(file).read_text().splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts={file} is not UTF-8: {error}; write it in UTF-8") from error
    if not any(lines):
        raise ConfigError(f"--prompts={file} holds no prompt; write one a line")
    return Told(texts=tuple(line for line in lines if line))


def told_classes(generator: Generator, data: DataConfig, classes: str) -> Told:
    """Every class as often: by label, or by the caption of its name where the run takes prompts.

    Args:
        generator: of the run.
        data: the run's data section, which says what its classes are called.
        classes: "uniform", or a text file with one class name a line in place of the run's own.

    Raises:
        ConfigError: the run takes neither prompts nor one label, or its classes have no names.
    """
    if generator.takes_prompts and not generator.condition_names:
        if classes != "uniform" or data.class_names:
            names = read_class_names(data.class_names if classes == "uniform" else classes)
        elif data.source == "digits":
            names = list(WORDS)
        else:
            raise ConfigError(
                f"this run takes prompts, and its data ({data.source!r}) names no classes in data.class_names; give "
                "--classes=FILE with one class name a line, or --prompts=FILE with one prompt a line"
            )
        return Told(texts=tuple(class_caption(name) for name in names))
    bounds = generator.recipe.inputs.integer_bounds()
    if generator.takes_prompts or generator.condition_names != tuple(bounds) or len(bounds) != 1:
        needed = ", ".join(generator.condition_names) or "nothing"
        raise ConfigError(f"--classes is for a run that takes prompts or one class label, and this takes {needed}")
    if classes != "uniform":
        raise ConfigError(f"--classes={classes}: this run takes labels, which need no names; give --classes=uniform")
    ((label, count),) = bounds.items()
    return Told(label=label, classes=count)


def draw_run(
    workdir: epath.PathLike,
    folder: epath.PathLike,
    count: int | None = None,
    *,
    classes: str | None = None,
    prompts: str | None = None,
    step: int | None = None,
    decoder: epath.PathLike | None = None,
    **choices: Any,
) -> tuple[int, int]:
    """Draws images of a trained run on the devices of this process; returns how many it has drawn, and their number.

    Args:
        workdir: the run.
        folder: for the images.
        count: of images; by default one for each prompt.
        classes, prompts: what they are told: see `told_classes` and `told_prompts`. Neither for an unconditional run.
        step: which checkpoint; the newest by default.
        decoder: a run of a tiny decoder that takes the place of the codec's decoder.
        choices: see `draw`.

    Raises:
        ConfigError: it cannot be drawn so; as `draw` and `generation.load`.
    """
    told = Told() if prompts is None else told_prompts(prompts)
    if count is None and prompts is None:
        raise ConfigError("how many images? give --count=50000")
    kept = complete_steps(workdir) if (epath.Path(workdir) / "checkpoints").exists() else []
    chosen = max(kept, default=None) if step is None else step
    generator = load(workdir, chosen, decoder=decoder, mesh=make_mesh(MeshConfig(), jax.local_devices()))
    if classes is not None:
        told = told_classes(generator, resolve(load_config(workdir)).experiment.data, classes)
    count = len(told.texts) if count is None else count
    try:
        return draw(generator, told, folder, count, step=chosen, **choices), count
    except ValueError as error:
        raise ConfigError(str(error)) from error


def draw(
    generator: Generator,
    told: Told,
    folder: epath.PathLike,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 32,
    options: Mapping[str, Any] | None = None,
    step: int | None = None,
    npz: epath.PathLike | None = None,
    cluster: Cluster | None = None,
) -> int:
    """Draws those images of a folder that are missing; returns how many this process has drawn.

    A signal ends the process at once with the exit code of a preemption: what is written is whole.

    Args:
        generator: of the run, on this process's own devices; see `generation.load`.
        told: what the images are told.
        folder: local, or on an object store; shared by all hosts.
        count: of images in all.
        seed: of the noise.
        batch_size: images on a device at a time. Another one may round differently.
        options: of the generator, such as `steps` and `guidance`.
        step: of the checkpoint, for the record.
        npz: file that is given all images as `arr_0`, uint8 `[count, H, W, 3]`, which is what the evaluation of ADM
            (Dhariwal and Nichol 2021) reads.
        cluster: the processes that share out the images; by default those that `hosts.start` found.

    Raises:
        ConfigError: the folder holds images that were drawn otherwise, the numbers make no sense, or an image is
            missing when all hosts are done.
    """
    cluster, folder = cluster or current(), epath.Path(folder)
    for name, value in (("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"--{name}={value}; give 1 or more")
    _check_record(folder, _record(generator, told, seed, options or {}, step), writes=cluster.index == 0)
    names = [f"{index:0{max(6, len(str(count - 1)))}d}.png" for index in range(count)]
    life = Lifetime(cluster=cluster)
    with life.watch():
        drawn = _draw_missing(generator, told, folder, names, seed, batch_size, options or {}, cluster)
        if npz is not None:
            life.together("every host has drawn its images")
            if cluster.index == 0:
                write_npz(folder, names, epath.Path(npz))
    return drawn


def _draw_missing(
    generator: Generator,
    told: Told,
    folder: epath.Path,
    names: Sequence[str],
    seed: int,
    batch_size: int,
    options: Mapping[str, Any],
    cluster: Cluster,
) -> int:
    """The images of this process's blocks that are not in the folder; see `draw`."""
    there = {path.name for path in folder.iterdir()}
    firsts = range(0, len(names), batch_size)[cluster.index :: cluster.count]
    blocks = [range(first, min(first + batch_size, len(names))) for first in firsts]
    blocks = [block for block in blocks if any(names[i] not in there for i in block)]
    at_once, drawn = generator.devices, 0
    writes: list[concurrent.futures.Future[None]] = []
    with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
        for start in range(0, len(blocks), at_once):
            chosen = blocks[start : start + at_once]
            # The last ones are filled up, so that one program serves and an image has the same place in its block.
            filled = [*chosen, *itertools.repeat(chosen[-1], at_once - len(chosen))]
            rows = [block[k % len(block)] for block in filled for k in range(batch_size)]
            images = generator.generate(**told.of(rows), seed=seed, indices=rows, batch_size=len(rows), **dict(options))
            for write in writes:
                write.result()
            place = {index: n * batch_size + k for n, block in enumerate(chosen) for k, index in enumerate(block)}
            missing = [index for index in place if names[index] not in there]
            writes = [pool.submit(_write_png, folder / names[i], images[place[i]]) for i in missing]
            drawn += len(missing)
        for write in writes:
            write.result()
    return drawn


def write_npz(folder: epath.Path, names: Sequence[str], file: epath.Path) -> None:
    """Writes the images of a folder as one file: `arr_0`, uint8 `[N, H, W, 3]`, an image at a time.

    Raises:
        ConfigError: one is missing or has another size.
    """
    there = {path.name for path in folder.iterdir()}
    if missing := [name for name in names if name not in there]:
        raise ConfigError(
            f"{len(missing)} of {len(names)} images are not in {folder}, {missing[0]} for one; let all hosts write to "
            "one folder, on an object store or a shared disk, and run the same command again"
        )
    shape = _read_png(folder / names[0]).shape
    with (
        whole_file(file) as local,
        zipfile.ZipFile(local, "w", zipfile.ZIP_STORED) as archive,
        archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), *shape)}
        np.lib.format.write_array_header_1_0(member, header)
        for name in names:
            image = _read_png(folder / name)
            if image.shape != shape:
                raise ConfigError(f"{folder / name} is {image.shape}, and {names[0]} {shape}; draw all at one size")
            member.write(image.tobytes())


def _record(
    generator: Generator, told: Told, seed: int, options: Mapping[str, Any], step: int | None
) -> dict[str, Any]:
    """All that decides how an image of an index looks, as JSON has it."""
    decides = {
        "weights": fingerprint({"params": generator.params, "frozen": generator.frozen}),
        "told": told.describe(),
        "seed": seed,
        "options": plain(chosen_options(generator.recipe.options, options)),
        "step": step,
    }
    return json.loads(json.dumps(decides))


def _check_record(folder: epath.Path, record: dict[str, Any], writes: bool) -> None:
    """Compares with what the folder's images were drawn from; one process writes it where there is nothing yet."""
    path = folder / RECORD
    if path.exists():
        try:
            earlier = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} cannot be read: {error}; give another --out") from error
        if differing := [name for name in record if earlier.get(name) != record[name]]:
            what = "; ".join(f"{name} {earlier.get(name)}, now {record[name]}" for name in differing)
            raise ConfigError(f"{folder} holds images that were drawn otherwise ({what}); give another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if images := [item.name for item in folder.iterdir() if item.suffix == ".png" and item.stem.isdigit()]:
        raise ConfigError(
            f"{folder} holds images that are not of this command, {images[0]} for one; give another --out"
        )
    if writes:
        write_whole(path, json.dumps(record, indent=2) + "\n")


def _write_png(path: epath.Path, image: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())


def _read_png(path: epath.Path) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
    except OSError as error:
        raise ConfigError(f"{path} is no image: {error}; remove it and run the same command again") from error
