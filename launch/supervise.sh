#!/usr/bin/env bash
# Starts a command again when it was interrupted or crashed, and leaves it when it is done or its input is wrong:
#   launch/supervise.sh [--failures 5] [--pause 15] posttrain train configs/sft.yaml
# posttrain goes on from its last checkpoint. What happens after each exit code:
#   0            done: ends
#   2, 126, 127  wrong input or usage, no such command: trying again cannot help; ends with that code
#   130          stopped by Ctrl-C: ends
#   143          saved, because this or another process of the run was told to stop: starts again at once, unless it was
#                this script that got the SIGTERM (it passes it on): then it ends, and who sent it decides what follows
#   others       crashed, or a peer crashed or did not come: starts again after a pause, twice as long each time; ends
#                with that code after so many failures in a row. A run of half an hour ends a row.
# With --dir DIR all output goes to DIR/log, this script's process number to DIR/pid and the exit code, at the end, to
# DIR/code; --detach returns at once and lets it run on without the terminal; --copy-to gs://BUCKET/FILE copies the log
# there every minute. --scancel JOB passes signals on by SLURM's scancel: at a SIGTERM srun itself kills its tasks. Then:
#   launch/supervise.sh --status DIR   the exit code, `runs`, or `gone` (never started, or the host went down)
#   launch/supervise.sh --stop DIR     SIGTERM: the run saves and ends
set -euo pipefail
usage() {
    sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0" >&2
    exit 2
}
runs() { # after a reboot the number may be that of another process
    local pid
    [ -f "$1/pid" ] && pid=$(cat "$1/pid") && kill -0 "$pid" 2>/dev/null || return 1
    [ ! -e /proc/self/cmdline ] || grep -qa supervise "/proc/$pid/cmdline"
}

failures=5 pause=15 dir='' detach='' copy='' job='' dry_run='' healthy=${POSTTRAIN_HEALTHY_SECONDS:-1800} options=()
while [ $# -gt 0 ]; do
    case $1 in
        --detach | --dry-run) ;;
        -*) [ $# -ge 2 ] || usage ;; # all others take a value
    esac
    case $1 in
        --status)
            cat "$2/code" 2>/dev/null || { runs "$2" && echo runs; } || echo gone
            exit 0
            ;;
        --stop)
            if runs "$2"; then kill -TERM "$(cat "$2/pid")"; else echo "supervise: $2: nothing runs" >&2; fi
            exit 0
            ;;
        --failures) failures=$2 ;;
        --pause) pause=$2 ;;
        --dir) dir=$2 ;;
        --copy-to) copy=$2 ;;
        --scancel) job=$2 ;;
        --detach | --dry-run) ;;
        -*) usage ;;
        *) break ;;
    esac
    case $1 in
        --detach) detach=yes; shift ;;
        --dry-run) dry_run=yes; shift ;;
        *) options+=("$1" "$2"); shift 2 ;;
    esac
done
[ $# -gt 0 ] || usage
if [ -z "$dir" ] && [ "$detach$copy" ]; then usage; fi
for number in "$failures" "$pause" "$healthy"; do
    if ! [[ $number =~ ^(0|[1-9][0-9]*)$ ]]; then
        echo "supervise: '$number': --failures, --pause and POSTTRAIN_HEALTHY_SECONDS are whole numbers" >&2
        exit 2
    fi
done
if [ "$dry_run" ]; then
    printf -v line '%q ' "$@"
    echo "${line% }${dir:+ >>$dir/log 2>&1}"
    exit 0
fi
if [ "$dir" ]; then
    mkdir -p "$dir"
    if runs "$dir" && [ "$(cat "$dir/pid")" != $$ ]; then # its own number is there already when it was detached
        echo "supervise: $dir: runs already, as process $(cat "$dir/pid")" >&2
        exit 2
    fi
    if [ "$detach" ]; then
        rm -f "$dir/code"
        setsid nohup "$BASH" "$0" "${options[@]}" "$@" </dev/null >>"$dir/log" 2>&1 &
        echo $! >"$dir/pid"
        exit 0
    fi
    rm -f "$dir/code"
    echo $$ >"$dir/pid"
    exec >>"$dir/log" 2>&1
fi

child='' pausing='' told='' passed='' copier=''
finish() {
    if [ "$copier" ]; then
        kill -- "-$copier" 2>/dev/null || true # with the copy that it may be making
        gcloud storage cp --quiet "$dir/log" "$copy" || true
    fi
    [ -z "$dir" ] || echo "$1" >"$dir/code"
    exit "$1"
}
say() { echo "supervise: $(date -u +%FT%TZ) $*" >&2; }
tell() { # a signal that comes while a child is being started waits until its number is known
    told=$1
    [ "$child" ] || return 0
    passed=yes
    if [ "$job" ] && [ -z "$pausing" ]; then
        scancel "--signal=$1" "$job" || true
    else
        kill "-$1" "$child" 2>/dev/null || true
    fi
}
wait_for_child() { # a trapped signal ends `wait` early: it is asked again at the end
    if [ "$told" ] && [ -z "$passed" ]; then tell "$told"; fi
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    code=0
    wait "$child" || code=$?
    child=''
}
trap 'tell TERM' TERM
trap 'tell INT' INT
set -m # children in process groups of their own, so that a terminal's Ctrl-C comes once: from this script
if [ "$copy" ]; then
    (while sleep 60; do gcloud storage cp --quiet "$dir/log" "$copy" || true; done) >/dev/null 2>&1 &
    copier=$!
fi

row=0
while true; do
    begin=$SECONDS
    "$@" &
    child=$!
    wait_for_child
    case $code in
        0) finish 0 ;;
        2 | 126 | 127 | 130) say "exit code $code: not started again"; finish "$code" ;;
    esac
    if [ "$told" ]; then
        say "exit code $code after SIG$told: not started again"
        finish "$code"
    fi
    if [ "$code" -eq 143 ]; then
        row=0
        say "exit code 143: saved, starting again"
        continue
    fi
    [ $((SECONDS - begin)) -lt "$healthy" ] || row=0
    row=$((row + 1))
    if [ "$row" -gt "$failures" ]; then
        say "exit code $code: failure $row in a row, giving up"
        finish "$code"
    fi
    seconds=$((pause << (row < 9 ? row - 1 : 8)))
    say "exit code $code: failure $row in a row, starting again in $seconds s"
    failed=$code pausing=yes
    sleep "$seconds" &
    child=$!
    wait_for_child
    pausing=''
    [ -z "$told" ] || finish "$failed"
done
