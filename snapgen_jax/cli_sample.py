"""`snapgen sample`: its options, and where its images come from: a run, a bundle or published weights."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from snapgen_jax.training.exits import ConfigError

# Options that go with some of the sources alone, and what to do with the others.
_GOES_WITH = {
    "decoder": (("workdir",), "a bundle holds the decoder that it was exported with"),
    "adapters": (("workdir",), "name the run that they adapt"),
    "encoder": (("workdir",), "a bundle holds the encoders that it was exported with"),
    "dtype": (("workdir",), "a bundle has --precision, and published weights --config.dtype"),
    "time": (("workdir", "weights"), "`snapgen bench` measures a bundle"),
    "precision": (("bundle",), "a run computes in the precision of its device; see --dtype"),
    "size": (("bundle",), "of a run, give --image_size, an option of its generator"),
    "accelerator": (("bundle",), "a run draws on the devices of JAX"),
    "cache": (("bundle",), "networks of a bundle alone are unpacked"),
}


def say_compiling(what: str) -> None:
    """Says on stderr what keeps the command silent for so long."""
    print(f"compiling {what}; a large run takes minutes, the first time ...", file=sys.stderr, flush=True)


def run_sample(options: argparse.Namespace) -> None:
    """Draws, and writes what was drawn.

    Raises:
        ConfigError: options do not go together, or the source does not draw from them.
    """
    from snapgen_jax.image_files import destination

    _check(options)
    conditions, where = _conditions(options.condition), destination(options.out)
    if options.loop and where.is_sheet:
        raise ConfigError(
            f"--loop writes a file an image; let --out={options.out} be a folder/ or a name with {{index}}"
        )
    try:
        generator, chosen = _generator(options)
        if not options.bundle:
            say_compiling("the generator")
        if options.loop:
            _loop(generator, chosen, where, options.seed)
            return
        if options.bundle and conditions:
            images = _draw_bundle(generator, options, conditions, chosen)
        else:
            given = {} if options.bundle else {"conditions": conditions}
            images = generator.generate(options.prompt or None, seed=options.seed, **chosen, **given)
            if options.time:
                from snapgen_jax.timing import time_generator

                print(time_generator(generator, options.prompt or None, conditions, options.seed, **chosen).table())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    files = where.write(images, options.prompt or _titles(conditions, len(images)))
    to = f"{files[0]}" if len(files) == 1 else f"{files[0]} ... {files[-1]}"
    print(f"wrote {len(images)} image{'s' * (len(images) > 1)} of {images.shape[2]} x {images.shape[1]} px to {to}")


def _check(options: argparse.Namespace) -> None:
    if options.overrides and not options.weights:
        raise ConfigError("--config overrides go with --weights; a run or a bundle is sampled as it was configured")
    for name, (sources, advice) in _GOES_WITH.items():
        if getattr(options, name) and not any(getattr(options, source) for source in sources):
            raise ConfigError(f"--{name} goes with --{' or --'.join(sources)}; {advice}")
    if options.loop and (options.prompt or options.condition or options.time):
        raise ConfigError("--loop reads its prompts from standard input; leave out --prompt, --condition and --time")
    if not (options.prompt or options.condition or options.loop):
        raise ConfigError("there is nothing to draw; give --prompt, or --condition where the run takes no prompts")


def _generator(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """What draws, from whichever source was named, and the options of its `generate`."""
    chosen = options.generation
    if options.bundle:
        from snapgen_jax.export.client import LiteRTGenerator
        from snapgen_jax.export.run import image_size
        from snapgen_jax.export.runtime import AcceleratorError
        from snapgen_jax.typed import Written

        placing = {"precision": options.precision, "accelerator": options.accelerator, "size": image_size(options.size)}
        placing |= {"cache": options.cache, "unpacking": say_unpacking}
        try:
            generator = LiteRTGenerator(options.bundle, **{name: how for name, how in placing.items() if how})
        except AcceleratorError as error:
            raise ConfigError(f"--accelerator={options.accelerator}: {error}") from error
        return generator, {n: value.literal if isinstance(value, Written) else value for n, value in chosen.items()}
    if options.weights:
        from snapgen_jax.config import load_config
        from snapgen_jax.generation import load_system

        overrides = [*options.overrides, *(f"{name}={value}" for name, value in chosen.items())]
        return load_system(load_config(options.config, overrides), options.weights), {}
    from snapgen_jax.generation import load

    choices = {"dtype": options.dtype} if options.dtype else {}
    choices |= {"encoders": _encoders(options.encoder)} if options.encoder else {}
    return load(options.workdir, decoder=options.decoder, adapters=options.adapters, **choices), chosen


def _encoders(named: Sequence[str]) -> dict[str, str]:
    """`{name: workdir}` of "NAME=WORKDIR"."""
    found = {name: workdir for name, _, workdir in (text.partition("=") for text in named)}
    if not all(found) or not all(found.values()):
        raise ConfigError(f"--encoder={named[0]}: give --encoder=NAME=WORKDIR")
    return found


def say_unpacking(unit: str, done: int, total: int) -> None:
    """Tells a person how far the unpacking of a network is, on one line of standard error."""
    text = f"\runpacking {unit}, once: {done / total:4.0%} of {total / 1e6:.1f} MB"
    print(text, end="\n" if done == total else "", file=sys.stderr, flush=True)


def _loop(generator: Any, chosen: dict[str, Any], where: Any, seed: int) -> None:
    """An image for each line of standard input, as it comes; what was compiled for the first draws them all. A prompt
    that cannot be drawn is said, and the next one read.

    Raises:
        ConfigError: none could be drawn, as where an option is wrong.
    """
    drawn, refused = False, False
    for index, prompt in enumerate(_lines()):
        began = time.perf_counter()
        try:
            (image,) = generator.generate([prompt], seed=seed, indices=[index], **chosen)
        except ValueError as error:
            refused = True
            said = f"{prompt}: {error}".encode("utf-8", "backslashreplace").decode()
            print(said, file=sys.stderr, flush=True)
            continue
        drawn = True
        took = time.perf_counter() - began
        print(f"{where.write_one(image, index)}  {1e3 * took:.0f} ms  {prompt}", flush=True)
    if refused and not drawn:
        raise ConfigError("none of these prompts could be drawn; the reason stands beside each")


def _lines() -> Iterator[str]:
    """The lines that are not empty. Bytes that are no UTF-8 become surrogates, as in a command's arguments: that
    prompt alone is refused."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while line := sys.stdin.readline():
        if text := line.strip():
            yield text


def _conditions(assignments: Sequence[str]) -> dict[str, Any]:
    """`{name: values [N, ...]}` of "NAME=VALUES", in which one value may stand without brackets."""
    from snapgen_jax.overrides import parse_override

    found = {}
    for text in assignments:
        path, value = parse_override(text, "--condition ")
        literal = value.literal
        found[".".join(path)] = list(literal) if isinstance(literal, list | tuple) else [literal]
    return found


def _titles(conditions: dict[str, Any], count: int) -> list[str]:
    """What each image was told, where that are numbers."""
    plain = {
        name: values for name, values in conditions.items() if not any(isinstance(v, list | tuple) for v in values)
    }
    if any(len(values) < count for values in plain.values()):  # one condition became the frames of a clip
        return [f"frame {i + 1}" for i in range(count)]
    return [", ".join(f"{name} {values[i]}" for name, values in plain.items()) for i in range(count)]


def _draw_bundle(
    generator: Any, options: argparse.Namespace, conditions: dict[str, Any], chosen: dict[str, Any]
) -> Any:
    """The images that a bundle draws from named arrays, and from prompts where there are some."""
    import numpy as np

    inputs = {name: np.asarray(values) for name, values in conditions.items()}
    texts = generator.bundle.tokenize(options.prompt) if options.prompt else {}
    try:
        outputs = generator.run({**texts, **inputs}, seed=options.seed, **chosen)
    except RuntimeError as error:  # LiteRT's, for a number that stands for nothing
        raise ConfigError(f"the bundle does not run on {', '.join(options.condition)}: {error}") from error
    if "image" not in outputs:
        raise ConfigError(f"this bundle makes {', '.join(outputs)} and no image")
    return outputs["image"]
