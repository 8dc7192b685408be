"""twinflow encode: the same records however many processes make them and are killed."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pictures
import pytest
from etils import epath

from twinflow_jax import drawing
from twinflow_jax import encode as tool
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.data import records
from twinflow_jax.data.records import open_records
from twinflow_jax.drawing import Embeddings, codec, denoising, open_pipeline, text
from twinflow_jax.encoding import sizes, workspace
from twinflow_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]

BUCKETS = ((96, 64), (64, 64), (64, 96))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> pathlib.Path:
    """A family that draws pixels, with random weights."""
    folder = tmp_path_factory.mktemp("pixels") / "pipeline"
    write_random("minilm_dit", folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> pathlib.Path:
    return pictures.write_lines(tmp_path_factory.mktemp("photos") / "in" / "photos.jsonl", 30)


def arguments(source, target, pipeline, *more: str) -> list[str]:
    return [str(source), str(target), "--pipeline", str(pipeline), *more]


def bucketed(source, target, pipeline, *more: str) -> list[str]:
    names = ",".join(sizes.name(size) for size in BUCKETS)
    return arguments(source, target, pipeline, "--buckets", names, "--shard-size", "4", *more)


def run(monkeypatch, capsys, args: list[str]) -> tuple[int, str, str]:
    """Status, stdout and the last line of stderr."""
    monkeypatch.setattr(sys, "argv", ["encode.py", *args])
    with pytest.raises(SystemExit) as end:
        tool.run_verb(tool.main)
    out, err = capsys.readouterr()
    return end.value.code or 0, out, (err.strip().splitlines() or [""])[-1]


def content(folder: pathlib.Path) -> dict:
    """Everything that records hold, bit by bit, and what was left out."""
    found = open_records(folder)
    rows = {
        split: [found.read(split, i) for i in range(count)] for split, count in found.splits.items()
    }
    told = lambda e: (e.id, e.captions, [t.tobytes() for t in e.tokens], e.size,
                      None if e.sample is None else e.sample.tobytes())
    return {
        "records": {split: [told(e) for e in of] for split, of in rows.items()},
        "skipped": (folder / workspace.SKIPPED).read_text(),
        "null": (folder / records.NULL).read_bytes(), "manifest": found.manifest,
        "report": found.report,
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory, photos, pixels) -> dict:
    """What one process makes of the photos without being stopped."""
    target = tmp_path_factory.mktemp("whole") / "records"
    done = subprocess.run(
        [sys.executable, "-m", "twinflow_jax.encode", *bucketed(photos, target, pixels)], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in target.iterdir() if p.name.startswith(".")) == []
    return content(target)


def test_records_are_the_pictures(photos, pixels, reference):
    pipeline = open_pipeline(pixels)
    found = {row[0]: (split, row) for split, of in reference["records"].items() for row in of}
    assert len(found) == 30 and sorted(found) == [name for name, _, _ in pictures.good(30)]
    for name, captions, data in pictures.good(30):
        split, (_, kept, tokens, size, sample) = found[name]
        bucket = sizes.nearest(sizes.measure(data), BUCKETS)
        expected = sizes.decode(data, bucket).astype(np.float32) / 127.5 - 1
        assert split == sizes.name(bucket) and kept == captions and size == sizes.measure(data)
        assert sample == expected.tobytes()
    embedded = text.embed(pipeline, ["picture 7", "number 7 again"])
    for row, part in enumerate(found["007"][1][2]):
        ours = np.frombuffer(part, np.float16).reshape(-1, embedded.tokens.shape[-1])
        theirs = embedded.tokens[row][embedded.mask[row]]
        np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=2e-3)
    skipped = [json.loads(line) for line in reference["skipped"].splitlines()]
    assert [(s["id"], s["reason"]) for s in skipped] == [
        (name, reason) for name, _, _, reason in pictures.bad()
    ]
    assert reference["report"]["skipped"] == {
        "no caption": 1, "unreadable": 2, "duplicate": 1, "too small": 1,
    }
    assert reference["manifest"].autoencoder == "" and reference["manifest"].channels == 3


def test_weights_have_names(tmp_path, pixels):
    write_random("minilm_dit", tmp_path / "other", seed=4)
    write_random("minilm_dit", tmp_path / "same", seed=3)
    names = [
        open_pipeline(folder).checkpoint.identity("text_encoder")
        for folder in (pixels, tmp_path / "same", tmp_path / "other")
    ]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("BertModel ") and names[0][:-6] == names[2][:-6]


def killed_often(photos, pixels, target: pathlib.Path, processes: int, rounds: int, seed: int):
    """Starts processes, kills each at a random moment, and at last lets them come to the end."""
    rng = random.Random(seed)
    for number in range(rounds + 1):
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "twinflow_jax.encode", *bucketed(
                    photos, target, pixels, "--process", str(k), "--processes", str(processes),
                )],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for k in range(processes)
        ]
        if number < rounds:
            begun = time.monotonic()
            files = rng.randint(0, 10)  # that are there when the first is killed
            while time.monotonic() - begun < 60 and any(p.poll() is None for p in started):
                written = [*target.glob("records-*"), *target.glob("work/*/*")]
                if len(written) >= files:
                    break
                time.sleep(0.02)
            for process in rng.sample(started, len(started)):
                time.sleep(rng.random() / 2)
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        for process in started:
            output = process.communicate()[0]
            if number == rounds:
                assert process.returncode == 0, output[-2000:]


def test_three_processes_make_what_one_makes(tmp_path, photos, pixels, reference):
    killed_often(photos, pixels, tmp_path / "records", processes=3, rounds=1, seed=0)
    assert content(tmp_path / "records") == reference


@pytest.mark.slow
def test_processes_killed_again_and_again(tmp_path, photos, pixels, reference):
    for seed in range(4):
        killed_often(photos, pixels, tmp_path / str(seed), processes=3, rounds=6, seed=seed)
        assert content(tmp_path / str(seed)) == reference


def test_a_share_of_the_work_has_one_process(tmp_path):
    space = lambda *share: workspace.Workspace(epath.Path(tmp_path / "records"), *share)
    with space(0, 2).claim({}), space(1, 2).claim({}):
        for share in ((0, 2), (1, 2), (0, 1), (2, 3)):
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(UserError, match="in use by process"), space(*share).claim({}):
                pass
            assert sorted(tmp_path.rglob("*")) == before
    with space(0, 1).claim({}):
        pass


def test_settings_that_begin_at_the_same_moment_are_those_of_one(tmp_path):
    found, together = [], threading.Barrier(6)

    def begin(number: int):
        together.wait()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(UserError):
                space = workspace.Workspace(epath.Path(tmp_path / "records"), number, 6)
                found.append((number, stack.enter_context(space.claim({"size": number}))))
            together.wait()

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [(winner, finished)] = found
    assert not finished
    record = tmp_path / "records" / workspace.WORK / workspace.SETTINGS
    assert json.loads(record.read_text()) == {"size": winner}


def test_a_try_that_came_to_nothing_leaves_the_folder_to_another(
    tmp_path, monkeypatch, capsys, photos, pixels
):
    target, decode = tmp_path / "records", sizes.decode
    few = ["--min-side", "500"]
    status, _, told = run(monkeypatch, capsys, arguments(photos, target, pixels, *few))
    assert status == 2 and "none of the 35 items" in told

    def damaged(*given):
        raise ValueError("damaged")

    monkeypatch.setattr(sizes, "decode", damaged)
    args = arguments(photos, target, pixels, "--size", "32")
    for _ in range(2):
        status, _, told = run(monkeypatch, capsys, args)
        assert status == 2 and "none of the 35 items" in told and "damaged" in told
    monkeypatch.setattr(sizes, "decode", decode)
    status, out, _ = run(monkeypatch, capsys, arguments(photos, target, pixels, "--size", "64"))
    assert status == 0 and open_records(target).splits == {"64x64": 30}


def test_stopped_and_continued_with_other_processes(
    tmp_path, monkeypatch, capsys, photos, pixels, reference
):
    target, write_shard, left = tmp_path / "records", records.write_shard, iter(range(3))

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write_shard(*args)

    with monkeypatch.context() as patched:
        patched.setattr(records, "write_shard", interrupted)
        status, _, told = run(patched, capsys, bucketed(photos, target, pixels))
    assert status == 130 and told.endswith("interrupted; the same command goes on")
    with monkeypatch.context() as patched:  # a full disk
        patched.setattr(records, "write_shard", lambda *args: os.open("/dev/full/x", os.O_RDONLY))
        status, _, told = run(patched, capsys, bucketed(photos, target, pixels))
    assert status == 2 and told.endswith("the same command goes on")
    assert len(list(target.glob("records-*"))) == 3
    shares = [("--process", str(k), "--processes", "2") for k in (1, 0)]
    listed = [run(monkeypatch, capsys, bucketed(photos, target, pixels, *s)) for s in shares]
    assert [status for status, _, _ in listed] == [0, 0]
    assert "process 1 is done; process 0 completes" in listed[0][1]
    assert content(target) == reference
    before = {p.name: p.stat().st_mtime_ns for p in target.iterdir()}
    status, out, _ = run(monkeypatch, capsys, bucketed(photos, target, pixels))
    assert status == 0 and "is complete" in out
    assert before == {p.name: p.stat().st_mtime_ns for p in target.iterdir()}


def test_folders_of_other_records_are_refused(tmp_path, monkeypatch, capsys, photos, pixels):
    target = tmp_path / "records"
    args = arguments(photos, target, pixels, "--size", "64")
    assert run(monkeypatch, capsys, args)[0] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    more = photos.parent / "more.jsonl"
    more.write_text(photos.read_text() + "\n{}\n")
    for changed, words in (
        ([*args[:-1], "32"], "sizes is ['64x64'], not ['32x32']"),
        ([*args, "--min-side", "65"], "min_side is 64, not 65"),
        ([str(more), *args[1:]], "source is photos.jsonl, not more.jsonl"),
        ([args[0], str(tmp_path / "other"), *args[2:]], "holds other files (file)"),
        ([args[0], str(photos), *args[2:]], "is a file"),
    ):
        status, _, told = run(monkeypatch, capsys, changed)
        assert status == 2 and words in told, told
    assert (tmp_path / "other" / "file").read_text() == "mine"


@pytest.mark.parametrize(("more", "words"), [
    (["--size", "64", "--buckets", "64"], "give one of --size and --buckets"),
    (["--size", "big"], "--size: 'big' is no size"),
    (["--buckets", "64,big"], "'big' is no size"),
    (["--process", "2", "--processes", "2"], "from 0 to --processes less one"),
    (["--shard-size", "0"], "--shard-size: 0 is no whole number"),
    (["--batch", str(10**12)], "--batch: 1000000000000 is no whole number from 1 to"),
    (["--generate", "--count", "99"], "--count 99 of each of --shard-size 1024 prompts are more"),
    (["--prompts-only", "--size", "64"], "--prompts-only has no pictures"),
    (["--guidance", "3"], "add --generate"),
    (["--min-side", "500"], "none of the 35 items"),
    (["--caption-column", "alt"], "it has image, captions, id: give one with --caption-column"),
    (["--image-column", "file"], "has no pictures under file; names of pictures are under image"),
    (["--prompts-only", "--min-side", "64"], "--min-side cannot be used: of "),
    (["--generate", "--min-side", "64"], "--min-side cannot be used: of "),
    (["--size", "63"], "not divisible by 2"),
])
def test_bad_input(tmp_path, monkeypatch, capsys, photos, pixels, more, words):
    args = arguments(photos, tmp_path / "records", pixels, *more)
    status, _, told = run(monkeypatch, capsys, args)
    assert status == 2 and words in told, told


@pytest.mark.parametrize("inner", ["", "records/photos"])
def test_records_cannot_lie_in_their_source(tmp_path, monkeypatch, capsys, inner):
    source = pictures.write_folder(tmp_path / "in", 2)
    before = sorted(tmp_path.rglob("*"))
    status, _, told = run(monkeypatch, capsys, arguments(source, source / inner, "none"))
    assert status == 2 and "all of which is read: choose a folder beside it" in told
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_changes_stops_the_encoding(tmp_path, monkeypatch, capsys, pixels):
    source = pictures.write_folder(tmp_path / "in", 4)
    write_chunk = workspace.files.write

    def changing(path, data):
        write_chunk(path, data)
        if path.parent.name == "index":
            (source / "000.png").write_bytes(pictures.png(50))

    monkeypatch.setattr(workspace.files, "write", changing)
    args = arguments(source, tmp_path / "records", pixels, "--size", "64")
    status, _, told = run(monkeypatch, capsys, args)
    assert status == 2 and "000.png has changed since it was listed" in told


def test_prompts_alone(tmp_path, monkeypatch, capsys, pixels):
    (tmp_path / "prompts.txt").write_text(f"a fox\na hen\n\na fox\n{'word ' * 2000}\n")
    args = arguments(tmp_path / "prompts.txt", tmp_path / "records", pixels)
    status, out, _ = run(monkeypatch, capsys, args)
    assert status == 0 and "1 captions are too long" in out
    found = open_records(tmp_path / "records")
    assert found.splits == {records.PROMPTS: 3} and found.manifest.channels == 0
    assert found.read(records.PROMPTS, 1).captions == ("a hen",)
    null = Embeddings.read(tmp_path / "records" / records.NULL, found.manifest.text_width)[1]
    assert len(null.tokens) == 1


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> pathlib.Path:
    """A family that draws latents, with random weights and a scheduler."""
    folder = tmp_path_factory.mktemp("latents") / "pipeline"
    write_random("sana", folder, seed=1)
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
        "use_flow_sigmas": True, "flow_shift": 3.0,
    }
    (folder / "files" / "scheduler").mkdir()
    (folder / "files" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def test_latents(tmp_path, monkeypatch, capsys, latents):
    source = pictures.write_folder(tmp_path / "in", 3)
    args = arguments(source, tmp_path / "records", latents, "--size", "64", "--batch", "2")
    assert run(monkeypatch, capsys, args)[0] == 0
    found, pipeline = open_records(tmp_path / "records"), open_pipeline(latents)
    assert found.manifest.autoencoder == pipeline.checkpoint.identity("vae") != ""
    assert found.splits == {"64x64": 3} and found.sample_shape("64x64") == (2, 2, 32)
    rows = [found.read("64x64", i) for i in range(3)]
    by_captions = {captions: data for _, captions, data in pictures.good(3)}
    images = np.stack([sizes.decode(by_captions[row.captions], (64, 64)) for row in rows])
    expected = codec.encode(pipeline, images.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(np.stack([r.sample for r in rows]), expected, atol=2e-3, rtol=2e-3)


def test_pictures_drawn_by_the_base_model(tmp_path, monkeypatch, capsys, latents):
    (tmp_path / "prompts.txt").write_text("a fox\na hen\n")
    args = arguments(
        tmp_path / "prompts.txt", tmp_path / "records", latents, "--size", "64", "--generate",
        "--steps", "2", "--count", "2", "--shard-size", "1", "--guidance", "2", "--pairs",
    )
    status, out, told = run(monkeypatch, capsys, args)
    assert status == 0, told
    found = open_records(tmp_path / "records")
    rows = [found.read("64x64", i) for i in range(4)]
    assert [row.id for row in rows] == [
        "prompts.txt:1#0", "prompts.txt:1#1", "prompts.txt:2#0", "prompts.txt:2#1"
    ]
    pipeline = open_pipeline(latents)
    embeddings, null = (
        text.embed(pipeline, ["a fox", "a hen"]), text.embed(pipeline, [], negative="")
    )
    sampler = denoising.base(pipeline, denoising.schedule(pipeline, 2, (2, 2, 32)), 2.0)
    expected = np.concatenate(list(denoising.denoise(
        pipeline, sampler, embeddings, np.array([0, 0, 1, 1]), np.arange(4), (2, 2, 32), 0, 1, null
    )))
    np.testing.assert_allclose(np.stack([r.sample for r in rows]), expected, atol=5e-3, rtol=5e-3)
    kept = np.stack([row.noise for row in rows])
    np.testing.assert_array_equal(
        kept, denoising.noise_of(np.arange(4), (2, 2, 32), 0).astype(np.float16)
    )
    cond, empty = drawing.same_length(embeddings[np.array([0, 0, 1, 1])], null)
    with pipeline.loaded("transformer", "drawing") as (config, params):
        module = pipeline.checkpoint.network("transformer").module(config)
        again = sampler(
            lambda params, *inputs: module.apply({"params": params}, *inputs), params,
            kept.astype(np.float32), cond.rows(np.arange(4)), empty.rows(np.zeros(4, int)), None,
        )
    np.testing.assert_allclose(again, expected, atol=1e-2, rtol=1e-2)
    other = tmp_path / "other"
    shutil.copytree(latents, other)
    scheduler = other / "files/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("3.0", "2.0"))
    args[args.index(str(latents))] = str(other)
    status, _, told = run(monkeypatch, capsys, args)
    assert status == 2 and "is of other records: their schedule is" in told
    args[args.index(str(other))] = str(latents)
    shutil.rmtree(tmp_path / "records")
    assert run(monkeypatch, capsys, [*args, "--seed", "1"])[0] == 0
    other = open_records(tmp_path / "records").read("64x64", 0).sample
    assert not np.array_equal(other, rows[0].sample)
