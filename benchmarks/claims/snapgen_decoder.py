"""SnapGen's decoder (arXiv 2412.09619, section 3.2), on photographs: what GroupNorm and the adversarial term give it.

Everything is trained on tiles of photographs that scikit-image and scikit-learn ship, and scored on tiles of others.
The adversary joins after a fifth of the run, and the learning rate stays as it is, so that there is training left for
it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

from benchmarks.claims.claim import Claim, Metric, better
from benchmarks.claims.trials import Draw, Effort, Trial
from benchmarks.decoder import HELD_OUT, TRAINED_ON, write_tiles

PSNR, COLOUR_SHIFT, FRECHET = (f"reconstruction.tiny.{name}" for name in ("psnr", "colour_shift", "frechet"))
METRICS = {
    PSNR: Metric("PSNR", margin=0.1, digits=2),
    COLOUR_SHIFT: Metric("colour shift, grey levels", margin=0.1, smaller=True, digits=2),
    FRECHET: Metric("Frechet of tiles", margin=0.0005, smaller=True, digits=4),
}
TILES = pathlib.Path("runs/photographs")
UPDATES = {"short": 1_900, "night": 10_000}
EFFORT = {"ci": Effort(), **{budget: Effort(updates, 3) for budget, updates in UPDATES.items()}}
SHARED = {budget: Effort(effort.updates) for budget, effort in EFFORT.items()}
PLAIN = {"quick": ""}  # these configs have no other form of these names


def on_photographs(*changes: str) -> Callable[[str], Sequence[str]]:
    """Overrides that put tiles of photographs in the place of rendered scenes; the tiles are made when asked for."""

    def overrides(arg: str) -> Sequence[str]:
        for split, names in (("train", TRAINED_ON), ("held_out", HELD_OUT)):
            if not (TILES / split).exists():
                write_tiles(names, TILES / split)
        source = [f"data.path={TILES / 'train'}", "data.source=folder", "data.captions=none", "data.flip=random"]
        apart = [f"data.validation_path={TILES / 'held_out'}"]
        began = 4 if arg == "runlocal" else UPDATES["short"] // 5
        rate = ["optimizer.schedule=constant", "loss.adversarial=0.5", f"loss.adversarial_from_steps={began}"]
        return [*source, *apart, *rate, "evaluation.every_steps=0", *changes]

    return overrides


DRAWS = {"": Draw(evaluators=("reconstruction",))}
ENCODED = {"inputs.codec.workdir": "autoencoder"}
TRIALS = {
    "autoencoder": Trial("autoencoder", SHARED, on_photographs(), draws={}, shared=True, args=PLAIN),
    "tiny": Trial("tiny_decoder", EFFORT, on_photographs(), ENCODED, DRAWS, args=PLAIN),
    "no GroupNorm": Trial("tiny_decoder", EFFORT, on_photographs("decoder.norm=none"), ENCODED, DRAWS, args=PLAIN),
    "no adversary": Trial("tiny_decoder", EFFORT, on_photographs("loss.adversarial=0.0"), ENCODED, DRAWS, args=PLAIN),
}

CLAIMS = (
    Claim("GroupNorm keeps the colours of photographs", (better("tiny", "no GroupNorm", COLOUR_SHIFT),)),
    Claim("the adversarial term makes tiles nearer to real ones", (better("tiny", "no adversary", FRECHET),)),
)
