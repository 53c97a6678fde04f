#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
# The batch job that launch/slurm/submit.sh submits: runs train.py on every GPU, saves before the time limit, and queues itself again.
# Its arguments are train.py's.
#
# One process per GPU: JAX's SLURM detection expects that. It takes the number of processes, their order and the coordinator from
# SLURM_NTASKS, SLURM_PROCID and the node list, and process i of a node uses the i-th GPU that it sees. With one process per node
# the other GPUs would be idle. So every task must see all GPUs of its node: --gpus-per-node, and no binding.
#
# SLURM sends SIGTERM to the job's steps some minutes before the time limit (sbatch --signal=TERM@SECONDS, not B:, so that it goes
# to the processes and not to this script; on a SIGTERM of its own srun would kill them). train.py finishes its step, saves
# and exits with 143; then the job is queued again, and resumes from the checkpoint. After a node failure or a preemption
# SLURM queues it again by itself. A process that was lost without its node makes the others exit with 75, or with 134 when JAX's
# runtime ends them: then the job is queued again too, but only once between two checkpoints. One process that always fails
# makes the others exit in the same way, and srun returns the highest of their codes.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch: use launch/slurm/submit.sh}" || exit 1
logs=${LOGS:?launch/slurm/submit.sh sets LOGS}
stop=$logs/stop-$SLURM_JOB_ID lost=$logs/lost-$SLURM_JOB_ID
if [ -e "$stop" ]; then
  echo "$(date -Is) job $SLURM_JOB_ID was stopped on request and does not start again; submit it again to resume"
  exit 0
fi
# shellcheck source=/dev/null
source .venv/bin/activate

# Processes end one after the other: after the first one ends, with any code, the rest have a quarter of an hour. SLURM takes less
# to find a lost node (SlurmdTimeout, 300 s), and then queues the job again by itself.
flags=(--kill-on-bad-exit=0 --wait=900 --gpu-bind=none "--output=$logs/%j-process%t.log" --open-mode=append)
# srun does not inherit this since SLURM 22.05.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then flags+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi

echo "$(date -Is) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${SLURM_NTASKS:-?} processes: train.py $*"
srun "${flags[@]}" python launch/train.py --noprogress "$@"
code=$?

requeue() {
  echo "$(date -Is) $1; queued again"
  scontrol requeue "$SLURM_JOB_ID" || {
    echo "error: SLURM does not queue job $SLURM_JOB_ID again; submit it again: the same command resumes" >&2
    exit 1
  }
}

failed() {
  echo "error: training failed with exit code $code$1; see $logs/$SLURM_JOB_ID-process*.log" >&2
  exit "$code"
}

case $code in
  0) echo "$(date -Is) finished" ;;
  143)
    if [ -e "$stop" ]; then
      echo "$(date -Is) stopped on request, saved; submit it again to resume"
      exit 0
    fi
    requeue "stopped by SIGTERM, saved"
    ;;
  75 | 134)
    [ ! -e "$stop" ] || failed " when it was stopped, not saved"
    newest=$(find "$logs/../checkpoints" -mindepth 1 -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' 2>/dev/null | sort -n | tail -n 1)
    if [ -e "$lost" ] && [ "$(<"$lost")" = "$newest" ]; then failed " twice since the newest checkpoint (${newest:-none})"; fi
    echo "$newest" >"$lost"
    requeue "a process was lost (exit code $code)"
    ;;
  *) failed "" ;;
esac
