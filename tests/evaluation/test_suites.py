"""Suites: their files, drawn by however many processes; what check finds; what the readers say."""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.bucket import NAME
from tests.evaluation import scorers
from tests.test_verbs import call
from twinflow_jax import drawing, evaluate, images, sampling
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.drawing import editing, text
from twinflow_jax.drawing.by_prompt import Way
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation import speed, suites
from twinflow_jax.evaluation.suites import commands, draw, gallery, paper, results, table
from twinflow_jax.evaluation.suites.gallery import Gallery
from twinflow_jax.models.qwen_image import edit

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIDE, BATCH = 64, 3
TREES = {  # of the small suites of `scorers`
    "geneval": [
        f"{i:05d}/{name}" for i in range(12)
        for name in ("metadata.jsonl", *(f"samples/{k:05d}.png" for k in range(4)))
    ],
    "dpg": ["12.png", "diffusiondb0.png", "x-7.png"],
    "wise-legacy": [f"{n}.png" for n in scorers.ENDS["wise-legacy"]],
    "wise-verified": [f"{n}.png" for n in scorers.ENDS["wise-verified"]],
    "longtext-en": [f"{n}_{k}.png" for n in ("0003", "0101") for k in range(1, 5)],
    "longtext-zh": [f"{n}_{k}.png" for n in ("0003", "0101") for k in range(1, 5)],
    "geneval2": ["00000.png", "00001.png"],
    **{name: [
        f"fullset/{task}/{language}/{task[:2]}{n}{ending}.png"
        for task, n in scorers.GEDIT for ending in ("", "_SRCIMG")
    ] for name, language in (("gedit", "en"), ("gedit-cn", "cn"))},
    "imgedit": [f"{7 * i}.png" for i in range(len(scorers.IMGEDIT))],
}
EDITS = [name for name, suite in suites.SUITES.items() if suite.edits]


SMALLER = """
from twinflow_jax.models.qwen_image import edit
theirs = edit.size_of_area
edit.size_of_area = lambda area, size: theirs(area // 100, size)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small networks, suites, and GenEval's pictures, drawn by the verb; edits are a tenth as wide
    as published networks make them."""
    folder = tmp_path_factory.mktemp("suites")
    write_random("sana", folder / "base", seed=0)
    write_random("qwen_image_edit_plus", folder / "edit", seed=0)
    clones = scorers.write(folder / "clones")
    made = types.SimpleNamespace(
        folder=folder, base=folder / "base", clones=clones, geneval=folder / "geneval",
        edit=folder / "edit", images=clones / "imgedit" / "singleturn",
    )
    assert call(evaluate, *draw_geneval(made, made.geneval)) == 0
    made.job = lambda suite, batch=BATCH, **more: job(made, suite, batch, **more)
    made.pipelines = [drawing.open_pipeline(made.base), drawing.open_pipeline(made.edit)]
    made.pipeline = made.pipelines[0]
    whole = edit.size_of_area
    exec(SMALLER, {})
    yield made
    edit.size_of_area = whole


def draw_geneval(made, out, *more: str) -> list[str]:
    return [
        "suite", "draw", "geneval", "--prompts", str(made.clones / "geneval"), "--unpublished",
        "--checkpoint", str(made.base), "--out", str(out), "--size", str(SIDE),
        "--batch", str(BATCH), *more,
    ]


def draw_edits(made, suite: str, out, *more: str) -> list[str]:
    images = ["--images", str(made.images)] if suite == "imgedit" else []
    return [
        "suite", "draw", suite, "--prompts", str(made.clones / suite), "--unpublished", *images,
        "--checkpoint", str(made.edit), "--out", str(out), "--batch", str(BATCH), *more,
    ]


def job(made, suite: str, batch: int, **more) -> draw.Job:
    """As the verb makes it, on the networks that all tests share."""
    edits = suite in EDITS
    args = argparse.Namespace(
        checkpoint=str(made.edit if edits else made.base), size=None if edits else (SIDE, SIDE),
        seed=0, batch=batch, dtype=None, raw=False, at_step=None,
        pipeline=None, adapter=None, tile=None, base=None, steps=None, guidance=None, negative=None,
        prompts=str(made.clones / suite),
        images=str(made.images) if suite == "imgedit" else None, style=None, stochastic=None,
        gap=None, warp=None, extrapolation=None, order=None,
    )
    suite = suites.named(suite)
    prompts = suites.open_prompts(suite, args.prompts, True, images=args.images, **more)
    found, about = commands.job_of(args, suite, prompts)
    return dataclasses.replace(found, pipeline=made.pipelines[edits]), about


def shape_of(made) -> tuple[int, int, int]:
    return drawing.denoising.latent_shape(made.pipeline, (SIDE, SIDE))


def drawn(made, suite: str, folder: pathlib.Path, process: int = 0, processes: int = 1):
    job, about = made.job(suite)
    return draw.draw(job, Gallery(epath.Path(folder), process, processes), about), job


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("suite", TREES)
def test_every_file_is_as_the_layout_has_it(made, tmp_path, suite):
    folder = tmp_path / "pictures"
    complete, job = drawn(made, suite, folder)
    assert complete and sorted(content(folder)) == sorted(TREES[suite])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "pictures.manifest.json"]
    manifest = json.loads((tmp_path / "pictures.manifest.json").read_text())
    edits = suite in EDITS
    assert manifest["suite"] == suite and manifest["size"] == (None if edits else [SIDE, SIDE])
    sizes = set()
    for name in TREES[suite]:
        if name.endswith(".png"):
            with Image.open(folder / name) as picture:
                assert picture.mode == "RGB" and not picture.info
                sizes |= set() if name.endswith("_SRCIMG.png") else {picture.size}
    times = 2 if suite == "dpg" else 1
    of_edits = {(128, 96), (96, 96)}  # a hundredth of a megapixel, in their proportions
    assert sizes == (of_edits if edits else {(times * SIDE, times * SIDE)})
    assert call(evaluate, "suite", "check", str(folder)) == 0


def test_metadata_is_the_line_of_the_prompt(made):
    file = made.clones / "geneval" / "prompts" / "evaluation_metadata.jsonl"
    for i, line in enumerate(file.read_text().splitlines()):
        assert json.loads((made.geneval / f"{i:05d}" / "metadata.jsonl").read_text()) == (
            json.loads(line)
        )


def test_noise_is_of_seed_item_and_number(made, tmp_path):
    """Whatever is drawn beside: a grid is row by row what `pictures` draws from these numbers."""
    _, job = drawn(made, "dpg", tmp_path / "dpg")
    item = job.prompts.items[1]
    cond = text.embed(made.pipeline, [item.prompt])
    ours = [images.to_uint8(picture).astype(int) for picture in drawing.pictures(
        made.pipeline, job.ways[SIDE, SIDE].sampler, cond, np.zeros(BATCH, int),
        4 * 1 + np.arange(BATCH), shape_of(made), 0, BATCH,
    )]
    whole = np.asarray(Image.open(tmp_path / "dpg" / f"{item.id}.png"), int)
    theirs = whole[:SIDE, :SIDE], whole[:SIDE, SIDE:], whole[SIDE:, :SIDE]
    assert np.abs(np.stack(ours) - np.stack(theirs)).max() <= 1 and whole.std() > 1
    assert np.abs(ours[0] - ours[1]).max() > 1


def test_a_guided_teacher_draws_with_its_negative_prompt(made, tmp_path):
    job, about = made.job("geneval2")
    schedule = sampling.Schedule((1.0, 0.5, 0.0), (1.0, 0.5), "euler")
    sampler = drawing.denoising.base(made.pipeline, schedule, 4.5)
    way = Way(sampler, {"negative": "blurry"}, "")
    job = dataclasses.replace(job, ways={(SIDE, SIDE): way})
    draw.draw(job, Gallery(epath.Path(tmp_path / "pictures"), 0, 1), about)
    prompts = [item.prompt for item in job.prompts.items]
    made_of = text.embed(made.pipeline, prompts, negative="blurry")
    ours = drawing.pictures(
        made.pipeline, sampler, made_of[:2], np.arange(BATCH) % 2, np.arange(BATCH) % 2,
        shape_of(made), 0, BATCH, made_of[2:],
    )
    theirs = [np.asarray(Image.open(tmp_path / "pictures" / f"0000{i}.png"), int) for i in (0, 1)]
    ours = [images.to_uint8(picture).astype(int) for picture in ours][:2]
    assert np.abs(np.stack(ours) - np.stack(theirs)).max() <= 1 and np.std(ours[0]) > 1


def test_noise_of_edits_is_of_seed_item_and_number(made, tmp_path):
    """Whatever an edit is drawn beside, by a guided teacher, whose negative prompt has the picture
    too."""
    job, about = made.job("imgedit")
    pipeline, number, size = made.pipelines[1], 5, job.sizes[5]
    schedule = sampling.Schedule((1.0, 0.5, 0.0), (1.0, 0.5), "euler")
    sampler = drawing.denoising.base(pipeline, schedule, 4.5)
    job = dataclasses.replace(
        job, ways=dict.fromkeys(job.ways, Way(sampler, {"negative": "blurry"}, ""))
    )
    assert [1, 3, 5] in job.units  # of one size
    draw.draw(job, Gallery(epath.Path(tmp_path / "a"), 0, 1), about)
    item = job.prompts.items[number]
    asked = editing.opened(pipeline.family.editing, item.prompt, [str(made.images / item.source)])
    [(cond, null)] = editing.conditions(pipeline, [asked], "blurry")
    ours = next(drawing.pictures(
        pipeline, sampler, cond, np.zeros(BATCH, int), np.full(BATCH, number),
        drawing.denoising.latent_shape(pipeline, size[::-1]), 0, BATCH, null,
    ))
    theirs = np.asarray(Image.open(tmp_path / "a" / f"{item.id}.png"), int)
    assert np.abs(images.to_uint8(ours).astype(int) - theirs).max() <= 1 and theirs.std() > 1


@pytest.mark.parametrize("suite", ["geneval", "gedit"])
def test_three_processes_that_are_stopped_make_what_one_makes(made, tmp_path, monkeypatch, suite):
    folder, save, left = tmp_path / "pictures", images.save, iter(range(7))
    whole, number = made.geneval, len(TREES[suite])
    if suite == "gedit":
        whole = tmp_path / "whole" / "pictures"
        drawn(made, suite, whole)

    def stopped(*given, **more):
        if next(left, None) is None:
            raise KeyboardInterrupt
        save(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(images, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            drawn(made, suite, folder, 1, 3)
    some = content(folder)
    assert 0 < len(some) < number and "in_use" not in str(sorted(tmp_path.rglob("*")))
    for process in (2, 1, 0):
        assert drawn(made, suite, folder, process, 3)[0] == (process == 0)
    assert content(folder) == content(whole)
    left_over = {p.name for p in tmp_path.iterdir()} - {"whole"}
    assert left_over == {"pictures", "pictures.manifest.json"}
    (folder / TREES[suite][-1]).unlink()
    assert drawn(made, suite, folder)[0] and content(folder) == content(whole)


@pytest.mark.parametrize("suite", [
    "geneval", pytest.param("gedit", marks=pytest.mark.slow),
])
def test_a_suite_in_a_bucket_is_that_of_a_disk(
    made, bucket, tmp_path, monkeypatch, capsys, suite
):
    """Prompts too; two processes, one of which is stopped once."""
    out, save, left = f"gs://{NAME}/some/pictures", images.save, iter(range(7))
    whole, edits = made.geneval, suite in EDITS
    if edits:
        whole = tmp_path / "whole"
        drawn(made, suite, whole)
    for name, data in content(made.clones / suite).items():
        bucket.put(f"clone/{name}", data, {})
    prompts = suites.open_prompts(suites.named(suite), f"gs://{NAME}/clone", True)
    job, about = made.job(suite)
    job = dataclasses.replace(job, prompts=prompts)
    draw_share = lambda k: draw.draw(job, Gallery(epath.Path(out), k, 2), about)

    def stopped(*given, **more):
        if next(left, None) is None:
            raise KeyboardInterrupt
        save(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(images, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            draw_share(1)
    assert not draw_share(1) and draw_share(0)
    found = {
        name.removeprefix("some/pictures/"): blob.data for name, blob in bucket.blobs.items()
        if not name.startswith("clone/")
    }
    assert json.loads(found.pop("some/pictures.manifest.json"))["suite"] == suite
    assert found == content(whole)
    capsys.readouterr()
    assert call(evaluate, "suite", "check", out) == 0
    assert f"gcloud storage cp -r {out} {pathlib.Path.cwd()}\n" in capsys.readouterr().out
    del bucket.blobs[f"some/pictures/{TREES[suite][-1]}"]
    assert call(evaluate, "suite", "check", out) == 2


def killed_often(arguments: list[str], folder: pathlib.Path, rounds: int, seed: int) -> None:
    """Starts three processes, kills each at a random moment, and at last lets them end."""
    rng = random.Random(seed)
    program = f"{SMALLER}\nfrom twinflow_jax import errors, evaluate\n"
    program += "errors.run_verb(evaluate.main)"
    for number in range(rounds + 1):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", program, *arguments, "--process", str(k), "--processes",
                 "3"], cwd=ROOT, text=True, env=os.environ, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for k in range(3)
        ]
        if number < rounds:
            begun, wanted = time.monotonic(), rng.randint(0, 40)
            while time.monotonic() - begun < 120 and any(p.poll() is None for p in started):
                if len(list(folder.rglob("*.png"))) >= wanted:
                    break
                time.sleep(0.02)
            for process in rng.sample(started, 3):
                time.sleep(rng.random() / 2)
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        for process in started:
            output = process.communicate()[0]
            if number == rounds:
                assert process.returncode == 0, output[-2000:]


@pytest.mark.slow
def test_processes_killed_again_and_again(made, tmp_path):
    for seed in range(3):
        folder = tmp_path / str(seed)
        killed_often(draw_geneval(made, folder), folder, rounds=4, seed=seed)
        assert content(folder) == content(made.geneval)
    drawn(made, "gedit", tmp_path / "whole")
    killed_often(draw_edits(made, "gedit", tmp_path / "edits"), tmp_path / "edits", 4, seed=3)
    assert content(tmp_path / "edits") == content(tmp_path / "whole")


@pytest.mark.slow
def test_processes_that_jax_has_joined_draw_the_same(made, tmp_path):
    script = ROOT / "launch" / "local.sh"
    done = subprocess.run(
        [script, "--processes", "2", "evaluate", *draw_geneval(made, tmp_path / "pictures")],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path / "pictures") == content(made.geneval)


@pytest.mark.slow
def test_all_of_geneval_is_drawn_in_minutes_in_steady_memory(made, tmp_path):
    """553 prompts of four pictures, as many as the published ones."""
    file = tmp_path / "evaluation_metadata.jsonl"
    line = (made.clones / "geneval" / "prompts" / "evaluation_metadata.jsonl").read_text()
    row = json.loads(line.splitlines()[0])
    memory = {}
    for count in (40, 553):
        file.write_text(scorers.lines(row | {"prompt": f"cat {i}"} for i in range(count)))
        code = (  # getrusage would tell of this process, which forked
            "from twinflow_jax import evaluate, errors\ntry: errors.run_verb(evaluate.main)\n"
            "finally: print('peak', *(line.split()[1] for line in open('/proc/self/status') if "
            "line.startswith('VmHWM')))"
        )
        args = draw_geneval(made, tmp_path / str(count), "--batch", "16")
        args[args.index("--prompts") + 1] = str(file)
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        memory[count] = int(done.stdout.split("peak")[1])
        assert len(list((tmp_path / str(count)).rglob("*.png"))) == 4 * count
    assert memory[553] < memory[40] + 50_000  # KiB; all pictures are 109 MB


def test_check_finds_each_fault_by_name(made, tmp_path, capsys):
    folder = tmp_path / "pictures"
    shutil.copytree(made.geneval, folder)
    shutil.copy(made.folder / "geneval.manifest.json", tmp_path / "pictures.manifest.json")
    args = ["suite", "check", str(folder)]
    capsys.readouterr()
    assert call(evaluate, *args) == 0
    out = capsys.readouterr().out
    assert f"evaluate_images.py {folder} --outfile" in out and "djghosh13/geneval" in out
    sample = lambda i: folder / f"{i:05d}" / "samples" / "00001.png"
    sample(0).unlink()
    (folder / "notes.txt").write_text("mine")
    sample(1).write_bytes(sample(1).read_bytes()[:200])
    Image.new("RGB", (SIDE, SIDE + 1)).save(sample(2))
    Image.new("RGBA", (SIDE, SIDE)).save(sample(3))
    (folder / "00004" / "metadata.jsonl").write_text("{}")
    assert call(evaluate, *args) == 2
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == [
        "changed: 00004/metadata.jsonl", "foreign: notes.txt", "missing: 00000/samples/00001.png",
        "of another size: 00002/samples/00001.png", "of another size: 00003/samples/00001.png",
        "torn: 00001/samples/00001.png",
    ]
    assert "1 missing, 1 foreign, 1 torn, 2 of another size, 1 changed of 60 files" in err
    assert err.count("\n") == 1


def test_check_finds_what_is_wrong_with_edits(made, tmp_path, capsys):
    folder = tmp_path / "pictures"
    drawn(made, "gedit", folder)
    results = folder / "gpt4o" / "eval_results_new" / "pictures_combined_gpt_score.csv"
    results.parent.mkdir(parents=True)
    results.write_text("")
    capsys.readouterr()
    assert call(evaluate, "suite", "check", str(folder)) == 0
    out = capsys.readouterr().out
    assert f"--model_name pictures --save_path {tmp_path} --backbone gpt4o\n" in out
    place = lambda n, ending="": folder / "fullset" / "ps_human" / "en" / f"ps{n}{ending}.png"
    place(0).unlink()
    place(1, "_SRCIMG").write_bytes(place(2, "_SRCIMG").read_bytes())
    place(2, "_SRCIMG").write_bytes(b"")
    Image.new("RGB", (SIDE, SIDE)).save(place(1))
    Image.new("RGB", (SIDE, SIDE)).save(place(3))
    assert call(evaluate, "suite", "check", str(folder)) == 2
    assert capsys.readouterr().out.splitlines() == [
        "missing: fullset/ps_human/en/ps0.png", "foreign: fullset/ps_human/en/ps3.png",
        "of another size: fullset/ps_human/en/ps1.png",
        "changed: fullset/ps_human/en/ps1_SRCIMG.png", "torn: fullset/ps_human/en/ps2_SRCIMG.png",
    ]


def test_edits_that_cannot_be_drawn_get_one_line(made, tmp_path, capsys):
    def refused(said: str, *args: str, status: int = 2):
        assert call(evaluate, *map(str, args)) == status
        err = capsys.readouterr().err.splitlines()
        assert said in err[-1] and err[-1].startswith("error: ") and "Traceback" not in str(err)

    given = lambda suite, *more: draw_edits(made, suite, tmp_path / "o", *more)
    without = lambda flag, args: [
        a for a, before in zip(args, ["", *args], strict=False) if flag not in (a, before)
    ]
    edits = given("imgedit")
    refused("base does not edit pictures, as imgedit asks for", *edits, "--checkpoint", made.base)
    text_suite = draw_geneval(made, tmp_path / "o", "--checkpoint", str(made.edit))
    refused("prompts of geneval are about none: choose from gedit, gedit-cn, imgedit",
            *without("--size", text_suite))
    refused("the prompts of geneval are of no pictures", *text_suite, "--images", made.images)
    refused("lie apart from its prompts: give --images", *without("--images", edits))
    refused("the prompts of gedit hold their pictures", *given("gedit"), "--images", made.images)
    refused("gedit (14, not 606): take those of huggingface.co/datasets/stepfun-ai/GEdit-Bench@",
            *[a for a in given("gedit") if a != "--unpublished"])
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "0.parquet").write_text("no table")
    refused("0.parquet cannot be read", *given("gedit"), "--prompts", clone)
    (clone / "0.parquet").unlink()
    row = {"id": "../../secret.png", "prompt": "paint it", "edit_type": "add"}
    for names, said in (
        ({"1": row}, "'1' names a file of another folder"),
        ({"../1": row | {"id": "daily object/0.png"}}, "'../1' names a file of another folder"),
        ({"1": row | {"id": "/etc/passwd"}}, "names a file of another folder"),
        ({"1": row | {"id": "daily object/9.png"}}, "object/9.png, which 1 is about, cannot be re"),
        ({"1": row | {"id": "daily object"}}, "daily object, which 1 is about, cannot be read"),
        ({"1": {"id": "0.png", "turn1": "paint it"}}, "UGE and multi-turn suites are not drawn"),
    ):
        (clone / "basic_edit.json").write_text(json.dumps(names))
        refused(said, *edits, "--prompts", clone)
    assert not (tmp_path / "o").exists()
    drawn(made, "imgedit", tmp_path / "done")
    other = shutil.copytree(made.images, tmp_path / "other")
    scorers.source(9).save(other / "daily object" / "0.png")
    refused("the pictures that imgedit edits are not those", "suite", "check", tmp_path / "done",
            "--images", other)
    refused("their sources is", *draw_edits(made, "imgedit", tmp_path / "done"), "--images", other)


def test_what_wise_leaves_in_the_folder_is_its_own(tmp_path):
    for name in ("Results-qwen35/full.json", "Results/x.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    for suite, foreign in (
        ("wise-verified", "Results/x.jsonl"), ("wise-legacy", "Results-qwen35/full.json"),
    ):
        found = gallery.check(Gallery(epath.Path(tmp_path), 0, 1), suites.named(suite), [], [])
        assert found.problems == {"foreign": [foreign]}


def test_geneval_2_maps_prompts_to_pictures(made, tmp_path):
    folder = tmp_path / "pictures"
    _, job = drawn(made, "geneval2", folder)
    assert call(evaluate, "suite", "check", str(folder)) == 0
    found = json.loads((tmp_path / "pictures.json").read_text())
    assert found == {"3 cats": f"{folder}/00000.png", "5 cats": f"{folder}/00001.png"}
    assert all(pathlib.Path(place).is_absolute() for place in found.values())


def test_rewritten_prompts_are_drawn_and_the_scorer_sees_the_suites(made, tmp_path):
    prompts = suites.open_prompts(suites.SUITES["dpg"], str(made.clones / "dpg"), True)
    rows = [{"prompt": item.prompt, "text": f"{item.prompt}, in oil"} for item in prompts.items]
    file = tmp_path / "texts.jsonl"
    file.write_text(scorers.lines(rows))
    found = suites.open_prompts(suites.SUITES["dpg"], str(made.clones / "dpg"), True, str(file))
    assert [item.text for item in found.items] == [row["text"] for row in rows]
    assert found.digest == prompts.digest and found.rewritten and not prompts.rewritten
    file.write_text(scorers.lines(rows[:-1]))
    with pytest.raises(UserError, match="has no text for a b"):
        suites.open_prompts(suites.SUITES["dpg"], str(made.clones / "dpg"), True, str(file))


def test_bad_input_gets_one_line(made, tmp_path, capsys):
    def refused(said: str, *args: str):
        assert call(evaluate, "suite", *map(str, args)) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err

    base = draw_geneval(made, made.geneval)[1:]
    refused("their seed is 0, not 1", *base, "--seed", "1")
    refused("their nfe is 1, not 2", *base, "--steps", "2")
    refused("are not the published ones of geneval (12, not 553)",
            *[a for a in base if a != "--unpublished"])
    refused("no suite 'genevil'", "draw", "genevil", *base[2:])
    refused("has no prompts of dpg: give a clone", "draw", "dpg", *base[2:])
    refused("--process is 3", *base, "--process", "3")
    wide = ["draw", "dpg", *draw_geneval(made, tmp_path / "x", "--size", "64x96")[3:]]
    wide[wide.index("--prompts") + 1] = str(made.clones / "dpg")
    refused("cuts its grids into squares, not into 64x96", *wide)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cat.png").write_text("")
    refused("holds other files (cat.png)", *draw_geneval(made, tmp_path / "full")[1:])
    refused("full.manifest.json beside it", "check", tmp_path / "full")
    other = tmp_path / "evaluation_metadata.jsonl"
    other.write_text(scorers.lines([{"tag": "colors", "prompt": "a red cat"}]))
    refused("are not those that were drawn", "check", made.geneval, "--prompts", other)
    mine = tmp_path / "results.jsonl"
    mine.write_text(scorers.geneval(made.geneval, made.clones))
    read = ["read", made.geneval, "--results"]
    refused("cannot be read", *read, tmp_path / "none.jsonl")
    refused("no .jsonl file with results", *read, ROOT / "README.md")
    torn = tmp_path / "torn.jsonl"
    torn.write_text(mine.read_text()[:-30])
    refused("is no results file of geneval", *read, torn)
    torn.write_text("".join(mine.read_text().splitlines(True)[:-3]))
    refused("results of 3 of 48 are missing (00011 (1); 00011 (2); 00011 (3))", *read, torn)
    other = tmp_path / "other.jsonl"
    other.write_text(scorers.geneval(tmp_path / "elsewhere", made.clones))
    refused("is of other pictures", *read, other)
    other.write_text(mine.read_text().replace("a photo of cat 3", "a photo of a dog"))
    refused("is of another prompt ('a photo of a dog')", *read, other)
    other.write_text(mine.read_text().replace('"correct": true', '"correct": false'))
    refused("has two results of 00000", *read, mine, other)
    refused("there are no scores of", "table", tmp_path / "full")
    args = ["diversity", str(made.geneval), "--weights", str(mine)]
    assert call(evaluate, *args) == 2 and capsys.readouterr().err.count("\n") == 1


# What the official summaries said of the fixtures' results (docs/evaluation.md says how they ran).
GENEVAL, WISE_LEGACY, WISE_VERIFIED = 0.68056, 0.74, 0.40


def read(made, suite: str, folder, names: list, **more):
    suite = suites.named(suite)
    images = str(made.images) if suite.name == "imgedit" else None
    items = suites.open_prompts(suite, str(made.clones / suite.name), True, images=images).items
    return results.read(suite, items, epath.Path(folder), [str(name) for name in names], **more)


def test_geneval_is_the_mean_of_its_tags(made, tmp_path):
    file = tmp_path / "gen.results.jsonl"
    file.write_text(scorers.geneval(tmp_path / "gen", made.clones))
    found = read(made, "geneval", tmp_path / "gen", [file])
    right = [4 - i % 4 for i in range(12)]
    groups, start = [], 0
    for size in scorers.SIZES:
        groups.append(sum(right[start : start + size]) / (4 * size))
        start += size
    assert found["score"] == pytest.approx(sum(groups) / 6)
    assert abs(found["score"] - sum(right) / 48) > 0.01  # not the mean of all pictures
    assert list(found["groups"].values()) == pytest.approx(groups)
    assert found["score"] == pytest.approx(GENEVAL, abs=5e-6)
    assert found["further"]["correct pictures"] == pytest.approx(sum(right) / 48)
    low, high = found["interval"]
    assert low < found["score"] < high and found["found"] == found["expected"] == 48
    log = tmp_path / "summary.txt"
    log.write_text("Overall score (avg. over tasks): 0.99999")
    assert "own line says 0.99999" in read(made, "geneval", tmp_path / "gen", [file, log])[
        "notes"][0]


def test_dpg_is_the_mean_of_its_lines(made, tmp_path):
    file = tmp_path / "dpg.results.txt"
    file.write_text(scorers.dpg(tmp_path / "dpg", said=str(100 * (1 + 0.5 + 0.375) / 3)))
    found = read(made, "dpg", tmp_path / "dpg", [file])
    assert found["score"] == pytest.approx(62.5) and found["notes"] == []
    file.write_text(scorers.dpg(tmp_path / "dpg", said="84.2"))
    assert "own line says 84.2" in read(made, "dpg", tmp_path / "dpg", [file])["notes"][0]
    file.write_text("".join(scorers.dpg(tmp_path / "dpg").splitlines(True)[1:]))
    with pytest.raises(UserError, match=r"results of 1 of 3 are missing \(12\)"):
        read(made, "dpg", tmp_path / "dpg", [file])
    found = read(made, "dpg", tmp_path / "dpg", [file], partial=True)
    assert (found["found"], found["expected"]) == (2, 3)


@pytest.mark.parametrize("suite", scorers.ENDS)
def test_wise_weighs_its_groups(made, tmp_path, suite):
    for name, text_ in scorers.wise(suite).items():
        (tmp_path / name).write_text(text_)
    found = read(made, suite, tmp_path / "wise", sorted(tmp_path.iterdir()))
    if suite == "wise-legacy":
        groups = [0.925, 0.575, 0.575, 0.575, 0.65, 0.925]  # (2, 1, 1) is .85, (0, 2, 2) .30
        weights, official = (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), WISE_LEGACY
    else:
        groups = [0.5, 0, 0.5, 0.5, 0, 0]
        weights, official = (0.4, *[0.12] * 5), WISE_VERIFIED
    expected = sum(w * group for w, group in zip(weights, groups, strict=True))
    assert found["score"] == pytest.approx(expected)
    assert list(found["groups"].values()) == pytest.approx(groups)
    for name, text_ in scorers.wise(suite, range(1, 1001)).items():
        (tmp_path / name).write_text(text_)
    rows = [{"Prompt": "?", "prompt_id": n} for n in range(1, 1001)]
    items = suites.named(suite).parse({"a.json": json.dumps(rows).encode()})
    whole = results.read(
        suites.named(suite), items, epath.Path(tmp_path), list(map(str, tmp_path.iterdir()))
    )
    assert whole["expected"] == 1000 and whole["score"] == pytest.approx(official, abs=5e-3)
    other = next(name for name in scorers.ENDS if name != suite)
    for name, text_ in scorers.wise(other).items():
        (tmp_path / name).write_text(text_)
    with pytest.raises(UserError, match="is it of the other WISE"):
        read(made, suite, tmp_path / "wise", sorted(tmp_path.iterdir()))


def test_longtext_counts_words(made, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(scorers.longtext(tmp_path / "text"))
    (tmp_path / "scores.txt").write_text("Text Score: 0.1000\n")
    names = [file, tmp_path / "scores.txt"]
    found = read(made, "longtext-en", tmp_path / "text", names)
    assert found["score"] == pytest.approx(0.1) and found["notes"] == []
    assert found["expected"] == 8 and found["said"] == "0.1000"


def test_geneval_2_has_both_means(made, tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps([[1, 0.25], [1, 1, 0]]))
    found = read(made, "geneval2", tmp_path, [file])
    assert found["score"] == pytest.approx(100 * (0.5 + 0) / 2)
    assert found["further"] == {"Soft-TIFA AM": pytest.approx(100 * (0.625 + 2 / 3) / 2)}
    file.write_text(json.dumps([[1, 0.25]]))
    with pytest.raises(UserError, match="results of 1 of 2 are missing"):
        read(made, "geneval2", tmp_path, [file])


# What the official summaries said of them: overall, its two parts, and of what all answered; of
# rows doubled by a stop 3.411. Of ImgEdit by type; people take the mean of the nine.
GEDIT = (3.684, 4.076, 4.530, 4.122)
IMGEDIT = {"add": 1.33, "adjust": 3.33, "extract": 3.67, "replace": 2.66, "remove": 3.33,
           "background": 3.67, "style": 2.33, "compose": 4.33, "action": 1.33}


@pytest.mark.parametrize("again", [0, 2])
def test_gedit_is_the_mean_of_its_tasks_and_counts_nothing_twice(made, tmp_path, again):
    file = tmp_path / "run_combined_gpt_score.csv"
    file.write_text(scorers.gedit(tmp_path / "run", again))
    (tmp_path / "summary.txt").write_text(
        "Average: 3.894, 4.121, 3.411\nAverage Intersection: 1.000, 1.000, 1.000\n"
    )
    found = read(made, "gedit", tmp_path / "run", [file, tmp_path / "summary.txt"])
    numbers = [found["score"], *found["further"].values()]
    assert numbers == pytest.approx(GEDIT, abs=5e-4) and found["groups"]["background_change"] == 6
    assert found["notes"] == ["the scorer's own line says 3.411, its results give 3.6837"]
    plain = np.mean([np.sqrt(a * b) for a, b in scorers.GEDIT_SCORES])
    assert abs(plain - found["score"]) > 0.01 and found["found"] == found["expected"] == 14
    by_task = [tmp_path / f"{n}.csv" for n in range(2)]  # as the scorer's files of tasks
    head, *rows = file.read_text().split("\r\n")
    for n, some in enumerate((rows[:9], rows[9:])):
        by_task[n].write_text("\r\n".join([head, *some]))
    apart = read(made, "gedit", tmp_path / "run", by_task)
    assert [apart["score"], *apart["further"].values()] == pytest.approx(numbers)
    file.write_text(file.read_text().replace("paint 3", "paint 4"))
    with pytest.raises(UserError, match="is of another prompt"):
        read(made, "gedit", tmp_path / "run", [file])


def test_imgedit_is_the_mean_of_its_types(made, tmp_path):
    said, means = scorers.imgedit(), tmp_path / "types.json"
    file = tmp_path / "result.json"
    file.write_text(json.dumps(said))
    means.write_text(json.dumps(IMGEDIT))
    found = read(made, "imgedit", tmp_path / "pictures", [file, means])
    assert found["groups"] == pytest.approx(IMGEDIT, abs=5e-3) and found["notes"] == []
    assert found["score"] == pytest.approx(np.mean(list(IMGEDIT.values())), abs=5e-3)
    assert abs(found["score"] - np.mean(scorers.IMGEDIT_SCORES)) > 0.01
    means.write_text(json.dumps(IMGEDIT | {"style": 2.5}))
    assert "says 2.50 of style, its results give 2.33" in read(
        made, "imgedit", tmp_path / "pictures", [file, means])["notes"][0]
    # The scorer leaves these out without a word, or stops at the last.
    file.write_text(json.dumps(said | {"0": "Score: 4.5", "7": "Score: 4/5", "14": {"error": ""}}))
    with pytest.raises(UserError, match=r"results of 3 of 11 are missing \(0; 14; 7\)"):
        read(made, "imgedit", tmp_path / "pictures", [file])


def test_intervals_are_of_prompts_not_of_pictures():
    """Four pictures of a prompt that are all alike tell no more than one."""
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.8
    value, low, high = results.scored(None, {"": (4.0 * right, np.full(200, 4.0))})
    error = np.sqrt(value * (1 - value) / 200)
    assert value == pytest.approx(right.mean())
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_the_table_has_the_papers_row_and_never_two_judges(made, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    file.write_text(scorers.geneval(made.geneval, made.clones))
    dpg = tmp_path / "dpg"
    drawn(made, "dpg", dpg)
    scored = tmp_path / "dpg.results.txt"
    scored.write_text(scorers.dpg(dpg))
    read = lambda folder, *args: call(evaluate, "suite", "read", *map(str, (folder, *args)))
    assert read(made.geneval, "--results", file) == read(dpg, "--results", scored) == 0
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown")}
    assert call(
        evaluate, "suite", "table", str(made.geneval), str(dpg),
        *(arg for name, file in files.items() for arg in (f"--{name}", str(file))),
    ) == 0
    out = capsys.readouterr().out
    assert "prompts that are not the published ones" in out and "48 of 48" in out
    rows = {row["metric"]: row for row in json.loads(files["json"].read_text())["rows"]}
    assert rows["DPG-Bench"]["run"] == pytest.approx(62.5)
    assert rows["DPG-Bench"]["judge"] == "mPLUG-large (official scorer)"
    assert "| DPG-Bench | 62.50 [" in files["markdown"].read_text()

    manifest = file_of(made.geneval, ".scores.json")
    qwen = {"parameters": 20_430_401_088, "adapters": True}
    kept = tmp_path / "run.scores.json"
    kept.write_text(json.dumps(manifest | {"manifest": manifest["manifest"] | qwen}))
    found = table.table([str(tmp_path / "run")])
    assert found.heads[1:] == ("TwinFlow-Qwen-Image LoRA, 1 NFE", "Qwen-Image, 50 steps guided")
    assert (found.rows[0].paper, found.rows[0].teacher, found.rows[3].paper) == (0.86, 0.87, 0.84)
    mine = manifest["manifest"] | qwen
    kept.write_text(json.dumps(manifest | {"manifest": mine | {"rewritten": "x"}}))
    found = table.table([str(tmp_path / "run")])
    assert (found.rows[0].paper, found.rows[0].teacher, found.rows[0].mark) == (0.90, None, "†")
    teacher = tmp_path / "base.scores.json"
    teacher.write_text(json.dumps(manifest | {"judge": "jax-geneval"}))
    kept.write_text(json.dumps(manifest | {"manifest": mine}))
    with pytest.raises(UserError, match="two judges give no comparison"):
        table.table([str(tmp_path / "run")], [str(tmp_path / "base")])
    kept.write_text(json.dumps(manifest | {"manifest": mine, "judge": "jax-geneval"}))
    found = table.table([str(tmp_path / "run")], [str(tmp_path / "base")])
    assert found.rows[0].paper is None and found.rows[0].teacher == found.rows[0].run
    with pytest.raises(UserError, match="the folders are of several runs: seed"):
        other = manifest["manifest"] | {"seed": 7}
        teacher.write_text(json.dumps(manifest | {"manifest": other}))
        table.table([str(tmp_path / "run"), str(tmp_path / "base")])


def test_the_table_of_edits_has_their_row_of_the_paper(made, tmp_path):
    for suite, name, text_ in (
        ("gedit", "run_combined_gpt_score.csv", scorers.gedit(tmp_path / "gedit")),
        ("imgedit", "result.json", json.dumps(scorers.imgedit())),
    ):
        drawn(made, suite, tmp_path / suite)
        (tmp_path / name).write_text(text_)
        args = ["suite", "read", str(tmp_path / suite), "--results", str(tmp_path / name)]
        assert call(evaluate, *args) == 0
        kept = file_of(tmp_path / suite, ".scores.json")
        kept["manifest"] |= {"parameters": 20_430_401_088, "adapters": True, "nfe": 4}
        (tmp_path / f"{suite}.scores.json").write_text(json.dumps(kept))
    found = table.table([str(tmp_path / "gedit"), str(tmp_path / "imgedit")])
    assert found.heads[1:] == (
        "TwinFlow-Qwen-Image-Edit LoRA, 4 NFE", "Qwen-Image-Edit, 50 steps guided"
    )
    rows = {row.metric: (row.paper, row.teacher, row.judge) for row in found.rows}
    assert rows["GEdit-Bench (English)"] == (5.91, 7.56, "GPT-4.1")
    assert rows["  perceptual quality"] == (6.97, 7.86, "")
    assert rows["ImgEdit-Bench (basic)"] == (3.55, 4.27, "GPT-4o")
    assert "each picture's own size" in found.text()


def file_of(folder: pathlib.Path, ending: str) -> dict:
    return json.loads((folder.parent / (folder.name + ending)).read_text())


def test_rows_of_the_paper_are_of_whom_they_say():
    assert paper.row_of(20_430_401_088, True, 1).scores["dpg"] == 86.52
    assert paper.row_of(604_000_000, False, 2).scores["dpg"] == 79.7
    assert paper.row_of(1_640_177_312, False, 1).scores["geneval"] == 0.81
    assert paper.row_of(604_000_000, True, 1) is None
    tags = [f"geneval: {tag}" for tag in paper.TAGS]
    for row in (*paper.PAPER.values(), *paper.REWRITTEN_PAPER.values(), *paper.TEACHERS.values()):
        if tags[0] in row.scores:  # rounded to two places each
            mean = sum(row.scores[tag] for tag in tags) / 6
            assert mean == pytest.approx(row.scores["geneval"], abs=0.01), row.name


def test_speed_counts_no_compiling(made, monkeypatch):
    monkeypatch.setattr(speed, "BATCHES", (BATCH,))
    monkeypatch.setattr(speed, "REPEATS", 1)
    job, _ = made.job("geneval")
    [row] = speed.measure(
        made.pipeline, job.ways[SIDE, SIDE].sampler, shape_of(made), job.tile, None
    )
    seconds = row["seconds"]
    assert row["pictures a second"] == pytest.approx(BATCH / seconds["all"])
    parts = [seconds[stage] for stage in speed.STAGES]
    assert all(part > 0 for part in parts) and sum(parts) < seconds["all"]
    assert str(BATCH) in speed.table([row]) and speed.device() == "1 x cpu"


def test_published_digests_are_of_whole_suites():
    assert {name: suite.count for name, suite in suites.SUITES.items()} == {
        "geneval": 553, "dpg": 1065, "wise-legacy": 1000, "wise-verified": 1000,
        "longtext-en": 160, "longtext-zh": 160, "geneval2": 800, "gedit": 606, "gedit-cn": 606,
        "imgedit": 737,
    }
    for name, suite in suites.SUITES.items():
        if name.startswith("gedit"):
            assert sum(suite.digest.values()) == suite.count
        else:
            assert len(suite.digest) == 2 * hashlib.sha256().digest_size
