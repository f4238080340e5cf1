"""What XLA is told in tests, and in the processes that they start."""

import importlib.metadata

# On a busy machine eight devices on two cores may wait long for each other; XLA would abort the process after 40 s.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=240"
# With these a training step compiles in 6.6 s of CPU in place of 17.8; without `jax_disable_most_optimizations` in 34.
QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")


def xla_flags(devices=1):
    """So many fake devices, and programs that are quick to compile."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", PATIENT, *QUICK])


def quick_environment(devices=1):
    """Variables for a process that compiles large programs and runs them a few times."""
    return {"XLA_FLAGS": xla_flags(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
