"""The student of the shapes world with its teacher: the same UNet and as many updates as `student.py`.

    snapgen train --config=configs/shapes/student_distilled.py --workdir=runs/student_distilled \
        --config.text_workdir=runs/clip --config.teacher.workdir=runs/teacher

Fourth stage of `chain.py`. Machine: one GPU, or two CPU cores for some hours. Metric: `score.overall`, above that of
`student.py`.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick" for the chain of twenty minutes; "runlocal" for a few seconds."""
    here = pathlib.Path(__file__)
    teacher = runpy.run_path(str(here.with_name("teacher.py")))
    c = runpy.run_path(str(here.with_name("student.py")))["get_config"](arg)
    c.recipe = "distillation"
    architecture = teacher["mmdit"](arg)
    c.teacher = ConfigDict({"workdir": "runs/teacher", "mmdit": architecture, "prediction": c.prediction})
    c.student_taps = ("up_0",)
    c.teacher_taps = (f"block_{architecture.depth - 1:02d}",)
    return c
