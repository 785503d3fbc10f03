#!/usr/bin/env bash
# A run on a SLURM cluster of GPUs: one process on each node, with all of its GPUs. From the repository's root:
#   sbatch --nodes=4 launch/slurm.sh posttrain train configs/sft.yaml --run.dir /shared/runs/mine ...
# One process for each GPU instead: --ntasks-per-node=8. Every option below can be given to sbatch. Five minutes before
# the time limit, and on preemption, the run saves; the job then goes back into the queue and resumes.
#SBATCH --job-name=posttrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=posttrain-%j.out
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [ ! -f "$root/launch/common.sh" ]; then # this script itself was copied by sbatch
    echo "slurm.sh: $root has no launch/: submit from the repository's root" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$root/launch/common.sh"
dry_run=''
if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi
if [ $# -eq 0 ]; then
    die "usage: sbatch [OPTIONS] launch/slurm.sh [--dry-run] COMMAND ... (from the repository's root)"
fi
job=${SLURM_JOB_ID:-JOB} requeued=${SLURM_RESTART_COUNT:-0} most=${POSTTRAIN_REQUEUES:-100}
# A task that has ended first must not take the others with it while they still save.
step=(srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none --open-mode=append "--output=posttrain-$job-process-%t.log" "$@")
if [ "$dry_run" ]; then
    "$root/launch/supervise.sh" --dry-run "${step[@]}"
    echo "scontrol requeue $job # if the job was told to stop, and not cancelled"
    exit 0
fi
echo "$(date -u +%FT%TZ) job $job on $SLURM_JOB_NODELIST, requeued $requeued times: $*"
supervisor='' told=''
# SLURM signals this shell alone; the supervisor has scancel tell the tasks.
trap 'told=yes; [ -z "$supervisor" ] || kill -TERM "$supervisor" 2>/dev/null || true' TERM
"$root/launch/supervise.sh" --scancel "$job" "${step[@]}" &
supervisor=$!
[ -z "$told" ] || kill -TERM "$supervisor" 2>/dev/null || true # it came before the number was known
wait_out "$supervisor"
# A job that was cancelled, or that SLURM preempted and requeues itself, is no longer RUNNING.
state=$(squeue --noheader "--jobs=$job" --format=%T || true)
case $code in
    0 | 2 | 126 | 127 | 130) ;; # done, or trying again cannot help
    *)
        if [ "$told" ] && [ "$state" = RUNNING ] && [ "$requeued" -lt "$most" ]; then
            echo "$(date -u +%FT%TZ) told to stop, exit code $code: back into the queue"
            scontrol requeue "$job"
        fi
        ;;
esac
exit "$code"
