#!/usr/bin/env bash
# A run on GKE, on one TPU slice or several, as a JobSet (launch/gke.yaml).
#   launch/gke.sh pools  NAME --topology v6e:4x4 --cluster C --location REGION --zone ZONE [--slices N] [--spot]
#                        [--account NAME@PROJECT.iam.gserviceaccount.com]   of the nodes: reaches the run's bucket
#   launch/gke.sh run    NAME --topology v6e:4x4 --image IMAGE [--slices N] [--spot] [--queue Q] [--restarts 20]
#                        [--grace 300] posttrain train configs/sft.yaml --run.dir gs://BUCKET/RUN ...
#   launch/gke.sh status|logs NAME [--save DIR]
#   launch/gke.sh stop   NAME     deletes the JobSet when its pods, which get SIGTERM, have saved; `run` again resumes
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
        --topology) topology=$(value "$@"); shift 2 ;;
        --image) image=$(value "$@"); shift 2 ;;
        --slices) slices=$(value "$@"); shift 2 ;;
        --queue) queue=$(value "$@"); shift 2 ;;
        --account) account=$(value "$@"); shift 2 ;;
        --restarts) restarts=$(value "$@"); shift 2 ;;
        --grace) grace=$(value "$@"); shift 2 ;;
        --save) save=$(value "$@"); shift 2 ;;
        --cluster) cluster=$(value "$@"); shift 2 ;;
        --location) location=$(value "$@"); shift 2 ;;
        --zone) zone=$(value "$@"); shift 2 ;;
        --spot) spot=--spot; shift ;;
        --dry-run) dry_run=yes; shift ;;
        -*) die "$1: no such option" ;;
        *) break ;;
    esac
done
check_name "$name"
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
    if [ "$generation" = tpu7x ] && [ "$hosts" -gt 1 ]; then # slices of these are placed by a policy of their own
        run gcloud compute resource-policies create workload-policy "$name" --type=HIGH_THROUGHPUT \
            "--accelerator-topology=$shape" "--region=${zone%-*}"
        size+=("--placement-policy=$name")
    fi
    for ((i = 0; i < slices; i++)); do
        run gcloud container node-pools create "$name-$i" "--cluster=$cluster" "--location=$location" \
            "--node-locations=$zone" "--machine-type=$machine" "${size[@]}" ${spot:+"$spot"} \
            --scopes=cloud-platform ${account:+"--service-account=$account"}
    done
}

json() { # the words as a JSON list
    local word list=''
    for word in "$@"; do
        word=${word//\\/\\\\}
        word=${word//\"/\\\"}
        list+="${list:+, }\"${word//$'\n'/\\n}\""
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
    local -A words=(
        [NAME]=$name [QUEUE]=$queue [RESTARTS]=$restarts [SLICES]=$slices [HOSTS]=$hosts [GRACE]=$grace
        [ACCELERATOR]=$accelerator [SHAPE]=$shape [IMAGE]=$image [CHIPS]=$per_host
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
    local pods=pod/POD failed=0
    [ "$dry_run" ] || pods=$(kubectl get pods --selector="$selector" --output=name)
    [ "$pods" ] || die "logs: no pods of $name are left; Cloud Logging has what they printed"
    for pod in $pods; do
        if [ "$dry_run" ]; then
            echo "$(quote kubectl logs "$pod") >$save/${pod#pod/}.log"
        else
            kubectl logs "$pod" >"$save/${pod#pod/}.log" || failed=1 # one that has not started has none
        fi
    done
    return "$failed"
}

case $verb in
    pools) pools ;;
    run)
        [ $# -gt 0 ] || die "run: give the command to run"
        text=$(manifest "$@")
        if [ "$dry_run" ]; then
            printf '%s\n' "$text"
            echo "# kubectl create --filename=-"
        else
            kubectl create --filename=- <<<"$text" ||
                die "run: where it says AlreadyExists, a run of this name is there, ended or not: launch/gke.sh stop $name"
        fi
        ;;
    status)
        run kubectl get jobset "$name"
        run kubectl get jobs,pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
        ;;
    logs) logs ;;
    stop) run kubectl delete jobset "$name" --cascade=foreground ;; # returns when the pods are gone
    *) die "$verb: no such verb; pools, run, status, logs or stop" ;;
esac
