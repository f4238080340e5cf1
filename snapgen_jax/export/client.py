"""A client of an export bundle: from prompts or named arrays to images, with numpy and ai-edge-litert alone.

The files that are copied into every bundle import nothing of the library they lie in: program.py says what
program.json means, sampler.py runs it, noise.py draws what it begins with, runtime.py calls LiteRT, older.py reads what
older bundles say, unpacking.py reads packed networks, and this one reads the folder.

    generator = LiteRTGenerator("bundle")
    images = generator.generate(["two red circles left of a blue square"])   # uint8 [1, H, W, 3]; needs `tokenizers`
    outputs = generator.run({"image": pictures})                             # {name: [N, ...]}, of any program
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
import re
import sys
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import numpy as np

if __package__:
    from snapgen_jax.diffusion.noise import draw_noise
    from snapgen_jax.export.older import from_schema_1, from_schema_2
    from snapgen_jax.export.program import BundleError, FeedForward, Flow, Tokenizer, parse
    from snapgen_jax.export.runtime import AcceleratorError, CompiledUnit, litert_unit
    from snapgen_jax.export.sampler import Sampler, Unit, relative_l2, with_options
    from snapgen_jax.export.unpacking import unpacked
else:  # beside its own copies, in a bundle; each may be a link into a store of blobs, where Python would look
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent))
    from noise import draw_noise  # type: ignore[import-not-found]
    from older import from_schema_1, from_schema_2  # type: ignore[import-not-found]
    from program import BundleError, FeedForward, Flow, Tokenizer, parse  # type: ignore[import-not-found]
    from runtime import AcceleratorError, CompiledUnit, litert_unit  # type: ignore[import-not-found]
    from sampler import Sampler, Unit, relative_l2, with_options  # type: ignore[import-not-found]
    from unpacking import unpacked  # type: ignore[import-not-found]

# Of manifest.json. Schema 4 has the same program.json as 3; 2 had another, and 1 a scheduler.json. Schema 5 is 4 with
# packed networks, so that a client that does not unpack refuses it.
MANIFEST_SCHEMA = 4
PACKED_SCHEMA = 5
Residency = Literal["together", "in turn"]
# Where units run: LiteRT's CompiledModel on the CPU or the GPU; "auto" is the GPU for those units that pass their
# self-test there, and LiteRT's interpreter for the others. None is the interpreter, in this process.
Placing = Literal["cpu", "gpu", "auto"]

log = logging.getLogger(__name__)


class Cancelled(Exception):
    """A caller's `progress` returned False."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        example, examples: the example that is being made, from 0, of so many.
        step, steps: how many steps of it are done, of so many.
        latent: after that step; None for a program of one call.
    """

    example: int
    examples: int
    step: int
    steps: int
    latent: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a unit runs, "cpu" or "gpu", and the reason where "auto" did not take the GPU."""

    accelerator: str
    reason: str = ""


def read_size(text: str) -> tuple[int, int]:
    """The (height, width) of "96x64". Raises `BundleError` where it is no such text."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise BundleError(f"{text!r} is no image size; write height and width, as in 96x64")
    return int(match[1]), int(match[2])


def check_manifest(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder, absolute. Raises `BundleError` where it holds no manifest.json, and says where there is one."""
    path = pathlib.Path(folder).absolute()
    if not (path / "manifest.json").is_file():
        inside = path / "export" / "bundle"  # where `snapgen export` writes the bundle of a run
        hint = f"; its bundle is {inside}" if (inside / "manifest.json").is_file() else ""
        raise BundleError(f"{folder} holds no manifest.json, so it is not an export bundle{hint}")
    return path


class Bundle:
    """A bundle's folder: its manifest, and its files by name.

    No name leads out of the folder. Links are followed: a snapshot of the Hugging Face hub is links into its cache.
    A packed network is unpacked when it is first asked for, into a folder where later starts find it.

    Args:
        folder: the bundle.
        size: (height, width) of the images; None for the bundle's own.
        cache: the folder of unpacked networks; None for `<bundle>.unpacked` beside it.
        unpacking: is told (unit, bytes written, bytes in all) of a network that is unpacked; False ends it (`Stopped`).

    Attributes:
        manifest: what manifest.json says; its units as they are at the size.
        program: what the program of that size says, program.json for the bundle's own.
        sizes: names of the image sizes to choose from, "96x64"; empty where there is only the bundle's own.
        golden_folder: where the golden data of the size lies.
        placed: {unit: where it runs}, of those that were loaded last.

    Raises:
        BundleError: this is no bundle, or one without the size.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        size: tuple[int, int] | None = None,
        *,
        cache: str | pathlib.Path | None = None,
        unpacking: Callable[[str, int, int], Any] | None = None,
    ) -> None:
        self.folder = check_manifest(folder)
        self._cache, self._unpacking = pathlib.Path(cache or f"{self.folder}.unpacked"), unpacking
        self.placed: dict[str, Placed] = {}
        self.manifest = self.json("manifest.json")
        if missing := {"schema", "precisions", "units", "files"} - self.manifest.keys():
            raise BundleError(f"manifest.json lacks {', '.join(sorted(missing))}")
        self.schema = self.manifest["schema"]
        if type(self.schema) is not int or self.schema < 1:
            raise BundleError(f"manifest.json has schema {self.schema!r}; a whole number from 1 was expected")
        if self.schema > PACKED_SCHEMA:
            raise BundleError(
                f"this bundle is newer than its client: manifest.json has schema {self.schema}, and this client knows "
                f"1 to {PACKED_SCHEMA}. Update snapgen-jax, or run the client.py that lies in the bundle"
            )
        program = self._at(size)
        if self.schema == 1:
            self.program = parse(from_schema_1(self.json("scheduler.json")))
        else:
            data = self.json(program)
            self.program = parse(from_schema_2(data) if self.schema == 2 else data)

    def _at(self, size: tuple[int, int] | None) -> str:
        """Makes this bundle that of an image size; returns the name of its program."""
        described = self.manifest.get("sizes", {})
        self.sizes, self.golden_folder = tuple(described), "golden"
        if size is None:
            return "program.json"
        name = "x".join(map(str, size))
        if name not in described:
            known = f"it has {', '.join(described)}" if described else "it has its own alone; leave out the size"
            raise BundleError(f"no image size {name} in this bundle; {known}")
        if missing := {"program", "golden", "units"} - described[name].keys():
            raise BundleError(f"the size {name} in manifest.json lacks {', '.join(sorted(missing))}")
        self.golden_folder = described[name]["golden"]
        units = self.manifest["units"]
        units = {unit: {**units[unit], **described[name]["units"].get(unit, {})} for unit in units}
        self.manifest = {**self.manifest, "units": units}
        return described[name]["program"]

    def file(self, name: str) -> pathlib.Path:
        """The path of a file that the manifest or a caller names. Raises `BundleError` where it leaves the folder."""
        parts = pathlib.PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or pathlib.PureWindowsPath(name).drive:
            raise BundleError(f"the file name {name!r} leads out of the bundle; a name is relative and stays inside")
        path = self.folder / name
        if not path.is_file():
            raise BundleError(f"the bundle has no file {name!r}")
        return path

    def network_file(self, unit: str, precision: str) -> pathlib.Path:
        """The path of a network, which is unpacked where it is packed.

        Raises:
            BundleError: it has not as many bytes as the manifest says, or it cannot be unpacked.
        """
        described = self.manifest["units"][unit]
        name = described["files"][precision]
        path = self.file(name)
        found, expected = path.stat().st_size, self.manifest["files"].get(name, {}).get("bytes")
        if expected is not None and found != expected:
            raise BundleError(
                f"the bundle's file {name!r} is damaged: it has {found:,} bytes, and manifest.json says {expected:,}. "
                "Copy it again; `python verify.py` in the bundle checks every file"
            )
        whole = described.get("packed", {}).get(precision)
        told = self._unpacking and functools.partial(self._unpacking, unit)
        return path if whole is None else unpacked(path, whole, self._cache, told)

    def json(self, name: str) -> dict[str, Any]:
        """The object that a file of JSON holds. Raises `BundleError` where it holds none."""
        try:
            data = json.loads(self.file(name).read_text("utf-8"))
        except ValueError as error:
            raise BundleError(f"{name} is not readable JSON: {error}") from error
        if not isinstance(data, dict):
            raise BundleError(f"{name} holds a {type(data).__name__}; an object was expected")
        return data

    def golden_facts(self) -> dict[str, Any]:
        """What golden.json says."""
        return self.json(f"{self.golden_folder}/golden.json")

    def golden(self, name: str) -> np.ndarray:
        """One golden array, read without pickle."""
        return np.load(self.file(f"{self.golden_folder}/{name}.npy"), allow_pickle=False)

    def sampler(
        self,
        precision: str = "f32",
        num_threads: int | None = None,
        *,
        residency: Residency = "together",
        accelerator: Placing | None = None,
        trying: bool = True,
    ) -> Sampler:
        """The units of one precision on LiteRT.

        Args:
            precision: of the weights.
            num_threads: of LiteRT's CPU kernels; None leaves the choice to it.
            residency: units are loaded "together" now, or "in turn", each when it is called and only until one of
                another file is, so that the largest file is all that memory must hold.
            accelerator: see `Placing`.
            trying: whether a unit on "cpu" or "gpu" must first pass its self-test.

        Raises:
            AcceleratorError: a unit does not run on "cpu" or "gpu", or computes something else there.
        """
        if precision not in self.manifest["precisions"]:
            known = ", ".join(self.manifest["precisions"])
            raise BundleError(f"no precision {precision!r} in this bundle; it has {known}")
        if residency not in ("together", "in turn"):
            raise ValueError(f"units are loaded 'together' or 'in turn'; got {residency!r}")
        if accelerator not in (None, "cpu", "gpu", "auto"):
            raise ValueError(f"the accelerator is 'cpu', 'gpu' or 'auto', or None; got {accelerator!r}")
        described, self.placed = self.manifest["units"], {}
        loaded: MutableMapping[pathlib.Path, Any] = weakref.WeakValueDictionary()  # for as long as a unit needs it
        load = {
            name: functools.partial(self._load, name, precision, num_threads, accelerator, trying, loaded)
            for name in described
        }
        files = {name: unit["files"][precision] for name, unit in described.items()}
        units = in_turn(load, files) if residency == "in turn" else {name: make() for name, make in load.items()}
        shapes = {
            name: {tensor: details["shape"] for tensor, details in unit["inputs"].items()}
            for name, unit in described.items()
        }
        return Sampler(self.program, units, shapes)

    def _load(
        self,
        name: str,
        precision: str,
        num_threads: int | None,
        accelerator: Placing | None,
        trying: bool,
        loaded: MutableMapping[pathlib.Path, Any],
    ) -> Unit:
        path, signature = self.network_file(name, precision), self.manifest["units"][name]["signature"]
        if accelerator in ("cpu", "gpu"):
            made = CompiledUnit(path, signature, accelerator, num_threads)
            if trying and name not in self.placed:
                self._hold(name, precision, made, accelerator)
            self.placed[name] = Placed(accelerator)
            return made
        if accelerator == "auto" and self.placed.get(name, Placed("gpu")).accelerator == "gpu":
            try:
                return self._on_gpu(name, precision, path, signature)
            except AcceleratorError as error:
                self.placed[name] = Placed("cpu", str(error))
                log.warning("%s runs on the CPU: %s", name, error)
        self.placed.setdefault(name, Placed("cpu"))
        return litert_unit(path, signature, num_threads, loaded)

    def _on_gpu(self, name: str, precision: str, path: pathlib.Path, signature: str) -> Unit:
        """A unit on the GPU, if that is worth it and right."""
        unit = self.manifest["units"][name]
        if any(details["dtype"] == "int32" for details in unit["inputs"].values()):
            raise AcceleratorError("it reads token ids, and no GPU looks them up in a table")
        if unit.get("cpu_only"):
            raise AcceleratorError("it has branches, which no GPU runs")
        made = CompiledUnit(path, signature, "gpu")
        if made.software:
            raise AcceleratorError("the only GPU is a driver in software, which is slower than the CPU")
        if name not in self.placed:
            self._hold(name, precision, made, "gpu")
        self.placed[name] = Placed("gpu")
        return made

    def _hold(self, name: str, precision: str, unit: Unit, accelerator: str) -> None:
        """Raises `AcceleratorError` where a unit does not compute its recorded call."""
        error, limit = self.self_test(name, precision, unit)
        if not error <= limit:
            found = f"off by {error:.3g}" if np.isfinite(error) else "NaN or infinity"
            raise AcceleratorError(
                f"{name} in {precision} fails its self-test on LiteRT's {accelerator.upper()}: what it gives for the "
                f"recorded call is {found} (relative L2); at most {limit:.3g} is accepted"
            )

    def self_test(self, name: str, precision: str, unit: Unit) -> tuple[float, float]:
        """How far a unit is off at its recorded call, and how far it may be: relative L2; infinite for NaN.

        Raises:
            BundleError: the bundle has no recorded calls.
        """
        described = self.manifest["units"][name]
        limits = self.golden_facts().get("self_test")
        if limits is None:
            raise BundleError("this bundle has no recorded calls to try an accelerator with; export it anew")
        inputs = {n: self.golden(f"self_test/{name}/inputs/{n}") for n in described["inputs"]}
        outputs = unit(**inputs)
        pairs = {n: self.golden(f"self_test/{name}/outputs/{n}") for n in described["outputs"]}
        return max(relative_l2(outputs[n], expected) for n, expected in pairs.items()), limits[precision]

    def tokenize(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The inputs that the bundle's tokenizers make of prompts, `{name: [N, L]}`."""
        if not self.program.tokenizers:
            raise ValueError(f"this bundle takes no prompts; its inputs are {', '.join(self.program.inputs) or 'none'}")
        return token_inputs(self.program, prompts, self.file)


def token_inputs(
    program: Flow | FeedForward, prompts: Sequence[str], file: Callable[[str], pathlib.Path]
) -> dict[str, np.ndarray]:
    """What a program's tokenizers make of prompts, `{input: [N, L]}`; `file` is where the file of a name lies."""
    made = {}
    for entry in program.tokenizers:
        (length,) = program.inputs[entry.tokens].shape
        made[entry.tokens], mask = tokenize(file(entry.file), prompts, entry, length)
        if entry.mask:
            made[entry.mask] = mask
    return made


def tokenize(
    tokenizer_json: str | pathlib.Path, prompts: Sequence[str], frame: Tokenizer, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 `[N, L]` and mask float32 `[N, L]` of prompts. Needs the `tokenizers` library.

    The frame, an entry of program.json, says what stands around the ids: begin, ids, end, padding; the mask is 1 up to
    the end. A prompt that is too long loses its last ids, not the end.

    Raises:
        ValueError: a prompt holds half of a character, as a command line does that is not UTF-8.
    """
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"the prompt {prompt!a} is no text: it was not UTF-8; write it in UTF-8")
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("prompts need the tokenizers library (pip install tokenizers); token ids do not") from error
    model = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    room = length - len(frame.begin) - len(frame.end)
    tokens = np.full((len(prompts), length), frame.pad, np.int32)
    mask = np.zeros((len(prompts), length), np.float32)
    for row, prompt in enumerate(prompts):
        ids = [*frame.begin, *model.encode(prompt, add_special_tokens=False).ids[:room], *frame.end]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return tokens, mask


def in_turn(load: Mapping[str, Callable[[], Unit]], files: Mapping[str, str]) -> dict[str, Unit]:
    """Units that are loaded when they are called, and freed when one of another file is. `files`: {unit: its file}."""
    held: dict[str, Unit] = {}

    def call(name: str, **arrays: np.ndarray) -> Mapping[str, np.ndarray]:
        if name not in held:
            if any(files[other] != files[name] for other in held):
                held.clear()  # first: two at once would be what this avoids
            held[name] = load[name]()
        return held[name](**arrays)

    return {name: functools.partial(call, name) for name in load}


class LiteRTGenerator:
    """A bundle on LiteRT; with prompts, it has the interface of the JAX generator.

    Args:
        bundle: the folder.
        precision: of the weights, one of the bundle's: "f32", "f16", "int8".
        num_threads: of LiteRT's CPU kernels; None leaves the choice to it.
        residency: whether all units are in memory "together", or are loaded and freed "in turn"; manifest.json says
            how much memory either takes.
        accelerator: see `Placing`; `generator.bundle.placed` says where each unit runs, and why.
        size: (height, width) of the images, one of the manifest's `sizes`; None for the bundle's own.
        cache, unpacking: of packed networks, see `Bundle`.

    Raises:
        AcceleratorError: a unit does not run on "cpu" or "gpu", or computes something else there.
    """

    def __init__(
        self,
        bundle: str | pathlib.Path,
        *,
        precision: str = "f32",
        num_threads: int | None = None,
        residency: Residency = "together",
        accelerator: Placing | None = None,
        size: tuple[int, int] | None = None,
        cache: str | pathlib.Path | None = None,
        unpacking: Callable[[str, int, int], Any] | None = None,
    ) -> None:
        self.bundle = Bundle(bundle, size, cache=cache, unpacking=unpacking)
        self.program = self.bundle.program
        self.sampler = self.bundle.sampler(precision, num_threads, residency=residency, accelerator=accelerator)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        progress: Callable[[Progress], Any] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """The output "image" of prompts, `uint8 [N, H, W, 3]`.

        Image n depends on (seed, indices[n], prompts[n]) alone, and is that of the JAX generator but for rounding.
        Indices default to 0..N-1; they and the seed are whole numbers from 0 to 2**32 - 1, see noise.py. `options` are
        those of `sampler.with_options`: steps, guidance, method, guidance_interval. `progress` is called after each
        step; where it returns False, no more is done.

        Raises:
            Cancelled: `progress` returned False.
            ValueError: the inputs do not fit together, or a seed or an index is out of bounds.
        """
        if "image" not in self.program.outputs:
            raise ValueError(f"this bundle makes {', '.join(self.program.outputs)} and no image; use `run`")
        return self.run(self.bundle.tokenize(prompts), seed=seed, indices=indices, progress=progress, **options)[
            "image"
        ]

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        noise: Sequence[np.ndarray] | np.ndarray | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        progress: Callable[[Progress], Any] | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """All outputs of N examples, `{name: [N, ...]}`.

        Args:
            inputs: `{name: [N, ...]}`, all that program.json lists.
            noise: `[N, *noise_shape]`, of a flow; drawn from (seed, index) where none is given.
            seed, indices, progress, options: as for `generate`.
        """
        sizes = {name: len(array) for name, array in inputs.items()}
        sizes |= {} if indices is None else {"indices": len(indices)}
        sizes |= {} if noise is None else {"noise": len(noise)}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"all inputs are of the same number of examples; got {sizes}")
        count = next(iter(sizes.values()))
        if noise is None:
            noise = self._noise(seed, range(count) if indices is None else indices, options)
        made = []
        for i in range(count):
            on_step = self._on_step(i, count, progress, options)
            given = {name: array[i] for name, array in inputs.items()}
            made.append(self.sampler.run(given, noise[i], on_step=on_step, **options))
            if isinstance(self.program, FeedForward):
                on_step(0, None)
        empty = {name: np.zeros((0, *array.shape), array.dtype) for name, array in self.program.outputs.items()}
        return {name: np.stack([one[name] for one in made]) for name in empty} if made else empty

    def _on_step(
        self, example: int, examples: int, progress: Callable[[Progress], Any] | None, options: Mapping[str, Any]
    ) -> Callable[[int, np.ndarray | None], None]:
        """What the sampler calls after each step."""
        steps = len(with_options(self.program, **options).times) - 1 if isinstance(self.program, Flow) else 1

        def on_step(step: int, latent: np.ndarray | None) -> None:
            if progress is not None and progress(Progress(example, examples, step + 1, steps, latent)) is False:
                raise Cancelled(f"cancelled after step {step + 1} of {steps} of example {example + 1} of {examples}")

        return on_step

    def _noise(self, seed: int, indices: Sequence[int], options: Mapping[str, Any]) -> list[Any]:
        if isinstance(self.program, FeedForward):
            return [None for _ in indices]
        shape = with_options(self.program, **options).noise_shape()
        return [draw_noise(seed, index, shape) for index in indices]
