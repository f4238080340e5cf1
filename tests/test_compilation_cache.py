"""What `snapgen` compiles is kept for the next run, and so is what XLA measured on a GPU to choose its kernels."""

import os
import pathlib
import subprocess
import sys

CODE = """
from snapgen_jax import cli
cli._keep_compiled_programs()
import jax
from jax._src import compiler
options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
print(jax.config.jax_compilation_cache_dir)
print(options.executable_build_options.debug_options.xla_gpu_per_fusion_autotune_cache_dir)
"""


def test_programs_and_the_tuning_of_kernels_are_kept_in_one_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**environment, "XDG_CACHE_HOME": str(tmp_path)},
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    programs, tuning = done.stdout.splitlines()[-2:]
    assert programs == str(tmp_path / "snapgen_jax" / "xla")
    assert tuning == f"{programs}/xla_gpu_per_fusion_autotune_cache_dir"
