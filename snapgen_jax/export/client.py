"""A client of an export bundle: from a prompt or token ids to an image, with numpy and ai-edge-litert alone.

This file is copied into every bundle, and is the one place that says how a bundle is read and how its sampler runs; the
exporter runs the same code over JAX functions to make the golden values. It imports nothing of the library it lies in.

    generator = LiteRTGenerator("bundle")
    images = generator.generate(["two red circles left of a blue square"])   # uint8 [1, H, W, 3]; needs `tokenizers`

scheduler.json, schema 1 (all arithmetic in float32, arrays channels last):

    kind            "flow_matching": x_t = (1 - t) x_0 + t noise, and the sampler follows v = dx/dt
    prediction      {"kind": "velocity"}: the denoiser gives v. {"kind": "x_0", "t_min"}: it gives the clean latent, and
                    v = (x_t - x_0) / max(t, t_min)
    method          "euler", "heun" or "renoise", the step rule of `step`
    times           [S + 1] from 1 (noise) to 0 (data): the grid that the bundle was verified with
    shift           s of t' = s t / (1 + (s - 1) t), which makes a grid of another number of steps
    guidance        w of v = v_null + w (v_prompt - v_null); 1 needs no second call
    latent_shape    [h, w, c]
    image_shape     [H, W, 3]
    time_features   {"dim", "scale", "max_period", "order": "cos,sin"}: the denoiser's input "time", see `time_features`
    codec           {"kind": "identity" | "patch", "scale", "shift", ...}: latents to pixels in [-1, 1], see `decode`;
                    or {"kind": "network"}, where the unit "decoder" does it
    text            {"length", "null_tokens" [L], "null_mask" [L]}: token ids of a prompt and of the empty prompt
    units           {"denoiser": name, "text_encoder": name, and maybe "decoder": name}: which `.tflite` files play
                    which part

The denoiser takes "latent" [1, h, w, c] and "time" [1, dim], and those of "sequence", "mask" and "pooled" that it
names; it gives "prediction". The text encoder takes "tokens" and "mask" [1, L], and gives "sequence" and "pooled". The
decoder takes "latent" and gives "image" [1, H, W, 3], pixels in [-1, 1] that may leave them a little.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SCHEMA = 1
METHODS = ("euler", "heun", "renoise")
PREDICTIONS = ("velocity", "x_0")
# The function of one file: named arrays of batch 1 in, named arrays out.
Unit = Callable[..., Mapping[str, np.ndarray]]
Arrays = dict[str, np.ndarray]


class BundleError(ValueError):
    """The folder is not a bundle that this client can run, or not the one that was written."""


# --- the sampler -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """scheduler.json, checked. The fields are described at the top of this file."""

    prediction: Mapping[str, Any]
    method: str
    times: np.ndarray
    shift: float
    guidance: float
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    time_features: Mapping[str, Any]
    codec: Mapping[str, Any]
    text: Mapping[str, Any]
    units: Mapping[str, str]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Scheduler:
        """Reads the contents of scheduler.json. Raises `BundleError` that names what is missing or unknown."""
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in ("schema", "kind", *names) if name not in data]
        if missing:
            raise BundleError(f"scheduler.json lacks {', '.join(missing)}")
        for name, known in (("schema", (SCHEMA,)), ("kind", ("flow_matching",)), ("method", METHODS)):
            if data[name] not in known:
                raise BundleError(f"scheduler.json: {name} is {data[name]!r}; this client knows {known}")
        kind, order = data["codec"].get("kind"), data["time_features"].get("order")
        prediction = data["prediction"].get("kind")
        if prediction not in PREDICTIONS:
            raise BundleError(f"scheduler.json: the prediction is {prediction!r}; this client knows {PREDICTIONS}")
        if kind not in CODECS and kind != "network":
            raise BundleError(f"scheduler.json: the codec is {kind!r}; this client knows {(*CODECS, 'network')}")
        if kind == "network" and "decoder" not in data["units"]:
            raise BundleError("scheduler.json: the codec is a network, and `units` names no decoder")
        if order != "cos,sin":
            raise BundleError(f"scheduler.json: time features in the order {order!r}; this client knows 'cos,sin'")
        if len(data["times"]) < 2 or len(data["text"]["null_tokens"]) != data["text"]["length"]:
            raise BundleError(
                "scheduler.json: `times` needs two entries at least, `null_tokens` as many as `length` says"
            )
        values = {name: data[name] for name in names}
        values["times"] = np.asarray(data["times"], np.float32)
        values["latent_shape"], values["image_shape"] = tuple(data["latent_shape"]), tuple(data["image_shape"])
        return cls(**values)

    def noise_shape(self, steps: int | None = None, method: str | None = None) -> tuple[int, ...]:
        """Of the noise of one image: `[h, w, c]`; `[S, h, w, c]`, what is begun with and then mixed in before each
        further step, where the method is "renoise"."""
        if (self.method if method is None else method) != "renoise":
            return self.latent_shape
        return len(self.grid(steps)) - 1, *self.latent_shape

    def grid(self, steps: int | None = None) -> np.ndarray:
        """The times of `steps` steps; those of the bundle where none is given. float32 `[steps + 1]`."""
        if steps is None or steps == len(self.times) - 1:
            return self.times
        if steps < 1:
            raise ValueError(f"a sample needs at least one step, got {steps}")
        t = np.linspace(1.0, 0.0, steps + 1)
        return (self.shift * t / (1 + (self.shift - 1) * t)).astype(np.float32)


def time_features(t: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """Cosines, then sines, of `scale t` at dim / 2 frequencies from 1 towards 1 / max_period. `[B] -> [B, dim]`."""
    half = spec["dim"] // 2
    step = np.float32(-np.log(spec["max_period"]) / half)
    frequencies = np.exp(step * np.arange(half, dtype=np.float32))
    angles = (np.float32(spec["scale"]) * np.asarray(t, np.float32))[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def as_velocity(out: np.ndarray, x: np.ndarray, t: np.float32, prediction: Mapping[str, Any]) -> np.ndarray:
    """The velocity at x, from what the denoiser gave there."""
    if prediction["kind"] == "velocity":
        return out
    return (x - out) / np.maximum(np.float32(t), np.float32(prediction["t_min"]))


def step(
    velocity: Callable[[np.ndarray, np.float32], np.ndarray],
    x: np.ndarray,
    t,
    s,
    method: str,
    noise: np.ndarray | None = None,
) -> np.ndarray:
    """One step from time t to time s.

    euler:    x_s = x_t + (s - t) v(x_t, t)
    heun:     y   = x_t + (s - t) v(x_t, t),   x_s = x_t + (s - t) (v(x_t, t) + v(y, s)) / 2
    renoise:  x_0 = x_t - t v(x_t, t),         x_s = (1 - s) x_0 + s noise,   noise fresh; none at s = 0
    """
    h = np.float32(s - t)
    v = velocity(x, t)
    if method == "renoise":
        x_0 = x - np.float32(t) * v
        return x_0 if noise is None else (1 - np.float32(s)) * x_0 + np.float32(s) * noise
    if method == "heun":
        v = (v + velocity(x + h * v, s)) / np.float32(2)
    return x + h * v


def decode(latents: np.ndarray, codec: Mapping[str, Any]) -> np.ndarray:
    """Latents `[h, w, c]` to an image `uint8 [H, W, 3]`, by a codec that is no network."""
    return grey_levels(CODECS[codec["kind"]](latents.astype(np.float32), codec))


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] to the nearest of 0..255, those outside clipped."""
    return np.round(np.clip(pixels * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def _identity(latents: np.ndarray, codec: Mapping[str, Any]) -> np.ndarray:
    """Latents are normalised pixels."""
    return latents / np.float32(codec["scale"]) + np.float32(codec["shift"])


def _patch(latents: np.ndarray, codec: Mapping[str, Any]) -> np.ndarray:
    """Latents are the orthonormal DCT-II of p x p patches; channel = (vertical * p + horizontal) * 3 + colour."""
    p, (h, w, _) = codec["patch"], latents.shape
    frequency, position = np.mgrid[:p, :p]
    dct = np.sqrt(2 / p) * np.cos(np.pi * (position + 0.5) * frequency / p)
    dct[0] /= np.sqrt(2)
    gain = codec["scale"] * np.reshape(codec["frequency_scale"], (p, p, 1))
    coefficients = latents.reshape(h, w, p, p, 3) / gain.astype(np.float32)
    # [h, w, vertical, horizontal, colour] -> [h, row in patch, w, column in patch, colour]
    pixels = np.einsum("hwklc,kr,ls->hrwsc", coefficients, dct.astype(np.float32), dct.astype(np.float32))
    return pixels.reshape(h * p, w * p, 3) + np.float32(codec["shift"])


CODECS = {"identity": _identity, "patch": _patch}


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sampler loop over two units, wherever they run: LiteRT interpreters in a client, JAX while exporting.

    Attributes:
        scheduler: what scheduler.json says.
        units: {unit name: function}.
        inputs: {unit name: names of its inputs}.
    """

    scheduler: Scheduler
    units: Mapping[str, Unit]
    inputs: Mapping[str, Sequence[str]]

    def run(self, role: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Runs the unit that plays a role with those of `arrays` that it takes."""
        name = self.scheduler.units[role]
        missing = [needed for needed in self.inputs[name] if needed not in arrays]
        if missing:
            raise BundleError(f"the {role} {name!r} needs {', '.join(missing)}; there is only {', '.join(arrays)}")
        return dict(self.units[name](**{needed: arrays[needed] for needed in self.inputs[name]}))

    def encode(self, tokens: np.ndarray, mask: np.ndarray) -> Arrays:
        """Token ids and mask `[L]` to the text inputs of the denoiser: sequence `[1, L, D]`, mask, pooled `[1, P]`."""
        arrays = {"tokens": np.asarray(tokens, np.int32)[None], "mask": np.asarray(mask, np.float32)[None]}
        return {"mask": arrays["mask"], **self.run("text_encoder", arrays)}

    def encode_null(self) -> Arrays:
        """The context of the empty prompt, which guidance starts from."""
        return self.encode(self.scheduler.text["null_tokens"], self.scheduler.text["null_mask"])

    def trajectory(
        self,
        noise: np.ndarray,
        context: Arrays,
        null: Arrays,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        method: str | None = None,
    ) -> np.ndarray:
        """The latent after each step, `[S, h, w, c]` float32.

        Args:
            noise: `noise_shape` float32, standard normal.
            context, null: of `encode` and `encode_null`.
            steps, guidance, method: in place of the bundle's own.
        """
        w = np.float32(self.scheduler.guidance if guidance is None else guidance)
        method = self.scheduler.method if method is None else method
        if method not in METHODS:
            raise ValueError(f"unknown sampling method {method!r}; expected one of {', '.join(METHODS)}")

        def velocity(x: np.ndarray, t: np.float32) -> np.ndarray:
            features = time_features(np.full(1, t), self.scheduler.time_features)
            arrays = {"latent": x[None], "time": features}
            v = as_velocity(
                self.run("denoiser", {**context, **arrays})["prediction"][0], x, t, self.scheduler.prediction
            )
            if w == 1:
                return v
            out = self.run("denoiser", {**null, **arrays})["prediction"][0]
            v_null = as_velocity(out, x, t, self.scheduler.prediction)
            return v_null + w * (v - v_null)

        noise, latents = np.asarray(noise, np.float32), []
        expected = self.scheduler.noise_shape(steps, method)
        if noise.shape != expected:
            raise ValueError(f"the noise has shape {noise.shape}; the method {method!r} takes {expected}")
        x, *later = noise if method == "renoise" else (noise,)
        intervals = itertools.pairwise(self.scheduler.grid(steps))
        for (t, s), fresh in itertools.zip_longest(intervals, later):
            x = step(velocity, x, t, s, method, fresh)
            latents.append(x)
        return np.stack(latents)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """A latent `[h, w, c]` to an image `uint8 [H, W, 3]`."""
        if self.scheduler.codec["kind"] != "network":
            return decode(latent, self.scheduler.codec)
        return grey_levels(self.run("decoder", {"latent": latent[None].astype(np.float32)})["image"][0])


# --- the bundle ------------------------------------------------------------------------------------------------------


class Bundle:
    """A bundle's folder: its manifest, and its files by name. No name leads out of the folder."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        self.folder = pathlib.Path(folder).resolve()
        if not (self.folder / "manifest.json").is_file():
            raise BundleError(f"{folder} holds no manifest.json, so it is not an export bundle")
        self.manifest = self._json("manifest.json")
        if missing := {"schema", "precisions", "units", "files"} - self.manifest.keys():
            raise BundleError(f"manifest.json lacks {', '.join(sorted(missing))}")
        if self.manifest.get("schema") != SCHEMA:
            raise BundleError(f"manifest.json has schema {self.manifest.get('schema')!r}; this client knows {SCHEMA}")
        self.scheduler = Scheduler.parse(self._json("scheduler.json"))

    def file(self, name: str) -> pathlib.Path:
        """The path of a file that the manifest or a caller names. Raises `BundleError` where it leaves the folder."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder) or "\\" in name:
            raise BundleError(f"the file name {name!r} leads out of the bundle; a name is relative and stays inside")
        if not path.is_file():
            raise BundleError(f"the bundle has no file {name!r}")
        return path

    def _json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads(self.file(name).read_text("utf-8"))
        except ValueError as error:
            raise BundleError(f"{name} is not readable JSON: {error}") from error
        if not isinstance(data, dict):
            raise BundleError(f"{name} holds a {type(data).__name__}; an object was expected")
        return data

    def golden(self, name: str) -> np.ndarray:
        """One golden array, read without pickle."""
        return np.load(self.file(f"golden/{name}.npy"), allow_pickle=False)

    def sampler(self, precision: str = "f32", num_threads: int | None = None) -> Sampler:
        """Loads the units of one precision into LiteRT."""
        if precision not in self.manifest["precisions"]:
            raise BundleError(f"no precision {precision!r} in this bundle; it has {self.manifest['precisions']}")
        described = self.manifest["units"]
        units = {
            name: litert_unit(self.file(unit["files"][precision]), unit["signature"], num_threads)
            for name, unit in described.items()
        }
        return Sampler(self.scheduler, units, {name: tuple(unit["inputs"]) for name, unit in described.items()})


def tokenize(
    tokenizer_json: str | pathlib.Path, prompts: Sequence[str], text: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 `[N, L]` and mask float32 `[N, L]` of prompts. Needs the `tokenizers` library.

    A prompt is framed as the empty one is, which scheduler.json holds: BOS, ids, EOS, padding; the mask is 1 up to EOS.
    One that is too long loses its end, not its EOS.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("prompts need the tokenizers library (pip install tokenizers); token ids do not") from error
    model = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    length, (bos, eos) = text["length"], text["null_tokens"][:2]
    tokens = np.full((len(prompts), length), text["null_tokens"][-1], np.int32)
    mask = np.zeros((len(prompts), length), np.float32)
    for row, prompt in enumerate(prompts):
        ids = [bos, *model.encode(prompt, add_special_tokens=False).ids[: length - 2], eos]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return tokens, mask


def litert_unit(path: pathlib.Path, signature: str, num_threads: int | None = None) -> Unit:
    """The function of one `.tflite` file on LiteRT's CPU."""
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_path=str(path), num_threads=num_threads).get_signature_runner(signature)


def draw_noise(seed: int, index: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise from (seed, index), float32.

    NumPy's Philox, keyed with both numbers. It is this client's own choice: JAX draws other numbers from the same
    seed, so the same image needs the same noise array, as stored under golden/.
    """
    bits = np.random.Philox(key=np.array([seed, index], np.uint64))
    return np.random.Generator(bits).standard_normal(tuple(shape), dtype=np.float32)


class LiteRTGenerator:
    """Prompts to images on LiteRT, with the interface of the JAX generator.

    Args:
        bundle: the folder.
        precision: "f32" or "f16", where the bundle has it.
        num_threads: of LiteRT's CPU kernels; None leaves the choice to it.
    """

    def __init__(self, bundle: str | pathlib.Path, *, precision: str = "f32", num_threads: int | None = None) -> None:
        self.bundle = Bundle(bundle)
        self.scheduler = self.bundle.scheduler
        self.sampler = self.bundle.sampler(precision, num_threads)
        self._null: Arrays | None = None

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """`uint8 [N, H, W, 3]`. Image n depends on (seed, indices[n], prompts[n]) alone; indices default to 0..N-1.

        `options` are those of `Sampler.trajectory`: steps, guidance, method.
        """
        tokens, mask = tokenize(self.bundle.file("tokenizer.json"), prompts, self.scheduler.text)
        indices = range(len(prompts)) if indices is None else indices
        shape = self.scheduler.noise_shape(options.get("steps"), options.get("method"))
        noise = [draw_noise(seed, index, shape) for index in indices]
        return self.generate_from(tokens, mask, noise, **options)

    def generate_from(
        self, tokens: np.ndarray, mask: np.ndarray, noise: Sequence[np.ndarray] | np.ndarray, **options: Any
    ) -> np.ndarray:
        """The same from token ids and mask `[N, L]` and noise `[N, *noise_shape]`."""
        if self._null is None:
            self._null = self.sampler.encode_null()
        images = []
        for ids, kept, x in zip(tokens, mask, noise, strict=True):
            context = self.sampler.encode(ids, kept)
            latents = self.sampler.trajectory(x, context, self._null, **options)
            images.append(self.sampler.decode(latents[-1]))
        return np.stack(images) if images else np.zeros((0, *self.scheduler.image_shape), np.uint8)
