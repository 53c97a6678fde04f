#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster.
#
#   bash launch/slurm/submit.sh --setup                 once, on the login node: makes the environment
#   bash launch/slurm/submit.sh --nodes=4 --gpus=8 --time=24:00:00 --partition=gpu --name=stage1 \
#     --config=configs/stage1.py --workdir=/shared/runs/stage1 -- --config.streams.text_to_image.path=/shared/data
#   bash launch/slurm/submit.sh --stop=JOB --workdir=/shared/runs/stage1     saves, ends, is not queued again
#
# The job saves and is queued again before its time limit, until training has finished; the same command resumes a run that failed
# or was stopped. The repository, its environment and --workdir must be on a file system that all nodes see. Logs are in
# WORKDIR/slurm: JOB.log, and JOB-processN.log of each process (0 logs the progress).
#
# Options: --nodes (1) --gpus (per node, 8) --time (24:00:00) --partition --account --cpus (per GPU, 8) --name (unialign) --notice (300:
# seconds before the time limit at which it saves) --sbatch-flag=FLAG (repeatable, passed on) --dry-run (prints the commands).
set -uo pipefail

NODES=1 GPUS=8 TIME=24:00:00 CPUS=8 NAME=unialign NOTICE=300 PARTITION="" ACCOUNT="" CONFIG="" WORKDIR="" STOP="" SETUP="" DRY_RUN=""
SBATCH_FLAGS=() TRAIN_FLAGS=()

fail() {
  echo "error: $*" >&2
  exit 1
}

run() {
  local problem
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@"
    echo
    return
  fi
  command -v "$1" >/dev/null || fail "$1 is not installed here: this is for a SLURM cluster's login node; look with --dry-run"
  exec 3>&1
  problem=$("$@" 2>&1 >&3) || fail "$1: $(tr -s '[:space:]' ' ' <<<"$problem")"
  exec 3>&-
}

if [ $# -eq 0 ]; then set -- --help; fi
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h)
      sed -n '2,15s/^# \{0,1\}//p' "$0"
      exit
      ;;
    --nodes=*) NODES=${1#*=} ;;
    --gpus=*) GPUS=${1#*=} ;;
    --time=*) TIME=${1#*=} ;;
    --partition=*) PARTITION=${1#*=} ;;
    --account=*) ACCOUNT=${1#*=} ;;
    --cpus=*) CPUS=${1#*=} ;;
    --name=*) NAME=${1#*=} ;;
    --notice=*) NOTICE=${1#*=} ;;
    --config=*) CONFIG=${1#*=} ;;
    --workdir=*) WORKDIR=${1#*=} ;;
    --sbatch-flag=*) SBATCH_FLAGS+=("${1#*=}") ;;
    --stop=*) STOP=${1#*=} ;;
    --setup) SETUP=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      TRAIN_FLAGS=("$@")
      break
      ;;
    *) fail "unknown option $1; --help explains" ;;
  esac
  shift
done
for key in NODES GPUS CPUS NOTICE; do [[ ${!key} =~ ^[1-9][0-9]*$ ]] || fail "--${key,,} is '${!key}', expected a number of at least 1"; done
if [ -n "$WORKDIR" ]; then WORKDIR=$(realpath -m -- "$WORKDIR"); fi
# sbatch ends a value of --export at a comma, and replaces % in --output.
case $WORKDIR in *[,%[:space:]]*) fail "--workdir is '$WORKDIR', expected a path without commas, % and white space" ;; esac
cd "$(dirname "$0")/../.." || exit 1

if [ -n "$SETUP" ]; then
  if [ -n "$DRY_RUN" ]; then
    echo "bash -c 'source launch/environment.sh && make_environment requirements.txt launch/slurm/requirements.txt'"
    exit
  fi
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  make_environment requirements.txt launch/slurm/requirements.txt
  exit
fi

[ -n "$WORKDIR" ] || fail "submit.sh needs --workdir, on a file system that all nodes see"
logs=$WORKDIR/slurm

if [ -n "$STOP" ]; then
  [[ $STOP =~ ^[0-9]+$ ]] || fail "--stop is '$STOP', expected the number of a job"
  mark=$logs/stop-$STOP
  if [ -z "$DRY_RUN" ]; then
    # SLURM makes this file when the job starts.
    [ -e "$logs/$STOP.log" ] ||
      fail "there is no $logs/$STOP.log: job $STOP is not of this --workdir, or has never started (then: scancel $STOP)"
    [ ! -e "$mark" ] ||
      fail "job $STOP was asked to stop already, and a second signal would end it in its save (that is: scancel --signal=TERM $STOP)"
  fi
  # job.sh looks for this mark at its start and after train.py has ended: a job that waits in the queue cannot be signalled.
  run touch "$mark"
  trap 'rm -f "$mark"' EXIT
  waiting=$(run squeue --noheader "--jobs=$STOP" --states=PENDING --format=%i) || exit
  if [ -n "$waiting" ] && [ -z "$DRY_RUN" ]; then
    echo "job $STOP waits in the queue: it ends when it starts, or now by: scancel $STOP"
  else
    [ -z "$DRY_RUN" ] || echo "$waiting"
    run scancel --signal=TERM "$STOP"
  fi
  trap - EXIT
  exit
fi

[ -n "$CONFIG" ] || fail "submit.sh needs --config"
[ -n "$DRY_RUN" ] || [ -x .venv/bin/python ] || fail "there is no environment yet: bash launch/slurm/submit.sh --setup"
queued=$(run squeue --me --noheader "--name=$NAME" --format=%i) || exit
if [ -n "$DRY_RUN" ]; then
  echo "$queued"
elif [ -n "$queued" ]; then
  fail "a job named $NAME is queued or running already: $(tr '\n' ' ' <<<"$queued"); stop it, or give another --name"
fi
run mkdir -p "$logs"
flags=("--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS" "--gpus-per-node=$GPUS" "--cpus-per-task=$CPUS" "--time=$TIME")
flags+=("--signal=TERM@$NOTICE" "--output=$logs/%j.log" "--export=ALL,LOGS=$logs")
if [ -n "$PARTITION" ]; then flags+=("--partition=$PARTITION"); fi
if [ -n "$ACCOUNT" ]; then flags+=("--account=$ACCOUNT"); fi
run sbatch "${flags[@]}" "${SBATCH_FLAGS[@]}" launch/slurm/job.sh "--config=$CONFIG" "--workdir=$WORKDIR" "${TRAIN_FLAGS[@]}"
