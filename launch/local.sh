#!/usr/bin/env bash
# Several processes of one run on this machine, as on several hosts:
#   launch/local.sh [--logs DIR] [--dry-run] 2 posttrain train configs/sft.yaml --mesh.fsdp 8
# On CPU each process emulates its share of the mesh's devices. On GPUs each would take all of them: use one process, or
# srun or mpirun, which share them out. Ctrl-C and SIGTERM reach every process, once. With --logs each writes to its own
# file. Ends with 2 if a process was given wrong input, otherwise with the first failure's code.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
logs='' dry_run=''
while true; do
    case ${1:-} in
        --logs) logs=$(value "$@"); shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        *) break ;;
    esac
done
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh [--logs DIR] [--dry-run] PROCESSES COMMAND ..." >&2
    exit 2
fi
count=$1
shift
free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
port=PORT
[ "$dry_run" ] || port=$(python3 -c "$free_port")
export JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES=$count
if [ "$dry_run" ]; then
    for ((i = 0; i < count; i++)); do
        line=$(quote env "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" "JAX_NUM_PROCESSES=$count" "JAX_PROCESS_ID=$i" "$@")
        echo "$line${logs:+ >>$logs/process-$i.log 2>&1}"
    done
    exit 0
fi
[ -z "$logs" ] || mkdir -p "$logs"
set -m # each in a process group of its own, so that a terminal's Ctrl-C comes once: from this script
pids=() told='' passed=''
tell() { # a signal that comes while the processes are being started waits until all are
    told=$1
    [ ${#pids[@]} -eq "$count" ] || return 0
    passed=yes
    kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'tell TERM' TERM
trap 'tell INT' INT
for ((i = 0; i < count; i++)); do
    if [ "$logs" ]; then
        JAX_PROCESS_ID=$i "$@" >>"$logs/process-$i.log" 2>&1 &
    else
        JAX_PROCESS_ID=$i "$@" &
    fi
    pids+=($!)
done
if [ "$told" ] && [ -z "$passed" ]; then tell "$told"; fi
status=0
for pid in "${pids[@]}"; do
    wait_out "$pid"
    if [ "$code" -eq 2 ] || [ "$status" -eq 0 ]; then
        status=$code
    fi
done
exit "$status"
