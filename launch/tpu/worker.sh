#!/usr/bin/env bash
# launch/tpu/tpu.sh runs this on every host of a TPU slice, from the code that it copied there.
#
#   bash launch/tpu/worker.sh setup [STORAGE MOUNT]    environment, and the shared storage mounted
#   bash launch/tpu/worker.sh start --config=... --workdir=...    train.py in the background, beyond the end of the ssh session
#   bash launch/tpu/worker.sh status [WORKDIR]         one line: unialign-worker HOST STATE WORKDIR LAST_LINE_OF_LOG
#   bash launch/tpu/worker.sh log [--follow]
#   bash launch/tpu/worker.sh stop                     SIGTERM, and waits for train.py to save and end; may be repeated
#   bash launch/tpu/worker.sh end                      the same, but the run counts as failed, not as stopped on request
#
# STATE is absent (not set up), ready, running, finished, stopped (saved), stopped:CODE (asked to stop, but ended with CODE and not
# saved), failed:CODE, or lost (gone without an exit code: the host was restarted). The log and these marks are in ~/unialign-run.
set -uo pipefail

run=$HOME/unialign-run
host=$(hostname)

fail() {
  echo "error: $host: $*" >&2
  exit 1
}

find_python() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  # The TPU images of Ubuntu 22.04 have Python 3.10.
  python3 -m pip install --quiet --user uv >&2 && "$HOME/.local/bin/uv" python install --quiet 3.12 >&2 &&
    "$HOME/.local/bin/uv" python find 3.12
}

apt_install() {
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=600 install "$@"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc address=https://packages.cloud.google.com/apt
  curl -fsS "$address/doc/apt-key.gpg" | sudo tee "$key" >/dev/null || return
  echo "deb [signed-by=$key] $address gcsfuse-$(lsb_release -c -s) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt_install gcsfuse
}

mount_storage() {
  local storage=$1 folder=$2
  [ -n "$storage" ] || return 0
  if mountpoint -q "$folder"; then return 0; fi
  if ! { sudo mkdir -p "$folder" && sudo chown "$(id -u):$(id -g)" "$folder"; }; then fail "cannot make $folder"; fi
  case $storage in
    gs://*)
      if ! command -v gcsfuse >/dev/null; then install_gcsfuse >&2 || fail "cannot install gcsfuse"; fi
      # No cached metadata: a host must see at once the files that another one wrote.
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "${storage#gs://}" "$folder" >&2 || fail "cannot mount $storage on $folder"
      ;;
    *:/*)
      if ! command -v mount.nfs >/dev/null; then apt_install nfs-common >&2 || fail "cannot install nfs-common"; fi
      sudo mount -t nfs -o hard,noatime "$storage" "$folder" || fail "cannot mount $storage on $folder"
      # The root of a new Filestore share belongs to root.
      [ -w "$folder" ] || sudo chmod 0777 "$folder"
      ;;
    *) fail "storage is '$storage', expected gs://BUCKET or HOST:/EXPORT" ;;
  esac
}

setup() {
  local python
  [ "$(state)" != running ] || fail "training is running; stop it before setting up"
  mount_storage "${1:-}" "${2:-/mnt/unialign}"
  python=$(find_python) || fail "no Python 3.11 or newer, and none could be installed"
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  PYTHON=$python make_environment requirements.txt launch/tpu/requirements.txt || fail "cannot install the requirements"
  mkdir -p "$run"
  touch "$run/set-up"
  echo "$host is set up"
}

# A process id means nothing after a restart of the host, so it is kept with the boot's id.
boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; }

state() {
  local pid="" booted="" code=lost
  if [ -e "$run/pid" ]; then read -r pid booted <"$run/pid"; fi
  if [ -n "$pid" ] && [ "$booted" = "$(boot)" ] && [ ! -e "$run/exit" ] && kill -0 "$pid" 2>/dev/null; then
    echo running
  elif [ -n "$pid" ]; then
    if [ -e "$run/exit" ]; then code=$(<"$run/exit"); fi
    case $([ ! -e "$run/stop" ] || echo stop):$code in
      *:0) echo finished ;;
      # 128 + SIGTERM or SIGINT: train.py has saved.
      stop:143 | stop:130) echo stopped ;;
      stop:*) echo "stopped:$code" ;;
      :lost) echo lost ;;
      *) echo "failed:$code" ;;
    esac
  elif [ -e "$run/set-up" ]; then
    echo ready
  else
    echo absent
  fi
}

status() {
  local now workdir=-
  now=$(state)
  if [ -e "$run/workdir" ]; then workdir=$(<"$run/workdir"); fi
  # The state of an earlier run in another folder says nothing about this one.
  if [ -n "${1:-}" ] && [ "$workdir" != "$1" ] && [ "$now" != running ] && [ "$now" != absent ]; then now=ready workdir=$1; fi
  echo "unialign-worker $host $now $workdir $(tail -n 1 "$run/train.log" 2>/dev/null | tr -d '\r' | cut -c 1-200)"
}

start() {
  local argument workdir="" disk
  [ "$(state)" != running ] || fail "training is running already (workdir $(<"$run/workdir"))"
  [ -x .venv/bin/python ] || fail "not set up: run setup first"
  for argument; do
    case $argument in --workdir=*) workdir=${argument#*=} ;; esac
  done
  [ -n "$workdir" ] || fail "start needs --workdir=DIR"
  if [ -z "${LOCAL_DISK:-}" ] && [[ $workdir != gs://* ]]; then
    mkdir -p "$workdir" || fail "cannot make $workdir"
    disk=$(stat --file-system --format=%T "$workdir")
    case $disk in
      nfs* | fuse* | lustre | ceph | gpfs | smb* | cifs) ;;
      *) fail "$workdir is on a disk of this host alone ($disk), which goes with the slice; use --storage, or --local-disk on a single host" ;;
    esac
  fi
  mkdir -p "$run"
  rm -f "$run/pid" "$run/exit" "$run/stop" "$run/asked"
  echo "$workdir" >"$run/workdir"
  nohup setsid bash launch/tpu/worker.sh supervise "$@" </dev/null >/dev/null 2>&1 &
  for _ in $(seq 100); do
    [ -s "$run/pid" ] && break
    sleep 0.1
  done
  [ -s "$run/pid" ] || fail "training did not start"
  echo "$host started train.py"
}

# Runs train.py and keeps its exit code. A shutdown sends SIGTERM to this shell too, but it must outlive train.py.
supervise() {
  local pid code
  trap : TERM HUP
  echo "== $(date -Is) train.py $*" >>"$run/train.log"
  .venv/bin/python launch/train.py --noprogress "$@" >>"$run/train.log" 2>&1 &
  pid=$!
  echo "$pid $(boot)" >"$run/pid"
  while
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null
  do :; done
  echo "$code" >"$run/exit.new"
  mv "$run/exit.new" "$run/exit"
}

end() {
  local pid grace=${GRACE:-600} deadline
  [ "$(state)" = running ] || return 0
  read -r pid _ <"$run/pid"
  # Once: a second signal would end train.py at once, in the middle of its save.
  if (set -o noclobber && : >"$run/asked") 2>/dev/null; then kill -TERM "$pid"; fi
  deadline=$((SECONDS + grace))
  while [ "$(state)" = running ] && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
  if [ "$(state)" = running ]; then
    echo "warning: $host: train.py did not end within $grace s and is killed" >&2
    kill -KILL "$pid"
  fi
  # The exit code is written shortly after the process ends.
  for _ in $(seq 50); do
    [ ! -e "$run/exit" ] || break
    sleep 0.1
  done
}

stop() {
  # First the mark, also for a run that has failed: then keep does not restart it, even if this shell is interrupted.
  if [ -e "$run/pid" ]; then touch "$run/stop"; fi
  end
  case $(state) in stopped:*) echo "warning: $host: train.py ended with $(state | cut -d : -f 2), not saved" >&2 ;; esac
  status ""
}

log() {
  [ -e "$run/train.log" ] || fail "there is no log yet"
  if [ "${1:-}" = --follow ]; then exec tail -n 50 -F "$run/train.log"; fi
  tail -n 50 "$run/train.log"
}

cd "$(dirname "$0")/../.." || exit 1
case ${1:-} in
  setup | start | status | log | stop | end | supervise) "$@" ;;
  *)
    sed -n '2,13s/^# \{0,1\}//p' "launch/tpu/worker.sh"
    [ "${1:-}" = --help ] || exit 2
    ;;
esac
