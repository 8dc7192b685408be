#!/usr/bin/env bash
# Trains on Cloud TPU VMs: a queued resource with one or more slices, through gcloud.
#
#   launch/tpu_vm.sh VERB --name NAME --zone ZONE [OPTIONS] [-- TRAINING ARGUMENTS]
#
# create       ask for the TPUs and wait until they are there
# install      copy this checkout to all workers and install it
# run          train on all workers, in the background; a crash starts again from the last
#              checkpoint, 5 attempts in all
# watch        run, and stay until the run is complete: starts again after an interruption, and
#              asks again for TPUs that were preempted
# status       what each worker does: running, stopped, lost (restarted), bare (not installed),
#              or the exit status of what has ended
# logs         follow the log of a worker (--worker I, default 0)
# tensorboard  of --workdir, at http://localhost:6006
# stop         save on all workers, and end
# delete       give the TPUs back
#
#   --project PROJECT                      default: gcloud's
#   --type v5p-128 --runtime v2-alpha-tpuv5    (create, watch) accelerator type, runtime version
#   --spot, --reserved                     (create, watch) cheaper and preemptible; a reservation
#   --slices N                             (create, watch) default 1
#   --mount COMMAND                        (run, watch) mounts the shared storage, on each worker,
#                                          before training; harmless where it is mounted
#   --logs DIR                             (run, watch) a folder or gs://BUCKET/FOLDER for a copy
#                                          of the logs
#   --dry-run                              print the commands and do nothing
#
# Arguments that begin with a verb are that one's: evaluate suite draw ... --out DIR has every
# worker draw its share of a suite (docs/evaluation.md).
#
# --workdir and every folder in the config must be on storage that all workers see under the same
# path: a bucket (gs://BUCKET/FOLDER), or Filestore (NFS). See docs/pods.md.
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

POLL=${TWINFLOW_POLL:-60} # seconds between two looks

verb=${1:-}
case $verb in
  -h | --help) usage ;;
  create | install | run | watch | status | logs | tensorboard | stop | delete) shift ;;
  *) fail "give a verb (launch/tpu_vm.sh --help)" ;;
esac
name='' zone='' project='' type='' runtime='' slices=1 mount='' logs='' worker=0 dry=''
workdir='' capacity=()
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --spot | --reserved) capacity+=("$1") ;;
    --name | --zone | --project | --type | --runtime | --slices | --mount | --logs | --worker | \
      --workdir)
      value "$@"
      shift
      ;;
    --) shift && break ;;
    *) fail "unknown argument '$1'; training arguments come after -- (launch/tpu_vm.sh --help)" ;;
  esac
  shift
done
[[ $name ]] || fail "give --name"
[[ $zone ]] || fail "give --zone"
((${#capacity[@]} < 2)) || fail "give --spot or --reserved, not both"
if [[ $verb =~ ^(create|watch)$ && ! ($type && $runtime) ]]; then
  fail "$verb needs --type and --runtime"
elif [[ $verb =~ ^(run|watch)$ && $# == 0 ]]; then
  fail "$verb needs -- and the training arguments"
elif [[ $verb == tensorboard && ! $workdir ]]; then
  fail "tensorboard needs --workdir"
fi
training=("$@")
place=(--zone "$zone")
[[ $project ]] && place+=(--project "$project")

resource() { # resource VERB [FLAGS]: gcloud's command for the queued resource
  run gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"
}

on_all() {
  resource ssh --node=all --worker=all --command "$1"
}

create() {
  local nodes=(--node-id "$name")
  ((slices > 1)) && nodes=(--node-count "$slices" --node-prefix "$name")
  resource create "${nodes[@]}" --accelerator-type "$type" --runtime-version "$runtime" \
    ${capacity[@]+"${capacity[@]}"}
}

state() {
  resource describe --format 'value(state.state)'
}

await() {
  local now
  if [[ $dry ]]; then
    state
    return
  fi
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now =~ ^(FAILED|SUSPENDING|SUSPENDED)$ ]] && fail "the request for $name is $now"
    echo "launch: $name is $now" >&2
    sleep "$POLL"
  done
  [[ $now == ACTIVE ]] || fail "no state of $name to be had"
}

delete() { # --force: with its nodes
  resource delete --force --quiet
}

# The tracked files and those that git does not ignore, as they are now. Ubuntu 22.04 of the TPU
# runtimes has Python 3.10: uv brings a newer one.
install() {
  local root folder status
  root=$(cd "$(dirname "$0")/.." && pwd)
  folder=$(mktemp -d)
  run bash -c "git -C $(quote "$root") ls-files -z --cached --others --exclude-standard |
    tar -C $(quote "$root") --null -T - -czf $(quote "$folder/twinflow.tar.gz")" &&
    run gcloud compute tpus queued-resources scp "$folder/twinflow.tar.gz" "$name:" \
      "${place[@]}" --node=all --worker=all &&
    on_all "mkdir -p twinflow && tar -xzf twinflow.tar.gz -C twinflow && cd twinflow &&
      python3 -m pip install -q --user uv &&
      ~/.local/bin/uv venv -q --allow-existing --python 3.12 .venv &&
      ~/.local/bin/uv pip install -q -p .venv -c constraints.txt -e '.[pod]' tensorboard &&
      touch .venv/installed"
  status=$?
  rm -r "$folder"
  return $status
}

start() { # --again: ends first what runs
  on_all "${mount:+$mount && }twinflow/launch/worker.sh start $(
    quote "$@" ${logs:+--logs "$logs"} -- "${training[@]}" --coordinator auto
  )"
}

# shellcheck disable=SC2016 # $(...) is for the workers
statuses() { # one line per worker
  on_all 'if [ -e twinflow/.venv/installed ]; then
      echo "training: $(twinflow/launch/worker.sh status)"
    else
      echo "training: bare"
    fi'
}

stop() {
  on_all "twinflow/launch/worker.sh stop"
}

# Looks at the queued resource and at all workers, and does what is due, until the run is over.
watch() {
  local now found
  if [[ $dry ]]; then
    for step in state statuses 'start --again' delete create install; do $step; done
    return
  fi
  while true; do
    now=$(state)
    case $now in
      ACTIVE)
        # A worker that does not answer is restarting: what its peers say can wait.
        found=$(statuses) || found=''
        found=" $(sed -n 's/.*training: \(.\)/\1/p' <<<"$found" | sort -u | tr '\n' ' ')"
        echo "launch: workers:$found" >&2
        case $found in
          *' bare '*) install && start --again ;;
          *' lost '*) start --again ;; # a VM restarted: its peers wait for it, or gave up
          *' running '*) ;;
          *' stopped '*) exit 0 ;;
          ' 0 ') exit 0 ;;
          *' 2 '*) fail "training was refused (launch/tpu_vm.sh logs)" ;;
          ' ') ;;
          *' 130 '* | *' 143 '*) start --again ;; # saved before a maintenance
          *) fail "training failed in all its attempts (launch/tpu_vm.sh logs)" ;;
        esac
        ;;
      SUSPENDED | FAILED)
        echo "launch: $name is $now: asking again" >&2
        delete
        until create; do sleep "$POLL"; done
        ;;
      *) echo "launch: $name is ${now:-not to be seen}" >&2 ;;
    esac
    sleep "$POLL"
  done
}

case $verb in
  create) create && await ;;
  run) start ;;
  status) statuses ;;
  logs) resource ssh --node=0 --worker="$worker" --command 'tail -n 100 -F .twinflow/log' ;;
  tensorboard)
    resource ssh --node=0 --worker=0 --ssh-flag=-L6006:localhost:6006 \
      --command "twinflow/.venv/bin/tensorboard --logdir $(quote "$workdir")"
    ;;
  *) "$verb" ;;
esac
