#!/usr/bin/env bash
# Trains on this machine until the run is complete. After a crash it starts again from the last
# checkpoint, 5 attempts in all. A complete run (exit status 0), a refused config (2), Ctrl-C and
# SIGTERM (130, 143: the state is saved) end it.
#
#   launch/local.sh --config configs/mnist.py --workdir runs/mnist
#   launch/local.sh --processes 2 --config configs/mnist.py --workdir runs/mnist
#   launch/local.sh --processes 2 evaluate suite draw geneval ... --out pictures/geneval
#
# --processes N   N processes joined into one run, each with its part of the devices: of the GPUs,
#                 or of the CPU devices that XLA_FLAGS simulates. When one dies, all start again.
#                 Each writes WORKDIR.logs/process_I.log (here, where that is in a bucket), the
#                 first also to the terminal. TPUs
#                 need one process per machine.
# --dry-run       print the commands and do nothing
#
# Everything else goes to `python -m twinflow_jax.train`, or to the verb that it begins with, whose
# --out then stands for --workdir; --processes too where --coordinator is given, for a run over
# several machines that start this script each.
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

ATTEMPTS=5
GRACE=10 # seconds that the others have to end after one has died

dry='' workdir='' config='' coordinator='' processes=1 arguments=()
for argument in "$@"; do
  [[ $argument == --coordinator* ]] && coordinator=yes
done
while (($#)); do
  case $1 in
    -h | --help) usage ;;
    --dry-run) dry=yes ;;
    --processes=*) set -- "$1" --processes "${1#*=}" "${@:2}" ;;
    --processes)
      if [[ $coordinator ]]; then
        arguments+=("$1")
      else
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--processes takes a number, 1 or more"
        processes=$2
        shift
      fi
      ;;
    *)
      arguments+=("$1")
      case $1 in
        --config) config=${2:-} ;;
        --config=*) config=${1#*=} ;;
        --workdir | --out) workdir=${2:-} ;;
        --workdir=* | --out=*) workdir=${1#*=} ;;
      esac
      ;;
  esac
  shift
done
verb=train what=training place=--workdir
if [[ ${arguments[0]:-} =~ ^[a-z]+$ ]]; then
  verb=${arguments[0]} what=$verb place=--out
  arguments=("${arguments[@]:1}")
elif [[ ! $config ]]; then
  fail "give --config FILE (launch/local.sh --help)"
fi
[[ $workdir ]] || fail "give $place DIR (launch/local.sh --help)"
workdir=${workdir/#~\//"$HOME/"} # the shell leaves --workdir=~/runs alone
logs=${workdir%/}.logs
[[ $logs == gs://* ]] && logs=${logs##*/}

# shares[I]: the setting that gives process I its part of the devices, where they can be divided.
shares=()
if ((processes > 1)); then
  simulated='--xla_force_host_platform_device_count='
  if [[ ${JAX_PLATFORMS:-} == cpu && ${XLA_FLAGS:-} =~ $simulated([0-9]+) ]]; then
    total=${BASH_REMATCH[1]} each=$((BASH_REMATCH[1] / processes))
    for ((i = 0; i < processes; i++)); do
      shares+=("XLA_FLAGS=${XLA_FLAGS/$simulated$total/$simulated$each}")
    done
  elif [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
    gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)}
    IFS=, read -ra gpus <<<"$gpus"
    total=${#gpus[@]} each=$((${#gpus[@]} / processes))
    for ((i = 0; i < processes; i++)); do
      shares+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i * each:each}")")
    done
  fi
  if ((${#shares[@]})) && ((each == 0 || total % processes)); then
    fail "--processes $processes does not divide the $total devices"
  fi
fi

# A port of this machine that nobody listens on.
find_port() {
  port=$((20000 + RANDOM % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    port=$((20000 + RANDOM % 10000))
  done
}

# Sets `command` to what process $1 runs.
build() {
  command=(python -m "twinflow_jax.$verb" "${arguments[@]}")
  if ((processes > 1)); then
    command+=(--coordinator "127.0.0.1:$port" --processes "$processes" --process "$1")
    ((${#shares[@]})) && command=(env "${shares[$1]}" "${command[@]}")
  fi
}

if [[ $dry ]]; then
  ((processes > 1)) && find_port && run mkdir -p "$logs"
  for ((i = 0; i < processes; i++)); do
    build "$i"
    line=$(quote "${command[@]}")
    ((processes > 1)) && line+=" >> $(quote "$logs/process_$i.log") 2>&1"
    echo "$line"
  done
  exit 0
fi

# A signal goes to the processes once each: with job control each is in a group of its own, which
# the terminal's Ctrl-C does not reach. A second one would end them before they have saved.
set -m
running=() stopping='' starting='' pending=''
# shellcheck disable=SC2329 # called by the traps
forward() {
  stopping=yes
  if [[ $starting ]]; then
    pending=$1 # until all processes are known
  elif ((${#running[@]})); then
    kill "-$1" "${running[@]}" 2>/dev/null
  fi
}
trap 'forward INT' INT
trap 'forward TERM' TERM HUP

pause() { # interrupted by signals, unlike a sleep in the foreground
  sleep "$1" &
  wait $!
}

# Starts all processes, waits until all have ended, and sets `status` to the first failure's.
attempt() {
  local i pid deadline='' alive
  status=0 running=() starting=yes
  find_port
  for ((i = 0; i < processes; i++)); do
    build "$i"
    if ((processes == 1)); then
      "${command[@]}" &
    elif ((i == 0)); then
      "${command[@]}" > >(tee -a "$logs/process_0.log") 2>&1 &
    else
      "${command[@]}" >>"$logs/process_$i.log" 2>&1 &
    fi
    running+=($!)
  done
  starting=''
  [[ $pending ]] && forward "$pending" && pending=''
  while ((${#running[@]})); do
    alive=()
    for pid in "${running[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        alive+=("$pid")
      else
        wait "$pid"
        i=$?
        ((status == 0)) && status=$i
      fi
    done
    running=(${alive[@]+"${alive[@]}"})
    ((${#running[@]})) || return
    case $status in
      0 | 130 | 143) ;; # the others are ending too, perhaps still saving
      *)
        if [[ ! $deadline ]]; then
          deadline=$((SECONDS + GRACE))
          kill -TERM "${running[@]}" 2>/dev/null
        elif ((SECONDS > deadline)); then
          kill -KILL "${running[@]}" 2>/dev/null
        fi
        ;;
    esac
    pause .2
  done
}

if ((processes > 1)); then
  mkdir -p "$logs" || fail "cannot make the folder $logs"
fi
for ((attempts = 1; attempts <= ATTEMPTS; attempts++)); do
  attempt
  case $status in
    0 | 2 | 130 | 143) exit "$status" ;;
  esac
  [[ $stopping ]] && exit "$status"
  echo "launch: $what ended with status $status (attempt $attempts of $ATTEMPTS)" >&2
  pause 2
  [[ $stopping ]] && exit 143
done
exit "$status"
