"""Runs, checkpoints and records in a bucket, of a server here that speaks as Cloud Storage."""

import contextlib
import itertools
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from tests.bucket import NAME, Bucket
from tests.test_verbs import call
from twinflow_jax import checkpoints, files, holders, sample, train
from twinflow_jax.buckets import Mirror
from twinflow_jax.checkpoints import exporting, importing, steps_of
from twinflow_jax.checkpoints import random as random_weights
from twinflow_jax.checkpoints.saver import Saver
from twinflow_jax.data import records
from twinflow_jax.errors import UserError
from twinflow_jax.training.log import Log

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 12
COMMAND = [
    sys.executable, "-m", "twinflow_jax.train", "--config", "configs/digits.py",
    "--config.model.width=64", "--config.model.depth=2", f"--config.train.steps={STEPS}",
    "--config.train.log_every=1", "--config.train.checkpoint_every=2", "--config.train.keep=2",
    "--config.train.sample_every=100", "--config.sample.score_count=0",
    "--config.sample.columns=1", "--config.sample.steps=(1,)",
]
RUN = f"gs://{NAME}/run"


def start(workdir: str, log: pathlib.Path, processes: int = 1, *more: str) -> list:
    """A run on two simulated devices; what process k says is in LOG.k."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={2 // processes}"
    started = []
    for rank in range(processes):
        joined = ["--coordinator", f"localhost:{port}", "--processes", str(processes),
                  "--process", str(rank)] if processes > 1 else []
        with open(f"{log}.{rank}", "w") as said:
            started.append(subprocess.Popen(
                [*COMMAND, "--workdir", workdir, *joined, *more], cwd=ROOT, stdout=said,
                stderr=subprocess.STDOUT, env={**os.environ, "XLA_FLAGS": flags},
            ))
    return started


def finish(log: pathlib.Path, processes: list) -> None:
    statuses = [process.wait() for process in processes]
    assert statuses == [0] * len(processes), pathlib.Path(f"{log}.0").read_text()[-3000:]


def weights(workdir) -> list[np.ndarray]:
    _, _, params, step = checkpoints.load_weights(workdir, raw=True)
    assert step == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def killed_at(bucket: Bucket, write: int, processes: list, number: int) -> None:
    """Ends a run as it sends its write of that number to the bucket, if it comes to that."""
    count, victim = itertools.count(), random.Random(write).choice(processes)

    def look(method: str, address: str) -> int:
        if method == "POST" and address.startswith("/upload") and next(count) == write:
            victim.send_signal(number)
        return 0

    bucket.refuse = look
    with contextlib.suppress(subprocess.TimeoutExpired):
        victim.wait()
    for process in processes:  # as a launcher does
        process.kill() if number == signal.SIGKILL else None
        process.wait()
    bucket.refuse = lambda method, address: 0


def rounds(bucket: Bucket, tmp_path, processes: int, writes: list[tuple[int, int]]) -> None:
    """Runs that are ended at writes, by signals, leave what one that nobody ended leaves."""
    local, log = tmp_path / "local", tmp_path / "log"
    finish(log, start(str(local), log, processes))
    for write, number in writes:
        killed_at(bucket, write, start(RUN, log, processes), number)
    finish(log, start(RUN, log, processes))
    for a, b in zip(weights(local), weights(RUN), strict=True):
        np.testing.assert_array_equal(a, b)
    metrics = bucket.blobs["run/metrics.jsonl"].data.decode()
    assert metrics == (local / "metrics.jsonl").read_text()
    extra = {name.split("/")[1] for name in bucket.names("run/")}
    assert extra == {entry.name for entry in local.iterdir()}
    steps = {name.split("/")[2] for name in bucket.names("run/checkpoints/")}
    assert steps == {str(STEPS - 2), str(STEPS)}
    assert len(bucket.names("run/samples/")) == 1


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(bucket, tmp_path):
    rounds(bucket, tmp_path, 1, [(30, signal.SIGKILL), (75, signal.SIGKILL)])


@pytest.mark.slow
def test_two_processes_that_are_killed_end_with_the_same_bits(bucket, tmp_path):
    rounds(bucket, tmp_path, 2, [(55, signal.SIGKILL)])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_rounds_of_signals_at_any_write(bucket, tmp_path, processes):
    choice = random.Random(processes)
    signals = [signal.SIGKILL, signal.SIGTERM]
    writes = [(choice.randrange(3, 90), choice.choice(signals)) for _ in range(20)]
    rounds(bucket, tmp_path, processes, writes)


PARTS = {"params": {"w": np.arange(6, dtype=np.float32)}, "progress": {"n": np.int32(3)}}


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), PARTS)


def saved(*steps: int) -> Saver:
    saver = Saver(RUN, keep=3)
    for step in steps:
        saver.save(step, jax.tree.map(jax.numpy.asarray, PARTS))
        saver.wait()
    return saver


def test_what_no_commit_marks_is_no_checkpoint_and_a_torn_one_is_passed_over(bucket, capsys):
    saved(1, 2, 3, 4).close()
    assert steps_of(RUN) == [2, 3, 4]
    del bucket.blobs["run/checkpoints/4/commit_success.txt"]
    assert steps_of(RUN) == [2, 3]
    for name in bucket.names("run/checkpoints/3/params/"):
        if "/d/" in name:
            del bucket.blobs[name]
    for name in ("commit_success.txt", "of_before"):  # the step was torn once before
        bucket.put(f"run/checkpoints/unreadable_3/{name}", b"", {})
    saver = saved()
    restored = saver.restore(abstract())
    np.testing.assert_array_equal(restored["params"]["w"], PARTS["params"]["w"])
    assert "checkpoint 3 in gs://bucket/run/checkpoints cannot be read" in capsys.readouterr().err
    assert saver.steps == [2]
    saver.close()
    folders = {name.split("/")[2] for name in bucket.names("run/checkpoints/")}
    assert folders == {"2", "unreadable_3"}
    assert "run/checkpoints/unreadable_3/of_before" not in bucket.names()


@pytest.mark.parametrize("name", ["runs [v1]", "a*b", "a?b", "#1"])
def test_names_that_arrays_cannot_have_are_refused_before_anything_is_written(bucket, name):
    with pytest.raises(UserError, match="rename"):
        Saver(f"gs://{NAME}/{name}", keep=1)
    assert not bucket.blobs


def test_a_bucket_that_is_away_for_a_while_costs_time_only(bucket):
    saver, settled, mirror = Saver(RUN, keep=1), [], Mirror(RUN)
    (mirror.folder / "metrics.jsonl").write_text("a line\n")
    (mirror.folder / "traces").mkdir()
    (mirror.folder / "traces" / "one").write_bytes(b"steps")
    back = time.monotonic() + 2
    bucket.refuse = lambda method, address: 503 if time.monotonic() < back else 0
    saver.save(1, jax.tree.map(jax.numpy.asarray, PARTS), lambda: settled.append(mirror.settle()))
    saver.wait()
    saver.close()
    assert bucket.refused and settled and steps_of(RUN) == [1]
    assert bucket.blobs["run/metrics.jsonl"].data == b"a line\n"
    assert bucket.blobs["run/traces/one"].data == b"steps"


def test_a_run_that_fails_while_it_saves_keeps_what_it_saves(bucket, monkeypatch, capsys):
    add = Log.add

    def fail(log, step, metrics):
        if step == 2:
            raise UserError("the loss became NaN")
        add(log, step, metrics)

    def slow(method: str, address: str) -> int:
        time.sleep(0.3 if method == "POST" and "checkpoints" in address else 0)
        return 0

    monkeypatch.setattr(Log, "add", fail)
    bucket.refuse = slow
    options = ["--config.train.checkpoint_every=1" if "checkpoint_every" in one else one
               for one in COMMAND[3:]]
    assert call(train, *options, "--workdir", RUN) == 2
    assert capsys.readouterr().err.endswith("\nerror: the loss became NaN\n")
    assert steps_of(RUN) == [1]


@pytest.mark.parametrize("status, methods, verb, says", [
    (403, ["POST"], train, "gs://bucket: these credentials may not do that: give them the role"),
    (403, ["GET"], sample, "gs://bucket: these credentials may not do that: give them the role"),
    (401, ["GET", "POST"], train, "takes credentials: gcloud auth application-default login"),
    (401, ["GET"], sample, "takes credentials: gcloud auth application-default login"),
])
def test_a_bucket_that_refuses_is_told_in_one_line(bucket, capsys, status, methods, verb, says):
    bucket.refuse = lambda method, address: status if method in methods else 0
    arguments = ["--config", "configs/digits.py", "--workdir", RUN] if verb is train else [
        "--checkpoint", RUN, "--out", f"gs://{NAME}/out"]
    assert call(verb, *arguments) == 2
    assert re.fullmatch(f"error: .*{says}.*\n", capsys.readouterr().err)
    assert not bucket.blobs


def test_a_bucket_that_there_is_not_is_told_in_one_line(bucket, capsys):
    assert call(train, "--config", "configs/digits.py", "--workdir", "gs://typo/run") == 2
    assert "error: gs://typo: there is no such bucket: check its name" in capsys.readouterr().err


def test_packages_that_are_missing_are_named():
    """Beside everything else, which does not take them."""
    program = (
        "import sys; sys.modules['gcsfs'] = None; from twinflow_jax import errors, sample; "
        f"sys.argv += ['--checkpoint', '{RUN}', '--out', 'x']; errors.run_verb(sample.main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: gs:// takes more packages: pip install"), done.stderr


def test_one_command_at_a_time_in_a_bucket(bucket):
    with holders.held(f"{RUN}/in_use", RUN), pytest.raises(UserError, match="is in use by process"):
        holders.check_free(epath.Path(f"{RUN}/in_use"), RUN)
    assert not bucket.blobs


def test_what_could_not_be_written_whole_is_gone(bucket):
    with pytest.raises(RuntimeError), files.whole_folder(f"{RUN}/x", 0):
        files.write(f"{RUN}/x/part", b"1")
        assert bucket.names() == ["run/x/UNFINISHED", "run/x/part"]
        raise RuntimeError
    assert not bucket.blobs
    with pytest.raises(RuntimeError), files.whole_file(f"{RUN}/long") as file:
        with file.open("wb") as handle:
            handle.write(b"half")
        raise RuntimeError
    assert not bucket.blobs


def test_what_another_process_writes_is_seen(bucket):
    files.write(f"{RUN}/one", b"")
    assert [entry.name for entry in epath.Path(RUN).iterdir()] == ["one"]
    bucket.put("run/two", b"", {})
    assert sorted(entry.name for entry in epath.Path(RUN).iterdir()) == ["one", "two"]


def test_networks_in_a_bucket_are_exported_and_imported_as_they_were(bucket, tmp_path):
    made = random_weights.write_random("minilm_dit", f"gs://{NAME}/made", 0)
    published, again = f"gs://{NAME}/published", f"gs://{NAME}/again"
    exporting.export_folder(made, published, progress=False)
    exporting.export_folder(made, tmp_path / "published", progress=False)
    for file in (file for file in (tmp_path / "published").rglob("*") if file.is_file()):
        name = f"published/{file.relative_to(tmp_path / 'published')}"
        assert bucket.blobs[name].data == file.read_bytes()
    copy = importing.import_folder(published, again, progress=False)
    [(network, found)] = exporting.compare(published, copy, progress=False).items()
    assert network == "text_encoder" and found.identical and not found.lines
    assert not [name for name in bucket.names() if name.endswith(("in_use", files.UNFINISHED))]


def test_records_in_a_bucket_are_those_of_a_disk_and_are_copied_once(
    bucket, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TWINFLOW_CACHE", str(tmp_path / "cache"))
    manifest = records.Manifest("minilm_dit", "an encoder", 4, "", 3, 1)
    rows = [records.Example(
        f"{n}", ["a caption"], [np.full((2, 4), n, np.float32)], np.full((8, 8, 3), n / 4), (8, 8)
    ) for n in range(4)]
    folders = [tmp_path / "records", epath.Path(f"gs://{NAME}/records")]
    for folder in folders:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        size = records.write_shard(records.shard_file(folder, "8x8", 0, 1), rows, manifest)
        records.finish(folder, manifest, {"8x8": [(4, size)]}, {})
    there = {name.removeprefix("records/"): blob.data for name, blob in bucket.blobs.items()}
    assert there == {file.name: file.read_bytes() for file in folders[0].iterdir()}
    for _ in range(2):
        found = records.open_records(folders[1]).read("8x8", 3)
        assert found.id == "3" and (found.tokens[0] == 3).all()
    assert capsys.readouterr().err.count("copying gs://bucket/records") == 1
