#!/usr/bin/env bash
# Trains on this machine until the run is complete: starts again after a crash or a preemption,
# from the last checkpoint. Ctrl-C, SIGTERM and a refused config (exit status 2) end it.
#
#   launch/local.sh --config configs/mnist.py --workdir runs/mnist
#   launch/local.sh --dry-run --config ...    prints the command and does nothing
set -u

if [[ "${1:-}" == "--dry-run" ]]; then
  shift
  echo "python -m twinflow_jax.train $*"
  exit 0
fi

training=
trap '[[ -n $training ]] && kill -TERM "$training"' TERM
status=1
for attempt in 1 2 3 4 5; do
  python -m twinflow_jax.train "$@" &
  training=$!
  wait "$training"
  status=$?
  if kill -0 "$training" 2>/dev/null; then # a signal cut the wait short; training is saving
    wait "$training"
    status=$?
  fi
  case $status in
    0 | 2 | 130 | 143) exit "$status" ;;
  esac
  echo "launch: training ended with status $status (attempt $attempt of 5)" >&2
  sleep 2
done
exit "$status"
