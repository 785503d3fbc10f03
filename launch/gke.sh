#!/usr/bin/env bash
# A run on GKE, on one TPU slice or several, as a JobSet (launch/gke.yaml).
#   launch/gke.sh pools  NAME --topology v6e:4x4 --cluster C --location REGION --zone ZONE [--slices N] [--spot]
#   launch/gke.sh run    NAME --topology v6e:4x4 --image IMAGE [--slices N] [--spot] [--queue Q] [--account KSA]
#                        [--restarts 20] [--grace 300] posttrain train configs/sft.yaml --run.dir gs://BUCKET/RUN ...
#   launch/gke.sh status|logs NAME [--save DIR]
#   launch/gke.sh stop   NAME     deletes the JobSet: its pods get SIGTERM and save; `run` again resumes
# --dry-run prints the commands, and with `run` the manifest, instead. kubectl uses its current context and namespace.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"
[ $# -ge 2 ] || die "usage: launch/gke.sh pools|run|status|logs|stop NAME ... (see the head of the file)"
verb=$1 name=$2 topology='' image='' slices=1 spot='' queue='' account='' restarts=20 grace=300 save='' dry_run=''
cluster='' location='' zone=''
shift 2
while [ $# -gt 0 ]; do
    case $1 in
        --topology) topology=${2:-}; shift 2 ;;
        --image) image=${2:-}; shift 2 ;;
        --slices) slices=${2:-}; shift 2 ;;
        --queue) queue=${2:-}; shift 2 ;;
        --account) account=${2:-}; shift 2 ;;
        --restarts) restarts=${2:-}; shift 2 ;;
        --grace) grace=${2:-}; shift 2 ;;
        --save) save=${2:-}; shift 2 ;;
        --cluster) cluster=${2:-}; shift 2 ;;
        --location) location=${2:-}; shift 2 ;;
        --zone) zone=${2:-}; shift 2 ;;
        --spot) spot=--spot; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -*) die "$1: no such option" ;;
        *) break ;;
    esac
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "NAME '$name': small letters, digits and -, at most 40"
for option in slices restarts grace; do whole_number "--$option" "${!option}"; done

tpu() { # the node label and the machine type of a host with so many chips
    read_topology "$topology"
    case $generation in
        v4) accelerator=tpu-v4-podslice machine=ct4p-hightpu-${per_host}t ;;
        v5e) accelerator=tpu-v5-lite-podslice machine=ct5lp-hightpu-${per_host}t ;;
        v5p) accelerator=tpu-v5p-slice machine=ct5p-hightpu-${per_host}t ;;
        v6e) accelerator=tpu-v6e-slice machine=ct6e-standard-${per_host}t ;;
        tpu7x) accelerator=tpu7x machine=tpu7x-standard-${per_host}t ;;
    esac
}

pools() {
    tpu
    [ "$cluster" ] && [ "$location" ] && [ "$zone" ] || die "pools: --cluster, --location and --zone are needed"
    local size=("--num-nodes=$hosts") i
    [ "$hosts" -eq 1 ] || size+=("--tpu-topology=$shape")
    for ((i = 0; i < slices; i++)); do
        run gcloud container node-pools create "$name-$i" "--cluster=$cluster" "--location=$location" \
            "--node-locations=$zone" "--machine-type=$machine" "${size[@]}" ${spot:+"$spot"}
    done
}

json() { # the words as a JSON list
    local word list=''
    for word in "$@"; do
        word=${word//\\/\\\\}
        list+="${list:+, }\"${word//\"/\\\"}\""
    done
    echo "[$list]"
}

manifest() { # COMMAND ...
    tpu
    [ "$image" ] || die "--image: name the image, built from launch/Dockerfile"
    [ "$slices" -eq 1 ] || [ "$hosts" -gt 1 ] || die "--slices $slices: GKE joins slices of several hosts only"
    local keep=() line mark word
    [ "$slices" -eq 1 ] || keep+=(slices)
    [ -z "$spot" ] || keep+=(spot)
    [ -z "$queue" ] || keep+=(queue)
    [ -z "$account" ] || keep+=(account)
    local -A words=(
        [NAME]=$name [QUEUE]=$queue [RESTARTS]=$restarts [SLICES]=$slices [HOSTS]=$hosts [GRACE]=$grace
        [ACCOUNT]=$account [ACCELERATOR]=$accelerator [SHAPE]=$shape [IMAGE]=$image [CHIPS]=$per_host
        [COMMAND]=$(json "$@")
    )
    while IFS= read -r line; do
        if [[ $line == *'  # only: '* ]]; then
            mark=${line##*'# only: '}
            [[ " ${keep[*]:-} " == *" $mark "* ]] || continue
            line=${line%'  # only: '*}
        fi
        if [[ $line =~ @([A-Z]+)@ ]]; then
            word=@${BASH_REMATCH[1]}@
            line=${line%%"$word"*}${words[${BASH_REMATCH[1]}]}${line#*"$word"}
        fi
        printf '%s\n' "$line"
    done <"$here/gke.yaml"
}

logs() {
    local selector="jobset.sigs.k8s.io/jobset-name=$name" pod
    if [ -z "$save" ]; then
        run kubectl logs --selector="$selector" --prefix --tail=20 --max-log-requests=100
        return
    fi
    run mkdir -p "$save"
    local pods=(pod/POD)
    [ "$dry_run" ] || mapfile -t pods < <(kubectl get pods --selector="$selector" --output=name)
    for pod in "${pods[@]}"; do
        if [ "$dry_run" ]; then
            echo "$(quote kubectl logs "$pod") >$save/${pod#pod/}.log"
        else
            kubectl logs "$pod" >"$save/${pod#pod/}.log"
        fi
    done
}

case $verb in
    pools) pools ;;
    run)
        [ $# -gt 0 ] || die "run: give the command to run"
        text=$(manifest "$@")
        if [ "$dry_run" ]; then
            printf '%s\n' "$text"
            echo "# kubectl apply --filename=-"
        else
            kubectl apply --filename=- <<<"$text"
        fi
        ;;
    status) run kubectl get jobsets,jobs,pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide ;;
    logs) logs ;;
    stop) run kubectl delete jobset "$name" ;;
    *) die "$verb: no such verb; pools, run, status, logs or stop" ;;
esac
