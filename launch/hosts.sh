#!/usr/bin/env bash
# A run on hosts that are reached by ssh, without a scheduler: one process on each.
#   launch/hosts.sh run NAME --hosts a,b,c [--port 8476] [--dir DIR] [--dry-run] posttrain train configs/sft.yaml ...
#   launch/hosts.sh status|logs|stop NAME --hosts a,b,c [--dir DIR] [--save DIR] [--dry-run]
# The project and its environment are on every host at the same place, DIR (here unless given); data and run directory on
# a file system that all share, or gs://. The first host is process 0; it must be reachable at the port by the others.
# `run` returns at once; each process is supervised on its own host (launch/supervise.sh).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 2 ] || die "usage: launch/hosts.sh run|status|logs|stop NAME --hosts a,b,c ... (see the head of the file)"
verb=$1 name=$2 hosts='' port=8476 dir=$PWD save='' dry_run=''
shift 2
while [ $# -gt 0 ]; do
    case $1 in
        --hosts) hosts=$(value "$@"); shift 2 ;;
        --port) port=$(value "$@"); shift 2 ;;
        --dir) dir=$(value "$@"); shift 2 ;;
        --save) save=$(value "$@"); shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        -*) die "$1: no such option" ;;
        *) break ;;
    esac
done
[ "$hosts" ] && [[ ,$hosts, != *,,* ]] || die "--hosts '$hosts': name the hosts, like a,b,c"
whole_number --port "$port"
[ "$verb" != run ] || [ $# -gt 0 ] || die "run: give the command to run"
IFS=, read -ra list <<<"$hosts"
where="runs/$name.process"

on() { # on HOST COMMAND LINE
    run ssh -o BatchMode=yes "$1" "cd $(quote "$dir") && $2"
}

[ -z "$save" ] || run mkdir -p "$save"
failed=0 # a host that does not answer, or runs already, does not keep the others waiting
for i in "${!list[@]}"; do
    host=${list[i]}
    case $verb in
        run)
            peers=("JAX_COORDINATOR_ADDRESS=${list[0]#*@}:$port" "JAX_NUM_PROCESSES=${#list[@]}" "JAX_PROCESS_ID=$i")
            on "$host" "$(quote env "${peers[@]}" launch/supervise.sh --detach --dir "$where" "$@")" || failed=1
            ;;
        status)
            answer=$(on "$host" "$(quote launch/supervise.sh --status "$where")") || answer='no answer' failed=1
            echo "$host: $answer"
            ;;
        stop) on "$host" "$(quote launch/supervise.sh --stop "$where")" || failed=1 ;;
        logs)
            if [ "$save" ]; then
                run scp -q -o BatchMode=yes "$host:$dir/$where/log" "$save/process-$i.log" || failed=1
            else
                echo "--- process $i, $host"
                on "$host" "$(quote tail -n 20 "$where/log")" || failed=1
            fi
            ;;
        *) die "$verb: no such verb; run, status, logs or stop" ;;
    esac
done
exit "$failed"
