#!/usr/bin/env bash
# Runs on every host of a TPU VM at each boot, as root: installs the code once, then keeps the job going as a service.
# What to run stands in the VM's metadata (see tpu_vm.py), so a VM that is made anew after a preemption goes on by itself.
# The service restarts after a failure of the infrastructure (69) and a preemption (75), and gives up where a person
# has to look: after divergence (70) and a wrong config (78). `journalctl -u snapgen` is its log.
set -euo pipefail

attribute() {
    curl -sf -H 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

code=$(attribute snapgen-code)
command=$(attribute snapgen-command)
flags=$(attribute snapgen-flags || true)
mount=$(attribute snapgen-mount || true)
home=/opt/snapgen/$(basename "$code" .tar.gz)

if [[ ! -e $home/.ready ]]; then
    mkdir -p "$home"
    gcloud storage cat "$code" | tar -xz -C "$home"
    python3 -m pip install --quiet --target /opt/snapgen/uv uv
    export UV_PYTHON_INSTALL_DIR=/opt/snapgen/python
    /opt/snapgen/uv/bin/uv venv --python '>=3.11,<3.14' "$home/.venv"
    /opt/snapgen/uv/bin/uv pip install --python "$home/.venv/bin/python" \
        --constraint "$home/requirements.lock" --editable "${home}[tpu]"
    touch "$home/.ready"
fi

# Shards are read in random order and never change: what is known of a file is kept, and no time limit drops it.
if [[ -n $mount ]] && ! mountpoint -q "/mnt/$mount"; then
    if ! command -v gcsfuse >/dev/null; then
        key=/usr/share/keyrings/cloud.google.asc
        curl -sf https://packages.cloud.google.com/apt/doc/apt-key.gpg >"$key"
        echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \
            >/etc/apt/sources.list.d/gcsfuse.list
        apt-get update -q && apt-get install -qy gcsfuse
    fi
    mkdir -p "/mnt/$mount"
    gcsfuse -o ro --implicit-dirs --type-cache-max-size-mb=-1 --stat-cache-max-size-mb=-1 \
        --kernel-list-cache-ttl-secs=-1 --metadata-cache-ttl-secs=-1 "$mount" "/mnt/$mount"
fi

systemctl reset-failed snapgen 2>/dev/null || true
systemd-run --unit=snapgen --working-directory="$home" \
    --setenv=PATH="$home/.venv/bin:$PATH" --setenv=HOME=/root --setenv=LIBTPU_INIT_ARGS="$flags" \
    --property=Restart=on-failure --property=RestartSec=30 --property=StartLimitIntervalSec=0 \
    --property=RestartPreventExitStatus='70 78' --property=TimeoutStopSec=300 \
    bash -c "exec $command"
