#!/usr/bin/env bash
# Trains on Cloud TPU slices: rents them, sets them up, starts train.py on every host, and resumes after a preemption.
#
#   cp launch/tpu/settings.example.sh stage1.sh         then fill it in: name, project, zone, slice, storage, config, workdir
#   bash launch/tpu/tpu.sh keep --settings=stage1.sh    all steps below, until training has finished; may be interrupted and run again
#
# or step by step; each step may be repeated:
#
#   create   requests the slices (a queued resource); reports slices that exist
#   wait     until they are ACTIVE
#   setup    copies the committed code to every host, makes its environment, mounts the storage
#   start    starts train.py on every host in the background; refuses when one is running
#   status   the state of the queued resource and of every host, with the last line of its log
#   watch    status, then follows the log of the first host
#   stop     SIGTERM to train.py on every host, and waits until it has saved, or reports that it has not; start resumes from there
#   delete   gives the slices back (stop first: unsaved steps are lost, and a keep that still runs rents the slices again)
#
# Options: --settings=FILE, or one flag for each of its settings: --name --project --zone --accelerator --slices --provisioning
# --runtime --storage --mount --config --workdir --poll --max-restarts; --create-flag=FLAG and --ssh-flag=FLAG (repeatable, passed on
# to gcloud); --local-disk (the run's folder may be on the host's own disk: one host only); --dry-run (prints every command, runs
# none). Arguments after "--" go to train.py:
#
#   bash launch/tpu/tpu.sh start --settings=stage1.sh --dry-run -- --config.batch_size=512
#
# The run's folder (--workdir) must be on storage that all hosts see (--storage mounts an NFS export or a bucket on each of
# them): there the run finds its newest checkpoint after a restart, on these slices or on others. Needs gcloud, signed in.
set -uo pipefail

NAME="" PROJECT="" ZONE="" ACCELERATOR="" SLICES=1 PROVISIONING=on-demand RUNTIME="" STORAGE="" MOUNT=/mnt/unialign
CONFIG="" WORKDIR="" TRAIN_FLAGS=() CREATE_FLAGS=() SSH_FLAGS=() POLL=60 MAX_RESTARTS=5
DRY_RUN="" LOCAL_DISK=""
STATE=ABSENT WORKERS="" SUMMARY="" PROBLEM=""

say() { echo "$(date +%H:%M:%S) $*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

usage() { sed -n '2,27s/^# \{0,1\}//p' "$0"; }

# --- settings -----------------------------------------------------------------------------------------------------------------

read_settings() {
  local argument file=""
  for argument; do
    case $argument in
      --) break ;;
      --settings=*) file=${argument#*=} ;;
    esac
  done
  if [ -n "$file" ]; then
    [ -r "$file" ] || fail "there is no settings file $file; copy launch/tpu/settings.example.sh"
    # Without a slash bash would look along PATH first.
    case $file in */*) ;; *) file=./$file ;; esac
    # shellcheck source=launch/tpu/settings.example.sh
    source "$file" || fail "the settings file $file cannot be read by bash"
  fi
  while [ $# -gt 0 ]; do
    case $1 in
      --settings=*) ;;
      --name=*) NAME=${1#*=} ;;
      --project=*) PROJECT=${1#*=} ;;
      --zone=*) ZONE=${1#*=} ;;
      --accelerator=*) ACCELERATOR=${1#*=} ;;
      --slices=*) SLICES=${1#*=} ;;
      --provisioning=*) PROVISIONING=${1#*=} ;;
      --runtime=*) RUNTIME=${1#*=} ;;
      --storage=*) STORAGE=${1#*=} ;;
      --mount=*) MOUNT=${1#*=} ;;
      --config=*) CONFIG=${1#*=} ;;
      --workdir=*) WORKDIR=${1#*=} ;;
      --poll=*) POLL=${1#*=} ;;
      --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
      --create-flag=*) CREATE_FLAGS+=("${1#*=}") ;;
      --ssh-flag=*) SSH_FLAGS+=("${1#*=}") ;;
      --local-disk) LOCAL_DISK=1 ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        shift
        TRAIN_FLAGS+=("$@")
        break
        ;;
      *) fail "unknown option $1; --help explains" ;;
    esac
    shift
  done
}

check_settings() {
  local missing=() key
  for key in NAME PROJECT ZONE; do [ -n "${!key}" ] || missing+=("--${key,,}"); done
  case $1 in create | keep) [ -n "$ACCELERATOR" ] || missing+=(--accelerator) ;; esac
  case $1 in start | keep)
    [ -n "$CONFIG" ] || missing+=(--config)
    [ -n "$WORKDIR" ] || missing+=(--workdir)
    ;;
  esac
  [ ${#missing[@]} -eq 0 ] || fail "$1 needs ${missing[*]}; give them as flags or in --settings=FILE"
  [[ $NAME =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "the name '$NAME' is not lower-case letters, digits and dashes, beginning with a letter"
  for key in SLICES POLL MAX_RESTARTS; do [[ ${!key} =~ ^[0-9]+$ ]] || fail "$key is '${!key}', expected a number"; done
  [ "$SLICES" -ge 1 ] || fail "SLICES is 0, expected at least 1"
  case $PROVISIONING in spot | reserved | on-demand) ;; *) fail "provisioning is '$PROVISIONING', expected spot, reserved or on-demand" ;; esac
  case $STORAGE in "" | gs://* | *:/*) ;; *) fail "storage is '$STORAGE', expected HOST:/EXPORT or gs://BUCKET" ;; esac
  case $WORKDIR in *[,%[:space:]]*) fail "the workdir is '$WORKDIR', expected a path without commas, % and white space" ;; esac
  if [ -n "$ACCELERATOR" ] && [ -z "$RUNTIME" ]; then
    case $ACCELERATOR in
      v2-* | v3-* | v4-*) RUNTIME=tpu-ubuntu2204-base ;;
      v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
      v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
      v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
      v5e-*) fail "Google Cloud calls $ACCELERATOR v5litepod-${ACCELERATOR#*-}" ;;
      *) fail "accelerator is '$ACCELERATOR', expected v4-N, v5litepod-N, v5p-N or v6e-N; for others give --runtime too" ;;
    esac
  fi
  [ -n "$DRY_RUN" ] || command -v gcloud >/dev/null ||
    fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install, or look at the commands with --dry-run"
}

# --- gcloud: every call returns non-zero with one line in PROBLEM ---------------------------------------------------------------

quoted() {
  local word line=""
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+="$word "; else line+="'${word//\'/\'\\\'\'}' "; fi
  done
  echo "${line% }"
}

gcloud_tpus() {
  local call=(gcloud compute tpus queued-resources "$@" "--project=$PROJECT" "--zone=$ZONE")
  if [ -n "$DRY_RUN" ]; then
    quoted "${call[@]}"
    return
  fi
  if ! "${call[@]}" 2>"$scratch/stderr"; then
    PROBLEM=$(sed -n '/^\(ERROR\|error\)/,$p' "$scratch/stderr")
    PROBLEM=$(tr -s '[:space:]' ' ' <<<"${PROBLEM:-$(tail -n 5 "$scratch/stderr")}" | cut -c 1-1500)
    PROBLEM="${PROBLEM:-gcloud compute tpus queued-resources $1 failed}"
    return 1
  fi
}

# STATE: of the queued resource, or ABSENT. A dry run keeps the state that it assumes.
read_state() {
  local found=0
  if [ -n "$DRY_RUN" ]; then
    gcloud_tpus describe "$NAME" "--format=value(state.state)"
    return
  fi
  gcloud_tpus describe "$NAME" "--format=value(state.state)" >"$scratch/state" || found=$?
  if [ $found -eq 0 ]; then
    STATE=$(<"$scratch/state")
    STATE=${STATE:-UNKNOWN}
  elif grep -qiE 'NOT_FOUND|not found' <<<"$PROBLEM"; then
    STATE=ABSENT
  else
    return 1
  fi
}

on_all_hosts() {
  gcloud_tpus ssh "$NAME" --node=all --worker=all "${SSH_FLAGS[@]}" "--command=$1"
}

# WORKERS: a line for each host; SUMMARY: running, finished, stopping, stopped, fresh (to be set up or never started), or broken.
read_workers() {
  local states script=unialign/launch/tpu/worker.sh
  # shellcheck disable=SC2016
  on_all_hosts "if [ -e $script ]; then bash $script status $(quoted "${WORKDIR:-}"); else echo unialign-worker \$(hostname) absent - -; fi" >"$scratch/workers" || return
  if [ -n "$DRY_RUN" ]; then
    cat "$scratch/workers"
    return
  fi
  WORKERS=$(grep -o 'unialign-worker .*' "$scratch/workers" | sort)
  [ -n "$WORKERS" ] || { PROBLEM="the hosts of $NAME answered nothing"; return 1; }
  states=$(cut -d ' ' -f 3 <<<"$WORKERS" | sort -u | tr '\n' ' ')
  case $states in
    "running ") SUMMARY=running ;;
    "finished ") SUMMARY=finished ;;
    *running*stopped*) SUMMARY=stopping ;;
    *running*) SUMMARY=broken ;;
    *stopped*) SUMMARY=stopped ;;
    *absent* | *ready*) SUMMARY=fresh ;;
    *) SUMMARY=broken ;;
  esac
}

print_workers() { echo "${WORKERS//unialign-worker /  }"; }

# --- steps --------------------------------------------------------------------------------------------------------------------

create() {
  local flags=("--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME")
  read_state || return
  case $STATE in
    ABSENT) ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      PROBLEM="$NAME exists and is $STATE; delete it first (keep does so by itself)"
      return 1
      ;;
    *)
      say "$NAME exists already and is $STATE"
      return
      ;;
  esac
  if [ "$SLICES" -gt 1 ]; then flags+=("--node-count=$SLICES" "--node-prefix=$NAME"); else flags+=("--node-id=$NAME"); fi
  case $PROVISIONING in spot) flags+=(--spot) ;; reserved) flags+=(--reserved) ;; esac
  gcloud_tpus create "$NAME" "${flags[@]}" "${CREATE_FLAGS[@]}" || return
  [ -n "$DRY_RUN" ] || say "asked for $SLICES x $ACCELERATOR ($PROVISIONING) as $NAME"
}

wait() {
  local before=""
  if [ -n "$DRY_RUN" ]; then
    read_state
    return
  fi
  while :; do
    read_state || return
    [ "$STATE" = "$before" ] || say "$NAME is $STATE"
    before=$STATE
    case $STATE in
      ACTIVE) return ;;
      ABSENT) PROBLEM="there is no queued resource $NAME: create it first" && return 1 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) why_failed && return 1 ;;
    esac
    sleep "$POLL"
  done
}

ask_why() { gcloud_tpus describe "$NAME" "--format=value(state.failedData.error.message)"; }

# PROBLEM: the service's message about a queued resource that failed.
why_failed() {
  local reason=""
  if [ "$STATE" = FAILED ] && ask_why >"$scratch/reason"; then
    reason=$(tr -s '[:space:]' ' ' <"$scratch/reason" | sed 's/ $//')
  fi
  PROBLEM="$NAME is $STATE${reason:+: $reason}; delete it and create it again (keep does so by itself)"
}

# Copies the code of the last commit to every host; rebuilds the environment only when the requirements have changed.
setup() {
  local archive=$scratch/unialign.tgz worker=unialign/launch/tpu/worker.sh
  refuse_when_running || return
  if [ -n "$DRY_RUN" ]; then
    archive=/tmp/unialign.tgz
    quoted git status --porcelain --untracked-files=no
    quoted git archive --format=tar.gz "--output=$archive" HEAD
  else
    [ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || say "warning: changes that are not committed are not copied"
    git archive --format=tar.gz "--output=$archive" HEAD 2>"$scratch/stderr" || {
      PROBLEM="git archive: $(tr -s '[:space:]' ' ' <"$scratch/stderr")"
      return 1
    }
  fi
  gcloud_tpus scp "$archive" "$NAME:unialign.tgz" --node=all --worker=all "${SSH_FLAGS[@]}" || return
  on_all_hosts "mkdir -p unialign && tar -xzf unialign.tgz -C unialign && bash $worker setup $(quoted "$STORAGE" "$MOUNT")" || return
  [ -n "$DRY_RUN" ] || say "set up all hosts of $NAME"
}

refuse_when_running() {
  read_workers || return
  if [ -z "$DRY_RUN" ] && grep -q '^unialign-worker [^ ]* running' <<<"$WORKERS"; then
    PROBLEM="training is running already on $NAME ($(grep '^unialign-worker [^ ]* running' <<<"$WORKERS" | head -n 1 | cut -d ' ' -f 2-4)); watch it, or stop it first"
    return 1
  fi
}

start() {
  refuse_when_running || return
  if [ -z "$DRY_RUN" ] && grep -q '^unialign-worker [^ ]* absent' <<<"$WORKERS"; then
    PROBLEM="$NAME is not set up on every host: setup comes first"
    return 1
  fi
  on_all_hosts "${LOCAL_DISK:+LOCAL_DISK=1 }bash unialign/launch/tpu/worker.sh start $(quoted "--config=$CONFIG" "--workdir=$WORKDIR" "${TRAIN_FLAGS[@]}")" || return
  [ -n "$DRY_RUN" ] || say "started training in $WORKDIR"
}

status() {
  read_state || return
  [ -n "$DRY_RUN" ] || say "$NAME is $STATE"
  if [ -z "$DRY_RUN" ] && [ "$STATE" != ACTIVE ]; then return; fi
  read_workers || return
  [ -n "$DRY_RUN" ] || print_workers
}

watch() {
  status || return
  if [ -z "$DRY_RUN" ] && [ "$STATE" != ACTIVE ]; then return; fi
  # Process 0, which writes the metrics, is on the first host of the first slice.
  gcloud_tpus ssh "$NAME" --node=0 --worker=0 "${SSH_FLAGS[@]}" "--command=bash unialign/launch/tpu/worker.sh log --follow"
}

stop() {
  on_all_hosts "bash unialign/launch/tpu/worker.sh stop" >"$scratch/workers" || return
  if [ -n "$DRY_RUN" ]; then
    cat "$scratch/workers"
    return
  fi
  WORKERS=$(grep -o 'unialign-worker .*' "$scratch/workers" | sort)
  print_workers
  PROBLEM=$(sed -n 's/^unialign-worker \([^ ]*\) stopped:\([^ ]*\) .*/\1 ended with \2, not saved: start resumes from the checkpoint before/p' <<<"$WORKERS" | head -n 1)
  [ -z "$PROBLEM" ]
}

delete() {
  read_state || return
  if [ "$STATE" = ABSENT ] && [ -z "$DRY_RUN" ]; then
    say "there is no queued resource $NAME"
    return
  fi
  # --force deletes the nodes with it.
  gcloud_tpus delete "$NAME" --force --quiet || return
  [ -n "$DRY_RUN" ] || say "deleted $NAME"
}

# Looks at the state, does the next thing, and looks again; so it may be interrupted and called again at any point.
keep() {
  local misses=0 failures=0 broken=0 restarts=0 first=1 started=$SECONDS before=""
  if [ -n "$DRY_RUN" ]; then
    plan
    return
  fi
  while :; do
    if ! read_state; then
      missed || return
      continue
    fi
    [ "$STATE" = "$before" ] || say "$NAME is $STATE"
    before=$STATE
    case $STATE in
      ABSENT)
        if ! create; then
          # Waiting does not raise a quota or repair a request.
          if grep -qE 'RESOURCE_EXHAUSTED|PERMISSION_DENIED|INVALID_ARGUMENT|FAILED_PRECONDITION|[Qq]uota' <<<"$PROBLEM"; then return 1; fi
          missed || return
        fi
        continue
        ;;
      FAILED)
        why_failed
        failures=$((failures + 1))
        [ $failures -lt 3 ] || return 1
        say "$PROBLEM"
        delete || missed || return
        continue
        ;;
      SUSPENDED)
        say "$NAME was preempted: its slices are asked for again, and the run resumes from its newest checkpoint"
        delete || missed || return
        continue
        ;;
      ACTIVE) ;;
      *)
        misses=0
        sleep "$POLL"
        continue
        ;;
    esac
    failures=0
    if ! read_workers; then
      missed || return
      continue
    fi
    [ "$SUMMARY" = running ] || [ "$SUMMARY" = finished ] || print_workers
    [ "$SUMMARY" != broken ] || broken=$((broken + 1))
    case $SUMMARY in
      running)
        broken=0 misses=0
        if [ $first = 1 ]; then same_run || return; fi
        ;;
      finished)
        say "training has finished in $WORKDIR; $NAME is still rented: delete gives it back"
        return
        ;;
      stopped)
        if [ $first = 0 ]; then
          say "training was stopped on request; start or keep resumes"
          return
        fi
        begin || missed || return
        ;;
      fresh) begin || missed || return ;;
      broken)
        # Hosts end one after the other, and a preemption shows here before it shows in STATE: look again.
        if [ $broken -ge 3 ]; then
          if [ $((SECONDS - started)) -gt 1800 ]; then restarts=0; fi
          restarts=$((restarts + 1))
          if [ $restarts -gt "$MAX_RESTARTS" ]; then
            PROBLEM="training ended $restarts times soon after its start; the last words: $(cut -d ' ' -f 2,3,5- <<<"$WORKERS" | head -n 1)"
            return 1
          fi
          say "training broke off: starting it again on the same slices ($restarts of $MAX_RESTARTS)"
          broken=0
          { end && begin; } || missed || return
        fi
        ;;
    esac
    first=0
    sleep "$POLL"
  done
}

# Within keep: ends the remaining processes of a run that failed.
end() { on_all_hosts "bash unialign/launch/tpu/worker.sh end"; }

# Within keep: sets up and starts.
begin() {
  setup && start || return
  started=$SECONDS misses=0
}

# Within keep: a problem that may pass, such as the network; five in a row end keep, and training continues without it.
missed() {
  misses=$((misses + 1))
  [ "$misses" -lt 5 ] || return 1
  say "warning: $PROBLEM (try $misses of 5)"
  sleep "$POLL"
}

same_run() {
  local other
  other=$(cut -d ' ' -f 4 <<<"$WORKERS" | sort -u | head -n 1)
  [ "$other" = "$WORKDIR" ] || { PROBLEM="$NAME trains in $other, not in $WORKDIR; stop it first" && return 1; }
  say "training is running in $WORKDIR"
}

plan() {
  echo "# when there is no queued resource $NAME"
  create
  echo "# until it is ACTIVE, every $POLL s"
  wait
  echo "# when no training is running there"
  STATE=ACTIVE
  setup
  start
  echo "# then every $POLL s, until all hosts have finished"
  status
  echo "# when the run broke off"
  end
  setup
  start
  echo "# when it FAILED"
  ask_why
  echo "# when it was preempted (SUSPENDED) or FAILED, this, and all from the top"
  delete
}

command=${1:-}
case $command in
  create | wait | setup | start | status | watch | stop | delete | keep) shift ;;
  --help | -h | help)
    usage
    exit
    ;;
  *)
    echo "error: ${command:+unknown command $command; }expected create, wait, setup, start, status, watch, stop, delete or keep; --help explains" >&2
    exit 2
    ;;
esac
case " $* " in *" --help "*)
  usage
  exit
  ;;
esac
[ "${BASH_VERSINFO[0]}" -ge 5 ] || fail "this is bash $BASH_VERSION; version 5 is needed"
read_settings "$@"
check_settings "$command"
cd "$(dirname "$0")/../.." || exit 1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$command" || fail "$PROBLEM"
