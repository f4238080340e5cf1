"""TPU VMs by queued resources: ask for them, ship the code, start on every host, go on after a preemption.

    python -m launch.tpu_vm create --topology=v5e:4x4 --name=t2i-256 --zone=us-west4-a --project=PROJECT --spot \\
        --config=configs/pretrain/t2i_256.py --workdir=gs://BUCKET/t2i_256
    python -m launch.tpu_vm watch  ...            # the same arguments: makes the VMs anew when they are taken away
    python -m launch.tpu_vm logs   --name=t2i-256 --zone=us-west4-a --project=PROJECT
    python -m launch.tpu_vm stop   --name=t2i-256 --zone=us-west4-a --project=PROJECT    # saves, and does not restart
    python -m launch.tpu_vm delete --name=t2i-256 --zone=us-west4-a --project=PROJECT

Checked against `gcloud compute tpus queued-resources --help` of Google Cloud SDK 528.0.0 and
https://cloud.google.com/tpu/docs/queued-resources on 2026-11-21. TPU7x is to be had through GKE alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence

from launch.job import (
    AGAIN,
    HOPELESS,
    Chips,
    Job,
    LaunchError,
    Shell,
    add_job,
    bucket_of,
    flags,
    job_in_bucket,
    main_of,
    parser,
)

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
LOOK_SECONDS = 60
GONE = ("", "FAILED", "SUSPENDED")


def build_parser() -> argparse.ArgumentParser:
    """The parser of this launcher."""
    made = parser(__doc__)
    made.add_argument("action", choices=("create", "watch", "logs", "stop", "delete"))
    made.add_argument("--project", required=True)
    made.add_argument("--zone", required=True)
    made.add_argument("--topology", help="v5e:4x4, or 2*v5e:4x4 for two slices")
    tier = made.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="cheap, and may be taken away")
    tier.add_argument("--reserved", action="store_true", help="from the project's reservation")
    made.add_argument("--service_account", help="of the VMs; it needs to read and write the workdir's bucket")
    made.add_argument("--mount", help="a bucket of shards that every host sees as /mnt/BUCKET, to read")
    made.add_argument("--flags", help="set under launch/flags (default: the chip's)")
    return made


class TpuVm:
    """One queued resource, and the commands about it."""

    def __init__(self, options: argparse.Namespace, shell: Shell):
        self.options, self.shell = options, shell
        self.where = [f"--project={options.project}", f"--zone={options.zone}"]

    def queued(self, verb: str, *rest: str) -> list[str]:
        """A command about the queued resource."""
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.options.name, *self.where, *rest]

    def ship(self, code: str) -> None:
        """Puts the committed tree where the VMs fetch it."""
        archive = f"/tmp/{self.options.name}.tar.gz"
        self.shell.run(["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"], "the committed code")
        self.shell.run(["gcloud", "storage", "cp", archive, code])

    def create(self, job: Job, chips: Chips, code: str) -> None:
        """Asks for the VMs; they start the job themselves."""
        if chips.kind not in RUNTIMES:
            raise LaunchError(f"Cloud TPU gives {chips.kind} through GKE alone: use python -m launch.gke")
        options = self.options
        metadata = {
            "snapgen-code": code,
            "snapgen-command": shlex.join(job.command(chips.hosts)),
            "snapgen-flags": flags(options.flags or chips.kind),
            **({"snapgen-mount": bucket_of(options.mount)} if options.mount else {}),
        }
        if any("|" in value for value in metadata.values()):
            raise LaunchError("an argument of the job holds '|', which separates metadata; take it out")
        many = [f"--node-count={chips.slices}", f"--node-prefix={job.name}"]
        command = self.queued(
            "create",
            *([f"--node-id={job.name}"] if chips.slices == 1 else many),
            f"--accelerator-type={chips.accelerator}",
            f"--runtime-version={RUNTIMES[chips.kind]}",
            *(["--spot"] if options.spot else ["--reserved"] if options.reserved else []),
            *([f"--service-account={options.service_account}"] if options.service_account else []),
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            "--metadata=^|^" + "|".join(f"{name}={value}" for name, value in metadata.items()),
            "--metadata-from-file=startup-script=launch/startup.sh",
        )
        self.shell.run(command, f"{chips.slices} x {chips.accelerator}: {chips.hosts} hosts")

    def state(self, dry: str = "ACTIVE") -> str:
        """WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, FAILED, SUSPENDING, SUSPENDED; "" if there is none."""
        return self.shell.ask(self.queued("describe", "--format=value(state.state)"), dry=dry)

    def wait(self) -> None:
        """Waits until the VMs are there."""
        print("# until it says ACTIVE")
        while (state := self.state()) != "ACTIVE":
            if state in GONE:
                raise LaunchError(
                    f"the request ended as {state or 'nothing'}; see {shlex.join(self.queued('describe'))}"
                )
            print(f"# {state}", flush=True)
            time.sleep(LOOK_SECONDS)

    def delete(self) -> None:
        """Gives the VMs back."""
        self.shell.run(self.queued("delete", "--force", "--quiet"), "gives the VMs back; the workdir stays")

    def on_hosts(self, command: str, worker: str) -> list[str]:
        """A command on one host or on all."""
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", self.options.name, *self.where]
        return [*ssh, f"--worker={worker}", f"--command={command}"]


def run(argv: Sequence[str]) -> None:
    """Parses and does what is asked."""
    made = build_parser()
    if set(argv) & {"create", "watch"}:
        add_job(made)
    else:
        made.add_argument("--name", required=True, help="of the job")
    options, rest = made.parse_known_args(argv)
    vm = TpuVm(options, Shell(options.dry_run))
    if options.action in ("create", "watch"):
        if options.topology is None:
            raise LaunchError("give --topology, v5e:4x4 say; `snapgen plan` tells whether the job fits it")
        job, chips = job_in_bucket(options, rest), Chips.parse(options.topology)
        code = f"{options.workdir.rstrip('/')}/code/{job.name}.tar.gz"
    elif rest:
        raise LaunchError(f"unknown arguments {' '.join(rest)}")
    match options.action:
        case "create":
            vm.ship(code)
            vm.create(job, chips, code)
            vm.wait()
        case "watch":
            watch(vm, job, chips, code)
        case "logs":
            vm.shell.run(vm.on_hosts("sudo journalctl --unit=snapgen --follow --lines=100", "0"))
        case "stop":
            vm.shell.run(vm.on_hosts("sudo systemctl stop snapgen", "all"), "SIGTERM on every host: saves and ends")
        case "delete":
            vm.delete()


def watch(vm: TpuVm, job: Job, chips: Chips, code: str) -> None:
    """Makes the VMs anew whenever they are gone, until interrupted; the new ones go on where the old ones saved."""
    print(f"# exit codes {AGAIN} restart on the hosts themselves; {HOPELESS} stop there")
    while True:
        state = vm.state(dry="SUSPENDED")
        if state in GONE:
            if state:
                vm.delete()
            vm.create(job, chips, code)
        if vm.shell.dry_run:
            return
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    sys.exit(main_of(run))
