"""What a process is told before JAX loads."""

import subprocess
import sys

from snapgen_jax import process


def test_huge_pages_are_asked_for_where_the_system_gives_them_on_request(tmp_path, monkeypatch):
    switch = tmp_path / "enabled"
    monkeypatch.setattr(process, "HUGE_PAGES", switch)
    switch.write_text("always [madvise] never\n")
    assert process.settings({"JAX_PLATFORMS": ""}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert process.settings({"JAX_PLATFORMS": "", "GLIBC_TUNABLES": "glibc.malloc.check=1"}) == {
        "GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    }
    switch.write_text("[always] madvise never\n")
    assert process.settings({"JAX_PLATFORMS": ""}) == {}


def test_what_a_person_has_set_stays(tmp_path, monkeypatch):
    switch = tmp_path / "enabled"
    switch.write_text("always [madvise] never\n")
    monkeypatch.setattr(process, "HUGE_PAGES", switch)
    assert process.settings({"JAX_PLATFORMS": "tpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == {}


def test_jax_is_told_that_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(process, "DEVICES", ())
    assert process.settings({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}) == {"JAX_PLATFORMS": "cpu"}


def test_a_process_starts_again_with_its_arguments_and_settings():
    code = "import os, sys; from snapgen_jax import process; process.settings = lambda e: "
    code += "{} if 'GLIBC_TUNABLES' in e else {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}; process.prepare(); "
    code += "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    out = subprocess.run(
        [sys.executable, "-c", code, "one", "two words"], env={}, capture_output=True, text=True, check=True
    )
    assert out.stdout.split("\n")[0] == "glibc.malloc.hugetlb=1 ['one', 'two words']"
