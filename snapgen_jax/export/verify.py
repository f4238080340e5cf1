"""Checks an export bundle with numpy and ai-edge-litert alone: `python verify.py`, in the bundle's folder.

Every file against its size and SHA-256, every signature against the manifest, and the golden examples: what the
encoders give, the latent after each step of the sampler, and the outputs. This file is copied into every bundle.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import pathlib
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

import numpy as np

if __package__:
    from snapgen_jax.export.client import MANIFEST_SCHEMA, PACKED_SCHEMA, Bundle, read_size
    from snapgen_jax.export.program import BundleError, Flow
    from snapgen_jax.export.runtime import AcceleratorError
    from snapgen_jax.export.sampler import Arrays, Contexts, Sampler, Unit, relative_l2
else:  # beside its own copy of the client, in a bundle; each may be a link into a store of blobs
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent))
    from client import MANIFEST_SCHEMA, PACKED_SCHEMA, Bundle, read_size  # type: ignore[import-not-found]
    from program import BundleError, Flow  # type: ignore[import-not-found]
    from runtime import AcceleratorError  # type: ignore[import-not-found]
    from sampler import Arrays, Contexts, Sampler, Unit, relative_l2  # type: ignore[import-not-found]

# Relative L2 of latents that float32 arithmetic alone, in another order, may be off by.
REPLAY = 1e-5


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, what was found and expected, and whether it holds."""

    name: str
    finding: str
    passed: bool


def grey_levels(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Absolute differences of two uint8 images, int."""
    return np.abs(image.astype(int) - reference.astype(int))


def checks(
    folder: str | pathlib.Path,
    precisions: Sequence[str] | None = None,
    num_threads: int | None = None,
    accelerator: Literal["cpu", "gpu"] | None = None,
    cache: str | pathlib.Path | None = None,
) -> Iterator[Check]:
    """Checks a bundle, one finding at a time.

    Args:
        folder: the bundle.
        precisions: those to run; all that it has where none is given.
        num_threads: of LiteRT's CPU kernels.
        accelerator: None for LiteRT's interpreter, "cpu" or "gpu" for its CompiledModel, as on phones.
        cache: the folder of unpacked networks, see `client.Bundle`.
    """
    bundle = Bundle(folder, cache=cache)
    if bundle.schema not in (MANIFEST_SCHEMA, PACKED_SCHEMA):
        raise BundleError(f"this bundle is of schema {bundle.schema}; check it with the verify.py that lies in it")
    files = list(_files(bundle))
    yield from files
    if not all(check.passed for check in files):
        return  # nothing that a damaged file computes is worth looking at
    unpacked = list(_unpacked(bundle, precisions or bundle.manifest["precisions"]))
    yield from unpacked
    if not all(check.passed for check in unpacked):
        return
    yield from _token_ids(bundle)
    yield from _at_size(bundle, precisions, num_threads, accelerator)
    for name in bundle.sizes:
        if (other := Bundle(folder, read_size(name), cache=cache)).golden_folder != bundle.golden_folder:
            for check in _at_size(other, precisions, num_threads, accelerator):
                yield dataclasses.replace(check, name=f"{name}: {check.name}")


def _at_size(
    bundle: Bundle,
    precisions: Sequence[str] | None,
    num_threads: int | None,
    accelerator: Literal["cpu", "gpu"] | None,
) -> Iterator[Check]:
    """All but the files and the tokens, at one image size."""
    yield from _replays(bundle)
    for precision in precisions or bundle.manifest["precisions"]:
        yield from _signatures(bundle, precision)
        try:
            sampler = bundle.sampler(precision, num_threads, accelerator=accelerator, trying=False)
            yield from _self_test(bundle, sampler, precision)
            yield from _golden(bundle, sampler, precision, accelerator)
        except AcceleratorError as error:
            yield Check(f"{precision} on the accelerator {accelerator}", str(error), False)


def _files(bundle: Bundle) -> Iterator[Check]:
    for name, expected in bundle.manifest["files"].items():
        try:
            path = bundle.file(name)
        except BundleError as error:
            yield Check(f"file {name}", str(error), False)
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        same = digest == expected["sha256"] and size == expected["bytes"]
        finding = f"{size} bytes, sha256 {digest[:12]}"
        if not same:
            finding += f"; expected {expected['bytes']} bytes, sha256 {expected['sha256'][:12]}"
        yield Check(f"file {name}", finding, same)


def _unpacked(bundle: Bundle, precisions: Sequence[str]) -> Iterator[Check]:
    """Packed networks, unpacked, against the checksum of the file that the exporter packed."""
    for name, unit in bundle.manifest["units"].items():
        for precision in unit.get("packed", {}).keys() & precisions:
            try:
                path = bundle.network_file(name, precision)
            except BundleError as error:
                yield Check(f"{precision} {name} unpacked", str(error), False)
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            finding = f"{path}: {path.stat().st_size} bytes, sha256 {digest[:12]}"
            same = digest == unit["packed"][precision]["sha256"]
            finding += "" if same else "; it is damaged: remove it, and it is unpacked again"
            yield Check(f"{precision} {name} unpacked", finding, same)


def _token_ids(bundle: Bundle) -> Iterator[Check]:
    """Only where the program takes prompts and the `tokenizers` library is installed."""
    prompts = bundle.golden_facts()["prompts"]
    if not prompts or importlib.util.find_spec("tokenizers") is None:
        return
    same = all(np.array_equal(made, bundle.golden(f"inputs/{name}")) for name, made in bundle.tokenize(prompts).items())
    yield Check("tokenizer", f"{len(prompts)} prompts to the golden ids", same)


def _replays(bundle: Bundle) -> Iterator[Check]:
    """The sampler alone: the golden outputs of the denoiser lead to the golden latents."""
    if not isinstance(bundle.program, Flow):
        return
    predictions = bundle.golden("predictions")
    for i in range(len(predictions)):
        name, expected = f"golden {i} replayed from the denoiser's outputs", bundle.golden("latents")[i]
        try:
            latents = _replay(bundle, bundle.program, i, predictions[i])
            worst = max(relative_l2(*pair) for pair in zip(latents, expected, strict=True))
        except (ValueError, IndexError) as error:  # the program takes other steps than those that are there
            yield Check(name, str(error), False)
            continue
        yield _below(name, worst, REPLAY)


def _replay(bundle: Bundle, flow: Flow, i: int, predictions: np.ndarray) -> np.ndarray:
    """The latents of example i from what its denoiser gave, `[calls, 2, *latent_shape]`."""
    asked: list[list[np.ndarray]] = [[]]

    def denoiser(**_: np.ndarray) -> Arrays:
        out = predictions[len(asked) - 1, len(asked[-1])]
        asked[-1].append(out)
        return {"prediction": out}

    units = bundle.manifest["units"]
    shapes = {name: {n: d["shape"] for n, d in unit["inputs"].items()} for name, unit in units.items()}
    given = {name: bundle.golden(f"inputs/{name}")[i] for name in bundle.program.inputs}
    sampler = Sampler(flow, {step.unit: denoiser for step in flow.steps}, shapes)
    own = sampler.given(given)
    contexts: Contexts = {None: own, **{name: {**own, **_encoded(bundle, name, i)} for name in flow.contexts}}
    return sampler.trajectory(bundle.golden("noise")[i], contexts, contexts, on_call=lambda *_: asked.append([]))


def _encoded(bundle: Bundle, context: str, i: int) -> Arrays:
    """What the encoders of a context gave for example i."""
    prefix = f"{bundle.golden_folder}/contexts/{context}/"
    names = [name[len(prefix) : -len(".npy")] for name in bundle.manifest["files"] if name.startswith(prefix)]
    return {name: bundle.golden(f"contexts/{context}/{name}")[i] for name in names}


def _self_test(bundle: Bundle, sampler: Sampler, precision: str) -> Iterator[Check]:
    """One recorded call of each unit: what a client runs when it starts."""
    for name, unit in sampler.units.items():
        error, limit = bundle.self_test(name, precision, unit)
        yield _below(f"{precision} {name} self-test", error, limit)


def _signatures(bundle: Bundle, precision: str) -> Iterator[Check]:
    from ai_edge_litert.interpreter import Interpreter

    for name, unit in bundle.manifest["units"].items():
        interpreter = Interpreter(model_path=str(bundle.network_file(name, precision)))
        found = interpreter.get_signature_list()
        if unit["signature"] not in found:
            yield Check(f"{precision} {name} signature", f"has {sorted(found)}, not {unit['signature']!r}", False)
            continue
        runner = interpreter.get_signature_runner(unit["signature"])
        for kind, details in (("inputs", runner.get_input_details()), ("outputs", runner.get_output_details())):
            have = {n: ([int(size) for size in d["shape"]], np.dtype(d["dtype"]).name) for n, d in details.items()}
            want = {n: (list(d["shape"]), d["dtype"]) for n, d in unit[kind].items()}
            finding = f"{', '.join(sorted(have))}" if have == want else f"has {have}; the manifest says {want}"
            yield Check(f"{precision} {name} {kind}", finding, have == want)


def _golden(bundle: Bundle, plain: Sampler, precision: str, accelerator: str | None) -> Iterator[Check]:
    facts, bad = bundle.golden_facts(), set()
    limits = facts["tolerances"][precision]
    if accelerator == "gpu":
        limits = _widened(limits, facts["gpu_factor"][precision])
    watched = {name: _watched(name, unit, bad) for name, unit in plain.units.items()}
    sampler = Sampler(bundle.program, watched, plain.shapes)
    for i in range(facts["examples"]):
        example = f"{precision} golden {i}"
        try:
            yield from _example(bundle, sampler, i, example, limits)
        except ValueError as error:  # the program asks for other arrays than those that are there
            yield Check(example, str(error), False)
    # A picture hides them: NaN becomes a grey level like any other.
    finding = f"NaN or infinity in {', '.join(sorted(bad))}" if bad else "no NaN or infinity"
    yield Check(f"{precision} every output of every unit", finding, not bad)


def _widened(limits: dict, factor: float) -> dict:
    """The tolerances of a GPU, whose calls may be off by a factor more. Grey levels are rounded, and stay."""
    outputs = {
        name: {kind: value * factor if kind == "rel_l2" else value for kind, value in limit.items()}
        for name, limit in limits["outputs"].items()
    }
    if "latents" not in limits:
        return {"outputs": outputs}
    contexts = {name: factor * limit for name, limit in limits["contexts"].items()}
    return {"outputs": outputs, "contexts": contexts, "latents": [factor * limit for limit in limits["latents"]]}


def _watched(unit_name: str, unit: Unit, bad: set[str]) -> Unit:
    """The same function; adds to `bad` the outputs that hold NaN or infinity."""

    def run(**inputs: np.ndarray) -> Arrays:
        outputs = dict(unit(**inputs))
        bad.update(f"{unit_name}'s {name}" for name, array in outputs.items() if not np.isfinite(array).all())
        return outputs

    return run


def _example(bundle: Bundle, sampler: Sampler, i: int, example: str, limits: dict) -> Iterator[Check]:
    inputs = {name: bundle.golden(f"inputs/{name}")[i] for name in bundle.program.inputs}
    if isinstance(bundle.program, Flow):
        made = yield from _flow(bundle, bundle.program, sampler, inputs, i, example, limits)
    else:
        made = sampler.run(inputs)
    for name, limit in limits["outputs"].items():
        expected = bundle.golden(f"outputs/{name}")[i]
        if "rel_l2" in limit:
            yield _below(f"{example} {name}", relative_l2(made[name], expected), limit["rel_l2"])
            continue
        levels = grey_levels(made[name], expected)
        if "max_grey" in limit:
            yield _below(f"{example} {name}, largest grey level difference", levels.max(), limit["max_grey"])
        else:
            root = float(np.sqrt(np.mean(levels**2)))
            yield _below(f"{example} {name}, rms grey level difference", root, limit["rms_grey"])


def _flow(
    bundle: Bundle, flow: Flow, sampler: Sampler, inputs: Arrays, i: int, example: str, limits: dict
) -> Generator[Check, None, Arrays]:
    """Checks contexts and latents of example i on the way to its outputs, which it returns."""
    given = sampler.given(inputs)
    contexts = sampler.contexts(given)
    for context, limit in limits["contexts"].items():
        names = [name for name in contexts[context] if name not in inputs]
        errors = [relative_l2(contexts[context][n], bundle.golden(f"contexts/{context}/{n}")[i]) for n in names]
        yield _below(f"{example} context {context}", max(errors, default=0.0), limit)
    guided = any(step.guided for step in flow.steps)
    null = sampler.null_contexts(given) if guided else {}
    latents = sampler.trajectory(bundle.golden("noise")[i], contexts, null)
    errors = [relative_l2(x, y) for x, y in zip(latents, bundle.golden("latents")[i], strict=True)]
    worst = int(np.argmax(np.array(errors) / limits["latents"]))
    yield _below(f"{example} latent after step {worst + 1}", errors[worst], limits["latents"][worst])
    return sampler.decode(latents[-1])


def _below(name: str, value: float, limit: float) -> Check:
    return Check(name, f"{value:.3g}, at most {limit:.3g}", bool(value <= limit))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each finding. Returns 0 where all hold, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Check an export bundle with numpy and ai-edge-litert.")
    parser.add_argument("folder", nargs="?", default=pathlib.Path(__file__).parent, help="default: beside this file")
    parser.add_argument("--precision", action="append", help="f32, f16 ...; default: all in the bundle")
    parser.add_argument("--threads", type=int, help="threads of LiteRT's CPU kernels")
    parser.add_argument(
        "--accelerator",
        choices=("cpu", "gpu"),
        help="run on LiteRT's CompiledModel, as phones do, each unit in a process of its own; default: its interpreter",
    )
    parser.add_argument("--cache", help="folder of unpacked networks; default: <bundle>.unpacked beside the bundle")
    arguments = parser.parse_args(argv)
    failed: list[str] = []
    count = 0
    try:
        chosen = arguments.precision, arguments.threads, arguments.accelerator, arguments.cache
        for check in checks(arguments.folder, *chosen):
            count += 1
            if not check.passed:
                failed.append(check.name)
            print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.finding}")
    except BundleError as error:
        print(f"FAIL  {error}")
        return 1
    names = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{count - len(failed)} of {count} checks passed{names}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
