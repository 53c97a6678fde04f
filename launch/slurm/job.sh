#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
# The batch job that launch/slurm/submit.sh hands to sbatch: train.py on every GPU, saved before the time limit, and queued again.
# Its arguments are train.py's.
#
# One process a GPU: JAX's SLURM detection expects that. From SLURM_NTASKS, SLURM_PROCID and the node list it takes the number
# of processes, their order and the coordinator, and process i of a node drives the i-th GPU that it sees; one process a node
# would see its other GPUs idle. So every task must see all GPUs of its node: --gpus-per-node, and no binding.
#
# SLURM sends SIGTERM to the job's steps some minutes before the time limit (sbatch --signal=TERM@SECONDS, not B:, so that it goes
# to the processes and not to this script; srun would answer a SIGTERM of its own by killing them). train.py finishes its step,
# saves and exits with 143; then the job is queued again, and goes on from the checkpoint. After a node failure or a preemption
# SLURM queues it again by itself.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch: use launch/slurm/submit.sh}" || exit 1
logs=${LOGS:?launch/slurm/submit.sh sets LOGS}
# shellcheck source=/dev/null
source .venv/bin/activate

# Processes end one after the other: the first to end, by whatever code, leaves the rest five minutes, not none.
flags=(--kill-on-bad-exit=0 --wait=300 --gpu-bind=none "--output=$logs/%j-process%t.log" --open-mode=append)
# srun does not inherit this since SLURM 22.05.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then flags+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi

echo "$(date -Is) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${SLURM_NTASKS:-?} processes: train.py $*"
srun "${flags[@]}" python launch/train.py --noprogress "$@"
code=$?

case $code in
  0) echo "$(date -Is) finished" ;;
  143)
    if [ -e "$logs/stop-$SLURM_JOB_ID" ]; then
      echo "$(date -Is) stopped on request, saved; submit it again to go on"
      exit 0
    fi
    echo "$(date -Is) stopped by SIGTERM, saved; queued again"
    scontrol requeue "$SLURM_JOB_ID" || {
      echo "error: SLURM does not queue job $SLURM_JOB_ID again; submit it again: the same command goes on" >&2
      exit 1
    }
    ;;
  *)
    echo "error: training failed with exit code $code; see $logs/$SLURM_JOB_ID-process*.log" >&2
    exit $code
    ;;
esac
