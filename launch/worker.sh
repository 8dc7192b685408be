#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on each worker: training in the background, under launch/local.sh.
#
#   launch/worker.sh start [--again] [--logs DIR] [--dry-run] -- TRAINING ARGUMENTS
#                              --again: saves and ends first what runs
#   launch/worker.sh stop      saves and ends; waits for that
#   launch/worker.sh status    running, stopped (by stop), the exit status of what has ended, or
#                              lost: nothing runs, since nothing was started or the VM restarted
#
# The log is ~/.twinflow/log; every minute and at the end it is copied to --logs, a folder or
# gs://BUCKET/FOLDER, as HOSTNAME.log.
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

state=${TWINFLOW_STATE:-$HOME/.twinflow}

alive() { # the process number may be another's after the VM restarted
  [[ -s $state/pid ]] && tr '\0' ' ' 2>/dev/null <"/proc/$(<"$state/pid")/cmdline" | grep -q local.sh
}

stop() {
  alive && kill -TERM "$(<"$state/pid")"
  while alive; do sleep 1; done
}

copy() {
  case $logs in
    '') ;;
    gs://*) gcloud storage cp "$state/log" "${logs%/}/$(hostname).log" >/dev/null 2>&1 ;;
    *) mkdir -p "$logs" && cp "$state/log" "$logs/$(hostname).log" ;;
  esac
}

verb=${1:-} logs='' dry='' again=''
shift
while (($#)); do
  case $1 in
    --logs) logs=${2:-} && shift ;;
    --dry-run) dry=yes ;;
    --again) again=yes ;;
    --) shift && break ;;
    *) fail "unknown argument '$1' (launch/worker.sh --help)" ;;
  esac
  shift
done
cd "$(dirname "$0")/.." || exit 1
self=$PWD/launch/worker.sh # $0 was relative to where we came from
[[ -d .venv ]] && PATH=$PWD/.venv/bin:$PATH

case $verb in
  -h | --help) usage ;;
  start)
    (($#)) || fail "start needs -- and the training arguments"
    if [[ $dry ]]; then
      launch/local.sh --dry-run "$@"
      exit
    fi
    [[ $again ]] && stop
    alive && fail "training runs here already"
    mkdir -p "$state" || exit 1
    rm -f "$state/status" "$state/stopped" "$state/pid"
    setsid "$self" supervise --logs "$logs" -- "$@" </dev/null >>"$state/log" 2>&1 &
    for ((i = 0; i < 300; i++)); do
      [[ -s $state/pid ]] && exit
      sleep .1
    done
    fail "training did not start; see $state/log"
    ;;
  supervise)
    launch/local.sh "$@" &
    echo $! >"$state/pid"
    while sleep 60; do copy; done &
    copying=$!
    wait "$(<"$state/pid")"
    echo $? >"$state/status"
    kill "$copying"
    copy
    ;;
  stop)
    mkdir -p "$state" && touch "$state/stopped"
    stop
    ;;
  status)
    if alive; then
      echo running
    elif [[ -e $state/stopped ]]; then
      echo stopped
    else
      cat "$state/status" 2>/dev/null || echo lost
    fi
    ;;
  *) fail "give start, stop or status (launch/worker.sh --help)" ;;
esac
