"""GKE through xpk: the image with the code, a workload that restarts after preemptions.

    python -m launch.gke create --topology=v5e:4x4 --name=t2i-256 --cluster=CLUSTER --zone=ZONE --project=PROJECT \\
        --image=us-docker.pkg.dev/PROJECT/snapgen/train --config=configs/pretrain/t2i_256.py --workdir=gs://BUCKET/RUN
    python -m launch.gke mount  --mount=BUCKET --cluster=CLUSTER --zone=ZONE --project=PROJECT    # once: as /mnt/BUCKET
    python -m launch.gke logs   --name=t2i-256 --cluster=CLUSTER --zone=ZONE --project=PROJECT
    python -m launch.gke delete --name=t2i-256 --cluster=CLUSTER --zone=ZONE --project=PROJECT

Checked against the parser of xpk 1.16.0 (https://github.com/AI-Hypercomputer/xpk) on 2026-11-21.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from launch.job import (
    AGAIN,
    HOPELESS,
    Chips,
    LaunchError,
    Shell,
    add_job,
    bucket_of,
    flags,
    job_in_bucket,
    main_of,
    parser,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of this launcher."""
    made = parser(__doc__)
    made.add_argument("action", choices=("create", "mount", "logs", "delete"))
    made.add_argument("--project", required=True)
    made.add_argument("--zone", required=True)
    made.add_argument("--cluster", required=True)
    made.add_argument("--topology", help="v5e:4x4, or 2*v5e:4x4 for two slices")
    made.add_argument("--mount", help="a bucket of shards that every workload sees as /mnt/BUCKET, to read")
    made.add_argument("--image", help="where the image goes, without a tag")
    made.add_argument("--priority", default="medium", choices=("very-low", "low", "medium", "high", "very-high"))
    made.add_argument("--max_restarts", type=int, default=100, help="after preemptions and lost hosts")
    made.add_argument("--flags", help="set under launch/flags (default: the chip's)")
    return made


def run(argv: Sequence[str]) -> None:
    """Parses and does what is asked."""
    made = build_parser()
    if "create" in argv:
        add_job(made)
    elif "mount" not in argv:
        made.add_argument("--name", required=True, help="of the job")
    options, rest = made.parse_known_args(argv)
    shell = Shell(options.dry_run)
    where = [f"--project={options.project}", f"--zone={options.zone}", f"--cluster={options.cluster}"]
    if options.action == "create":
        create(options, rest, shell, where)
    elif rest:
        raise LaunchError(f"unknown arguments {' '.join(rest)}")
    elif options.action == "mount":
        attach(options, shell, where)
    elif options.action == "logs":
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
        shell.run(
            ["kubectl", "logs", "--follow", "--tail=100", selector], "the first host prints; the others when they end"
        )
    else:
        shell.run(["xpk", "workload", "delete", f"--workload={options.name}", *where, "--force"])


def attach(options: argparse.Namespace, shell: Shell, where: Sequence[str]) -> None:
    """Lets all workloads of a cluster see a bucket."""
    if not options.mount:
        raise LaunchError("give --mount, the bucket of the shards")
    bucket = bucket_of(options.mount)
    kept = ("metadata-cache:ttl-secs:-1", "metadata-cache:stat-cache-max-size-mb:-1", "implicit-dirs")
    shell.run(
        [
            *("xpk", "storage", "attach", bucket, "--type=gcsfuse", *where),
            *(f"--bucket={bucket}", f"--mount-point=/mnt/{bucket}", "--readonly=true", "--size=1", "--auto-mount=true"),
            f"--mount-options={','.join(kept)}",
        ],
        "once for a cluster that was made with --enable-gcsfuse-csi-driver",
    )


def create(options: argparse.Namespace, rest: Sequence[str], shell: Shell, where: Sequence[str]) -> None:
    """Builds and pushes the image, and submits the workload."""
    if not options.topology or not options.image:
        raise LaunchError("give --topology (v5e:4x4 say) and --image (us-docker.pkg.dev/PROJECT/REPOSITORY/NAME)")
    job, chips = job_in_bucket(options, rest), Chips.parse(options.topology)
    image = f"{options.image}:{job.name}"
    shell.run(["docker", "build", f"--tag={image}", "--build-arg=EXTRAS=tpu", "."], "the image with the code")
    shell.run(["docker", "push", image])
    # xpk restarts a workload after exit codes 42 and 127 to 255, and after those named here.
    shell.run(
        [
            "xpk",
            "workload",
            "create",
            f"--workload={job.name}",
            *where,
            f"--tpu-type={chips.accelerator}",
            f"--num-slices={chips.slices}",
            f"--docker-image={image}",
            f"--priority={options.priority}",
            f"--max-restarts={options.max_restarts}",
            f"--restart-on-exit-codes={','.join(map(str, AGAIN))}",
            "--termination-grace-period-seconds=300",
            f"--env=LIBTPU_INIT_ARGS={flags(options.flags or chips.kind)}",
            f"--command={shlex.join(job.command())}",
        ],
        f"{chips.slices} x {chips.accelerator}; gives up after exit codes {' and '.join(map(str, HOPELESS))}",
    )


if __name__ == "__main__":
    sys.exit(main_of(run))
