"""What a process should be told before JAX loads; `snapgen` asks for it first."""

from __future__ import annotations

import glob
import os
import pathlib
import sys
import time

# Where any of these exists an accelerator may be attached.
DEVICES = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES_TUNABLE = "glibc.malloc.hugetlb=1"


def settings(environment: dict[str, str]) -> dict[str, str]:
    """Environment variables that this machine wants and `environment` does not hold.

    - `JAX_PLATFORMS=cpu` where no accelerator is in sight: libtpu, installed to compile for pods, complains otherwise.
    - `GLIBC_TUNABLES` with huge pages where the system gives them only to programs that ask. XLA on CPU allocates its
      temporaries anew at every step; with small pages a part of each goes into page faults
      (`python -m benchmarks.huge_pages`).
    """
    wanted = {}
    if "JAX_PLATFORMS" not in environment and not any(glob.glob(pattern) for pattern in DEVICES):
        wanted["JAX_PLATFORMS"] = "cpu"
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" not in tunables and HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text():
        wanted["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, HUGE_PAGES_TUNABLE]))
    return wanted


def began() -> float:
    """When this process began, on the clock of `time.monotonic`."""
    import psutil

    return time.monotonic() - (time.time() - psutil.Process().create_time())


def prepare() -> None:
    """Applies `settings`. glibc reads its tunables at the start of a process alone, so the process may start again."""
    wanted = settings(dict(os.environ))
    os.environ.update(wanted)
    if "GLIBC_TUNABLES" in wanted and sys.platform == "linux":
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
