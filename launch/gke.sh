#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster that xpk made (`xpk cluster create`), through xpk.
#
#   launch/gke.sh create --name NAME --cluster CLUSTER --type TYPE [OPTIONS] -- TRAINING ARGUMENTS
#   launch/gke.sh list --cluster CLUSTER
#   launch/gke.sh logs --name NAME          of the first worker of each slice, through kubectl
#   launch/gke.sh delete --name NAME --cluster CLUSTER
#
#   --zone ZONE, --project PROJECT   default: gcloud's
#   --type v5p-128                   (create) xpk's --tpu-type
#   --slices N                       (create) default 1
#   --restarts N                     (create) after a crash or a preemption; default 50
#   --storage STORAGE                (create) a storage of `xpk storage attach`, not needed where
#                                    that was told --auto-mount=true
#   --image IMAGE                    (create) has the project installed; default: python:3.12,
#                                    into which each start installs this checkout
#   --dry-run                        print the commands and do nothing
#
# Arguments that begin with a verb are that one's: evaluate suite draw ... --out DIR has every
# worker draw its share of a suite (docs/evaluation.md).
#
# --workdir, --out and every folder in the config must be on storage that all workers see: a bucket
# (gs://BUCKET/FOLDER), or that storage. See docs/pods.md.
set -u
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

verb=${1:-}
case $verb in
  -h | --help) usage ;;
  create | list | logs | delete) shift ;;
  *) fail "give a verb (launch/gke.sh --help)" ;;
esac
name='' cluster='' zone='' project='' type='' slices=1 restarts=50 storage='' image='' dry=''
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --name | --cluster | --zone | --project | --type | --slices | --restarts | --storage | --image)
      value "$@"
      shift
      ;;
    --) shift && break ;;
    *) fail "unknown argument '$1'; training arguments come after -- (launch/gke.sh --help)" ;;
  esac
  shift
done
[[ $verb == list || $name ]] || fail "$verb needs --name"
[[ $verb == logs || $cluster ]] || fail "$verb needs --cluster"
place=(--cluster "$cluster")
[[ $zone ]] && place+=(--zone "$zone")
[[ $project ]] && place+=(--project "$project")

case $verb in
  create)
    [[ $type ]] || fail "create needs --type"
    (($#)) || fail "create needs -- and the training arguments"
    root=$(cd "$(dirname "$0")/.." && pwd)
    verb=train
    [[ $1 =~ ^[a-z]+$ ]] && verb=$1 && shift
    # exec: SIGTERM then reaches training, which saves. Status 2, a refused config, is the only
    # one that does not restart; 42 and 127 to 255 always do.
    command="exec python -m twinflow_jax.$verb $(quote "$@") --coordinator auto"
    if [[ $image ]]; then
      source=(--docker-image "$image")
    else
      source=(--base-docker-image python:3.12 --script-dir "$root")
      command="pip install -q -e '.[pod]' -c constraints.txt && $command"
    fi
    run xpk workload create --workload "$name" "${place[@]}" --tpu-type "$type" \
      --num-slices "$slices" --max-restarts "$restarts" --restart-on-exit-codes 1,3-126 \
      --termination-grace-period-seconds 300 ${storage:+--storage "$storage"} "${source[@]}" \
      --command "$command"
    ;;
  list) run xpk workload list "${place[@]}" ;;
  logs)
    run kubectl logs --follow --prefix --selector \
      "xpk.google.com/workload=$name,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) run xpk workload delete --workload "$name" "${place[@]}" ;;
esac
