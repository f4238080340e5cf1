"""The student of the shapes world with its teacher.

    snapgen train --config=configs/shapes/student_distilled.py --workdir=runs/student_distilled \
        --config.inputs.text_workdir=runs/clip --config.teacher.workdir=runs/teacher --config.init_from=runs/student

A stage of `chain.py`, which starts from `student.py`'s, as the paper distils what has been trained. Without `init_from`
it learns from nothing, in as many updates as `student.py`: `benchmarks/claims/snapgen.py` sets the two side by side.
Machine: one GPU, or two CPU cores for some hours. Metric: `score.overall`, above that of `student.py`.
"""

from ml_collections import ConfigDict

from configs.shapes import student, teacher


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`."""
    c = student.get_config(arg)
    c.recipe = "distillation"
    network = teacher.architecture(arg)
    c.teacher = ConfigDict({"workdir": "runs/teacher", "network": network, "prediction": c.prediction})
    c.scaling = ConfigDict({"ratio": "none"})  # benchmarks/claims/snapgen.py trains the other too: "with ratio"
    c.feature_weight = 0.3  # features are normalised, and differ by more than velocities do
    c.student_taps = ("mid",)
    # The last block says little that its velocity does not.
    c.teacher_taps = ("mid",) if network.kind == "unet" else (f"block_{(network.depth - 1) // 2:02d}",)
    return c
