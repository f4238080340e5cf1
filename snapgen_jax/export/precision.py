"""Float16 weights: the file a phone downloads.

TensorFlow's own float16 mode is not used. It also rounds small tables, such as frequencies, and the error of a denoiser
then grows with the time; casting the weights of the matrix products alone keeps it flat.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from typing import Literal

Precision = Literal["f32", "f16"]
PRECISIONS: tuple[Precision, ...] = ("f32", "f16")


def cast_float16(source: str | pathlib.Path, target: str | pathlib.Path) -> pathlib.Path:
    """Casts the weights of convolutions and matrix products of a float32 `.tflite` file to float16.

    A DEQUANTIZE before each use keeps the arithmetic, the inputs and the outputs float32; a GPU fuses it away. Biases,
    norms and tables stay float32.

    Args:
        source: a float32 file, made by either backend.
        target: the file to write.

    Returns:
        `target`.
    """
    from ai_edge_quantizer import qtyping, quantizer, recipe_manager

    job = quantizer.Quantizer(str(source))
    job.add_weight_only_config(
        regex=".*",
        operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
        num_bits=16,
        algorithm_key=recipe_manager.AlgorithmName.FLOAT_CASTING,
    )
    target = pathlib.Path(target)
    silence = io.StringIO()  # it prints progress bars and a summary of sizes
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        job.quantize().export_model(str(target), overwrite=True)
    target.chmod(0o644)  # it marks the file as a program
    return target
