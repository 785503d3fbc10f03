#!/usr/bin/env bash
# Several processes of one run on this machine, as on several hosts:
#   launch/local.sh 2 posttrain train configs/sft.yaml --mesh.fsdp 8
# On CPU each process emulates its share of the mesh's devices. Ctrl-C and SIGTERM reach every process.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    echo "usage: launch/local.sh PROCESSES COMMAND ..." >&2
    exit 2
fi
count=$1
shift
free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
export JAX_COORDINATOR_ADDRESS="localhost:$(python3 -c "$free_port")" JAX_NUM_PROCESSES=$count
pids=()
for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID=$i "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT
status=0
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    # A trapped signal ends `wait` early: wait again for the process itself.
    while kill -0 "$pid" 2>/dev/null; do
        code=0
        wait "$pid" || code=$?
    done
    [ "$code" -eq 0 ] || status=$code
done
exit "$status"
