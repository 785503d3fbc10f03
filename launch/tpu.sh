#!/usr/bin/env bash
# A run on Cloud TPU VMs: one slice, or several that are one run (mesh.replica across them).
#   launch/tpu.sh create NAME --topology v5e:4x4 --zone ZONE [--slices N] [--spot] [--runtime VERSION]
#   launch/tpu.sh setup  NAME --zone ZONE                        installs this checkout on every host
#   launch/tpu.sh run    NAME --zone ZONE [--logs gs://BUCKET/DIR] posttrain train configs/sft.yaml ...
#   launch/tpu.sh status|stop|delete NAME --zone ZONE            stop: SIGTERM, so that the run saves
#   launch/tpu.sh logs   NAME --zone ZONE [--save DIR]
#   launch/tpu.sh keep   NAME (all options of create and run) posttrain train ...
# `keep` does all of it and stays: when the slices are taken away it asks for new ones, sets them up and starts the run
# again, which resumes; when the run has ended, or ten tries in a row to start it have failed, it deletes them. --slices
# must be given to every verb if it is not 1, and --dry-run prints the commands instead. NAME is the queued resource and,
# with a number behind it, its slices.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"
[ $# -ge 2 ] || die "usage: launch/tpu.sh create|setup|run|status|stop|logs|delete|keep NAME --zone ZONE ..."
verb=$1 name=$2 topology='' zone='' slices=1 spot='' runtime='' logs='' save='' poll=60 dry_run=''
shift 2
given=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --topology) topology=$(value "$@"); shift 2 ;;
        --zone) zone=$(value "$@"); shift 2 ;;
        --slices) slices=$(value "$@"); shift 2 ;;
        --runtime) runtime=$(value "$@"); shift 2 ;;
        --logs) logs=$(value "$@"); shift 2 ;;
        --save) save=$(value "$@"); shift 2 ;;
        --poll) poll=$(value "$@"); shift 2 ;;
        --spot) spot=--spot; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -*) die "$1: no such option" ;;
        *) break ;;
    esac
done
options=("${given[@]:0:${#given[@]}-$#}")
check_name "$name"
[ "$zone" ] || die "--zone: name the zone of the TPU"
whole_number --slices "$slices"
nodes=("$name")
if [ "$slices" -gt 1 ]; then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
queued=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)
place=("--zone=$zone" --quiet)
dir=posttrain-runs # in the home directory of every host

everywhere() { # COMMAND LINE, on every host of every slice
    local node failed=0
    for node in "${nodes[@]}"; do
        run "${vm[@]}" ssh "$node" "${place[@]}" --worker=all --command="$1" || failed=1
    done
    return $failed
}

create() {
    [ "$topology" ] || die "--topology: give a chip and its shape as for posttrain plan, like v5p:4x4x4"
    read_topology "$topology"
    local size=("--accelerator-type=$generation-$chips") version
    case $generation in # the number in an accelerator type counts cores, of which v4 and v5p have two a chip
        v4) size=(--type=v4 "--topology=$shape") version=tpu-ubuntu2204-base ;;
        v5e) size=("--accelerator-type=v5litepod-$chips") version=v2-alpha-tpuv5-lite ;;
        v5p) size=("--accelerator-type=v5p-$((2 * chips))") version=v2-alpha-tpuv5 ;;
        v6e) version=v2-alpha-tpuv6e ;;
        *) die "--topology '$topology': Cloud TPU VMs of this kind are had through GKE only: launch/gke.sh" ;;
    esac
    local names=("--node-id=$name")
    [ "$slices" -eq 1 ] || names=("--node-count=$slices" "--node-prefix=$name")
    run "${queued[@]}" create "$name" "${place[@]}" "${size[@]}" "--runtime-version=${runtime:-$version}" \
        "${names[@]}" ${spot:+"$spot"}
}

# The TPU images have an older Python: uv brings one. The file env/ready says that nothing is missing.
setup() {
    local wheels node install
    wheels=$(if [ "$dry_run" ]; then echo dist; else mktemp -d; fi)
    run python3 -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$root"
    local wheel="$wheels/posttrain.whl"
    [ "$dry_run" ] || wheel=$(echo "$wheels"/posttrain-*.whl)
    everywhere "mkdir -p $dir"
    for node in "${nodes[@]}"; do
        run "${vm[@]}" scp "$wheel" "$root/launch/supervise.sh" "$node:$dir/" "${place[@]}" --worker=all
        run "${vm[@]}" scp --recurse "$root/configs" "$node:$dir/" "${place[@]}" --worker=all
    done
    install="python3 -m uv pip install --quiet --python env/bin/python '$(basename "$wheel")[tpu,gcs]'"
    [ "$dry_run" ] || rm -r "$wheels"
    everywhere "cd $dir && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --clear --python 3.12 env && $install && touch env/ready"
}

# A log is named after its host in the bucket.
start() {
    local copy=''
    [ -z "$logs" ] || copy="--copy-to $logs/$name/\$(hostname).log "
    everywhere "cd $dir && PATH=\$PWD/env/bin:\$PATH bash supervise.sh --detach --dir $name $copy$(quote "$@")"
}

codes() { # a line of every host: exit code, `runs`, `gone`, or `new` where not all is set up
    everywhere "if [ -f $dir/env/ready ]; then bash $dir/supervise.sh --status $dir/$name; else echo new; fi"
}

described() { # COMMAND: what it prints; `none` where there is no such thing, `unknown` where it cannot be told
    local error
    if "$@" 2>/dev/null; then return; fi
    error=$("$@" 2>&1 >/dev/null) || true
    if [[ $error == *NOT_FOUND* ]]; then echo none; else echo "$error" >&2; echo unknown; fi
}

state() { # of the slices together: `up`, `lost`, or the queued resource's state while it is on its way
    local found node
    found=$(described "${queued[@]}" describe "$name" "${place[@]}" --format='value(state.state)')
    case $found in
        SUSPENDING | SUSPENDED) found=lost ;;
        ACTIVE)
            found=up
            for node in "${nodes[@]}"; do
                case $(described "${vm[@]}" describe "$node" "${place[@]}" --format='value(state)') in
                    READY) ;;
                    unknown) [ "$found" = lost ] || found=unknown ;;
                    *) found=lost ;;
                esac
            done
            ;;
    esac
    echo "$found"
}

delete() { run "${queued[@]}" delete "$name" "${place[@]}" --force; }

say() { echo "$(date -u +%FT%TZ) $name: $*"; }

failed=0 known='' answered='' # tries in a row to have the run started; whether the service, and a host, ever answered
keep() { # each step is a script of its own, so that its first error ends it
    local now before=''
    while true; do
        now=$(state)
        [ "$now" = "$before" ] || say "$now"
        before=$now
        [ "$now" = unknown ] || known=yes
        case $now in
            unknown) [ "$known" ] || failed=$((failed + 1)) ;; # later the run may go on all the same
            none)
                self create || {
                    [ $? -ne 2 ] || exit 2 # wrong options
                    failed=$((failed + 1))
                }
                ;;
            lost) self delete || failed=$((failed + 1)) ;;
            FAILED) # the request itself
                failed=$((failed + 1))
                "${queued[@]}" describe "$name" "${place[@]}" --format='value(state.failedData.error.message)' || true
                self delete || true
                ;;
            up) attend "$@" ;;
        esac
        if [ "$failed" -ge 10 ]; then
            say "$failed tries in a row to start the run have failed: giving up"
            if [ "$known" ] && [ "$now" != none ]; then give_back; fi
            exit 1
        fi
        sleep "$poll"
    done
}

attend() { # COMMAND: to the slices, once they are up
    local answers complete=yes code
    answers=$(self codes 2>/dev/null) || complete='' # some host did not answer
    answers=$(grep -E '^(new|runs|gone|[0-9]+)$' <<<"$answers") || true
    if [ -z "$answers" ]; then
        say "no host answers ssh"
        [ "$answered" ] || failed=$((failed + 1))
        return
    fi
    answered=yes
    if grep -qx new <<<"$answers"; then
        failed=$((failed + 1))
        if self setup; then self run "$@" || true; fi
    elif grep -qx gone <<<"$answers"; then
        failed=$((failed + 1))
        self run "$@" || true
    elif grep -qx runs <<<"$answers"; then
        failed=0
        if grep -qx 2 <<<"$answers"; then self stop || true; fi # one found wrong input: the others wait for it
    elif [ "$complete" ]; then
        code=$(sort -n <<<"$answers" | tail -n 1)
        if grep -qx 2 <<<"$answers"; then code=2; fi
        say "ended with code $code"
        self logs || true
        give_back
        exit "$code"
    else
        failed=$((failed + 1))
    fi
}

give_back() { # what is not deleted costs
    local try
    for ((try = 0; try < 5; try++)); do
        if self delete; then return; fi
        sleep "$poll"
    done
    say "NOT DELETED, and costs; by hand: launch/tpu.sh delete $name --zone $zone" >&2
}

self() { # VERB [COMMAND]
    local verb=$1
    shift
    "$BASH" "$0" "$verb" "$name" "${options[@]}" "$@"
}

logs_of() {
    if [ -z "$save" ]; then
        everywhere "tail -n 30 $dir/$name/log"
        return
    fi
    local node i count failed=0
    run mkdir -p "$save"
    for node in "${nodes[@]}"; do
        count=1
        [ "$dry_run" ] || count=$("${vm[@]}" describe "$node" "${place[@]}" --format='value(networkEndpoints.len())')
        for ((i = 0; i < count; i++)); do
            run "${vm[@]}" scp "$node:$dir/$name/log" "$save/$node-$i.log" "${place[@]}" "--worker=$i" || failed=1
        done
    done
    return "$failed"
}

case $verb in
    create | setup | delete) $verb ;;
    run)
        [ $# -gt 0 ] || die "run: give the command to run"
        start "$@"
        ;;
    status) [ "$dry_run" ] || state; codes ;;
    stop) everywhere "bash $dir/supervise.sh --stop $dir/$name" ;;
    codes) codes ;;
    logs) logs_of ;;
    keep)
        [ $# -gt 0 ] || die "keep: give the command to run"
        if [ "$dry_run" ]; then
            create; setup; start "$@"; delete
        else
            (dry_run=yes; create) >/dev/null # its options are checked before anything is asked for
            keep "$@"
        fi
        ;;
    *) die "$verb: no such verb; create, setup, run, status, stop, logs, delete or keep" ;;
esac
