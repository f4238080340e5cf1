"""From a laptop to hosts with accelerators: TPU VMs, GKE, SLURM, and several processes on this machine.

Each is a program, `python -m launch.tpu_vm --help`, and takes `--dry-run`, which prints the exact commands.
"""
