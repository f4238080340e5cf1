"""How the pretraining stages scale, by plan: images a second and chip at 16, 256 and 1,024 chips.

    python -m benchmarks.scaling          # some seconds: nothing is compiled

Every row follows from a step that was compiled for 16 chips (`results/plan/`), by `Plan.on`: each chip has the same
images, sums grow with the ring, and four slices of 256 exchange their sums over the data centre's network. Where a
stage was compiled at two batches, what a step costs at any number of images a chip is the straight line through both,
and the knee is where twice the images would make a chip less than a tenth faster.

Writes `results/scaling.json`.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

from snapgen_jax.parallel.chips import Roofline, chip_of
from snapgen_jax.parallel.plan import Plan, topology

PLANS = pathlib.Path(__file__).parent / "results" / "plan"
RESULT = pathlib.Path(__file__).parent / "results" / "scaling.json"
STAGES = {"256 px": "t2i_256-v5e_4x4-b256", "512 px": "t2i_512-v5e_4x4-b128", "1024 px": "t2i_1024-v5e_4x4-b64"}
SMALL = {"256 px": "t2i_256-v5e_4x4-b64"}  # the same steps at fewer images a chip
PLACES = ("v5e:4x4", "v5e:16x16", "4*v5e:16x16", "v6e:4x4", "v6e:16x16", "4*v6e:16x16")
Row = dict[str, Any]


def stored(name: str) -> Plan:
    """A plan as `snapgen plan --json` wrote it."""
    return Plan.from_json(json.loads((PLANS / f"{name}.json").read_text())[0])


def rows() -> list[Row]:
    """A row a stage and place, with its milliseconds at the chip's peaks."""
    found = []
    for (stage, name), place in itertools.product(STAGES.items(), PLACES):
        plan = stored(name).on(topology(place)) if place != "v5e:4x4" else stored(name)
        found.append(
            {
                "stage": stage,
                "place": place,
                "chips": plan.chips,
                "batch": plan.global_batch,
                "fits": plan.fits,
                "ms": {part: 1e3 * seconds for part, seconds in plan.roofline.times.items()},
                "bound": plan.roofline.bound,
                "images_per_second_per_chip": plan.examples_per_second / plan.chips,
            }
        )
    return found


def line(few: Plan, many: Plan) -> tuple[Roofline, Roofline]:
    """What a step needs beside its images, and of each image on a chip; between the two plans, a straight line."""
    counts = [plan.global_batch / plan.devices for plan in (few, many)]
    per_image, fixed = [], []
    for field in ("flops", "bytes_accessed", "wire_bytes"):
        low, high = (float(getattr(plan.roofline, field)) for plan in (few, many))
        slope = (high - low) / (counts[1] - counts[0])
        per_image.append(slope)
        fixed.append(max(low - counts[0] * slope, 0.0))
    chip = chip_of(few.chip)
    return Roofline(chip, *fixed), Roofline(chip, *per_image)


def rate(fixed: Roofline, image: Roofline, images: float) -> tuple[float, str]:
    """Images a second of a chip that has so many in each step, and what bounds the step."""
    needs = [getattr(fixed, f) + images * getattr(image, f) for f in ("flops", "bytes_accessed", "wire_bytes")]
    step = Roofline(fixed.chip, *needs)
    return images / step.seconds, step.bound


def knee(fixed: Roofline, image: Roofline) -> int:
    """The fewest images a chip, a power of two, of which twice as many make a chip less than a tenth faster."""
    return next(n for n in (2**k for k in range(12)) if rate(fixed, image, 2 * n)[0] < 1.1 * rate(fixed, image, n)[0])


def batches() -> list[Row]:
    """Of each stage that was compiled twice: images a second and chip by images on a chip, and the knee."""
    found = []
    for stage, name in SMALL.items():
        if not (PLANS / f"{name}.json").exists():
            continue
        fixed, image = line(stored(name), stored(STAGES[stage]))
        by_count = {}
        for images in (1, 2, 4, 8, 16, 32):
            speed, bound = rate(fixed, image, images)
            by_count[str(images)] = {"images_per_second_per_chip": speed, "bound": bound}
        found.append(
            {
                "stage": stage,
                "chip": fixed.chip.name,
                "fixed_gigabytes": fixed.bytes_accessed / 1e9,
                "gigabytes_an_image": image.bytes_accessed / 1e9,
                "images_a_chip": by_count,
                "knee": knee(fixed, image),
            }
        )
    return found


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| stage | place | images a chip | arithmetic | HBM | links | network | images/s a chip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        ms = {part: f"{value:.0f} ms" for part, value in row["ms"].items()}
        ms[row["bound"]] = f"**{ms[row['bound']]}**"
        cells = [row["stage"], row["place"], f"{row['batch'] / row['chips']:g}", ms["compute"], ms["hbm"], ms["links"]]
        cells += [ms.get("network", ""), f"{row['images_per_second_per_chip']:,.0f}" if row["fits"] else "does not fit"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Writes the result, and prints the table."""
    found = {"rows": rows(), "batches": batches()}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found["rows"]))
    for row in found["batches"]:
        speeds = ", ".join(f"{n}: {at['images_per_second_per_chip']:.0f}" for n, at in row["images_a_chip"].items())
        print(f"\n{row['stage']}, {row['chip']}: images/s a chip by images a chip: {speeds}; knee at {row['knee']}")


if __name__ == "__main__":
    main()
