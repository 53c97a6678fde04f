#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: fills in launch/tpu/jobset.yaml and hands it to kubectl.
#
#   bash launch/tpu/jobset.sh apply --name=stage1 --image=us-docker.pkg.dev/me/unialign/unialign:1 --accelerator=v5e \
#     --topology=16x16 --slices=2 --spot --claim=unialign-filestore --config=configs/stage1.py --workdir=/mnt/unialign/runs/stage1
#
#   apply    starts it; updates an existing JobSet of that name where Kubernetes allows it; refuses one that has ended
#   render   prints the manifest
#   status   the JobSet and its pods
#   watch    follows the log of the first host
#   delete   stops it; train.py saves first, and its pods go after that: prints the command that waits for them
#
# Options: --name --namespace (default) --image --accelerator=v4|v5e|v5p|v6e --topology (as on the node pool, 16x16 or 4x4x8)
# --slices (1) --chips-per-host (4) --spot --claim (a PersistentVolumeClaim, ReadWriteMany) --mount (/mnt/unialign) --config
# --workdir (on the mount) --max-restarts (10) --grace (600, seconds for the last save) --dry-run (prints the commands). Arguments
# after "--" go to train.py. The image is made by launch/tpu/Dockerfile; needs kubectl with the cluster's credentials.
set -uo pipefail

NAME="" NAMESPACE=default IMAGE="" ACCELERATOR="" TOPOLOGY="" SLICES=1 CHIPS=4 SPOT="" CLAIM="" MOUNT=/mnt/unialign
CONFIG="" WORKDIR="" MAX_RESTARTS=10 GRACE=600 DRY_RUN="" TRAIN_FLAGS=()

fail() {
  echo "error: $*" >&2
  exit 1
}

usage() { sed -n '2,18s/^# \{0,1\}//p' "$0"; }

read_flags() {
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) NAME=${1#*=} ;;
      --namespace=*) NAMESPACE=${1#*=} ;;
      --image=*) IMAGE=${1#*=} ;;
      --accelerator=*) ACCELERATOR=${1#*=} ;;
      --topology=*) TOPOLOGY=${1#*=} ;;
      --slices=*) SLICES=${1#*=} ;;
      --chips-per-host=*) CHIPS=${1#*=} ;;
      --spot) SPOT=1 ;;
      --claim=*) CLAIM=${1#*=} ;;
      --mount=*) MOUNT=${1#*=} ;;
      --config=*) CONFIG=${1#*=} ;;
      --workdir=*) WORKDIR=${1#*=} ;;
      --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
      --grace=*) GRACE=${1#*=} ;;
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
}

check_flags() {
  local missing=() key
  [ -n "$NAME" ] || missing+=(--name)
  case $1 in apply | render)
    for key in IMAGE ACCELERATOR TOPOLOGY CLAIM CONFIG WORKDIR; do [ -n "${!key}" ] || missing+=("--${key,,}"); done
    ;;
  esac
  [ ${#missing[@]} -eq 0 ] || fail "$1 needs ${missing[*]}"
  # 40 letters: JobSet makes longer names from it.
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "the name '$NAME' is not at most 40 lower-case letters, digits and dashes"
  for key in SLICES CHIPS MAX_RESTARTS GRACE; do [[ ${!key} =~ ^[0-9]+$ ]] || fail "$key is '${!key}', expected a number"; done
  [ "$SLICES" -ge 1 ] && [ "$CHIPS" -ge 1 ] || fail "SLICES and CHIPS must be at least 1"
}

# The manifest, with its lines chosen and its names filled in.
render() {
  local kind chips line text="" argument arguments=""
  case $ACCELERATOR in
    v4) kind=tpu-v4-podslice ;;
    v5e) kind=tpu-v5-lite-podslice ;;
    v5p) kind=tpu-v5p-slice ;;
    v6e) kind=tpu-v6e-slice ;;
    *) fail "accelerator is '$ACCELERATOR', expected v4, v5e, v5p or v6e" ;;
  esac
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "topology is '$TOPOLOGY', expected one such as 16x16 or 4x4x8"
  chips=$((${TOPOLOGY//x/*}))
  [ $((chips % CHIPS)) -eq 0 ] || fail "a slice of $TOPOLOGY has $chips chips, not a multiple of $CHIPS a host; see --chips-per-host"
  case $WORKDIR in "$MOUNT"/*) ;; *) fail "--workdir=$WORKDIR is not under --mount=$MOUNT, where all hosts see it" ;; esac
  for argument in "--config=$CONFIG" "--workdir=$WORKDIR" "${TRAIN_FLAGS[@]}"; do
    argument=${argument//\\/\\\\}
    arguments+=", \"${argument//\"/\\\"}\""
  done
  while IFS= read -r line; do
    case $line in
      *"# only: spot") [ -n "$SPOT" ] || continue && line=${line% # only: spot} ;;
    esac
    text+=$line$'\n'
  done <"$(dirname "$0")/jobset.yaml"
  text=${text//__NAME__/"$NAME"}
  text=${text//__NAMESPACE__/"$NAMESPACE"}
  text=${text//__MAX_RESTARTS__/"$MAX_RESTARTS"}
  text=${text//__SLICES__/"$SLICES"}
  text=${text//__HOSTS__/$((chips / CHIPS))}
  text=${text//__GRACE__/"$GRACE"}
  text=${text//__ACCELERATOR__/"$kind"}
  text=${text//__TOPOLOGY__/"$TOPOLOGY"}
  text=${text//__IMAGE__/"$IMAGE"}
  text=${text//__CHIPS__/"$CHIPS"}
  text=${text//__MOUNT__/"$MOUNT"}
  text=${text//__CLAIM__/"$CLAIM"}
  text=${text//__ARGUMENTS__/"[${arguments#, }]"}
  printf %s "$text"
}

kubectl_run() {
  if [ -n "$DRY_RUN" ]; then
    printf 'kubectl'
    printf ' %q' "$@"
    echo
    return
  fi
  command -v kubectl >/dev/null || fail "kubectl is not installed; see https://kubernetes.io/docs/tasks/tools, or look with --dry-run"
  local problem
  exec 3>&1
  problem=$(kubectl "$@" 2>&1 >&3) || fail "kubectl $1: $(tr -s '[:space:]' ' ' <<<"$problem")"
  exec 3>&-
  [ -z "$problem" ] || echo "$problem" >&2
}

jobset=jobset.sigs.k8s.io
# The conditions of a JobSet, such as Completed; nothing where there is none.
conditions() {
  kubectl_run get jobset "$NAME" "--namespace=$NAMESPACE" --ignore-not-found '--output=jsonpath={.status.conditions[?(@.status=="True")].type}'
}

command=${1:-}
case $command in
  apply | render | status | watch | delete) shift ;;
  --help | -h | help)
    usage
    exit
    ;;
  *)
    echo "error: ${command:+unknown command $command; }expected apply, render, status, watch or delete; --help explains" >&2
    exit 2
    ;;
esac
case " $* " in *" --help "*)
  usage
  exit
  ;;
esac
[ "${BASH_VERSINFO[0]}" -ge 5 ] || fail "this is bash $BASH_VERSION; version 5 is needed"
read_flags "$@"
check_flags "$command"
case $command in
  render) render ;;
  apply)
    manifest=$(render) || exit
    ended=$(conditions) || exit
    if [ -n "$DRY_RUN" ]; then
      printf '%s\n' "$ended" "$manifest"
    else
      case " $ended " in *" Completed "* | *" Failed "*)
        fail "the JobSet $NAME has ended ($ended) and does not start again: delete it first; the run in $WORKDIR resumes from its newest checkpoint"
        ;;
      esac
    fi
    kubectl_run apply -f - <<<"$manifest"
    ;;
  status)
    kubectl_run get jobset "$NAME" "--namespace=$NAMESPACE"
    kubectl_run get pods "--namespace=$NAMESPACE" "--selector=$jobset/jobset-name=$NAME" -o wide
    ;;
  # Process 0 is the first host of the first slice.
  watch) kubectl_run logs "--namespace=$NAMESPACE" "--selector=$jobset/jobset-name=$NAME,$jobset/job-index=0,batch.kubernetes.io/job-completion-index=0" --follow --tail=50 ;;
  delete)
    kubectl_run delete jobset "$NAME" "--namespace=$NAMESPACE" --ignore-not-found
    echo "# until its pods have saved and are gone; before that, leave their nodes where they are"
    echo "kubectl wait --for=delete pods --namespace=$NAMESPACE --selector=$jobset/jobset-name=$NAME --timeout=${GRACE}s"
    ;;
esac
