"""Text to image from the command line against diffusers' own modules and pipeline."""

import copy
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath
from PIL import Image

from tests import qwen_folder
from tests.test_verbs import call
from twinflow_jax import drawing, files, images, models, sample, sampling
from twinflow_jax.checkpoints import imported, importing, store
from twinflow_jax.errors import Terminated
from twinflow_jax.models import tiling

PROMPTS = [
    "a red fox",
    "two cats, one of them asleep, on a blue sofa by the window of a house in the rain",
]  # 64 tokens hold the first, not the second
LONG = "very, " * 200 + "long"
SIZE = (64, 96)  # height, width
TWO_STEPS = (0.999, 0.6, 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small pipeline of diffusers', its import, and PROMPTS drawn in two steps from it."""
    folder = tmp_path_factory.mktemp("text_to_image")
    made = types.SimpleNamespace(
        folder=folder, pipeline=qwen_folder.write(folder), checkpoint=folder / "checkpoint",
        prompts=["--prompts", str(folder / "prompts.txt")],
        embeddings=folder / "kept" / "embeddings.safetensors",
    )
    importing.import_folder(str(folder / "pipeline"), str(made.checkpoint), progress=False)
    lines = "\n \r\n".join(PROMPTS)  # as editors of several systems leave them
    (folder / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\xef\xbb\xbf\r\n")
    made.two_steps = draw(
        made.checkpoint, folder / "two_steps", *made.prompts, "--steps", "2",
        "--save-embeddings", str(made.embeddings),
    )
    return made


def draw(checkpoint, out: pathlib.Path, *arguments: str, size=SIZE) -> np.ndarray:
    """The pictures (N, H, W, 3) that the verb writes, in the order of their names."""
    assert call(
        sample, "--checkpoint", str(checkpoint), "--out", str(out), "--size",
        f"{size[1]}x{size[0]}", *arguments,
    ) == 0
    return read(out)


def read(folder: pathlib.Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file), int) for file in sorted(folder.iterdir())])


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within one of 255 levels at 99.9 % of the places, and nowhere far away."""
    assert ours.shape == theirs.shape and ours.std() > 20, (ours.shape, theirs.shape)
    difference = np.abs(ours - theirs)
    assert (difference <= 1).mean() >= 0.999 and difference.max() <= 4, (
        (difference > 1).mean(), difference.max(),
    )


def assert_same_tensors(before: pathlib.Path, after: pathlib.Path, networks) -> None:
    """Of the networks of two folders, byte for byte, in files of the same names."""
    for network in networks:
        [file] = (before / network).glob("*.safetensors")
        theirs = safetensors.numpy.load_file(file)
        ours = safetensors.numpy.load_file(after / network / file.name)
        assert theirs.keys() == ours.keys(), network
        assert all(theirs[key].tobytes() == ours[key].tobytes() for key in theirs), network


# The same in PyTorch.


def noise_of(number: int, size, seed: int = 0) -> tuple[torch.Tensor, jax.Array]:
    """The packed noise that a picture starts from, and the key of its fresh noise."""
    first, second = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
    return normal(first, size), second


def normal(key: jax.Array, size) -> torch.Tensor:
    """Noise (1, h/2 w/2, 64): a channel's 2x2 places one after the other."""
    x = torch.from_numpy(np.array(jax.random.normal(key, (size[0] // 8, size[1] // 8, 16))))
    parts = [x[y::2, z::2, c].flatten() for c in range(16) for y in (0, 1) for z in (0, 1)]
    return torch.stack(parts, dim=-1)[None]


def two_times(transformer):
    """E1(t) + E2(r) (t - r) in diffusers' module, E2 a copy of E1; r is `transformer.r`."""
    second = copy.deepcopy(transformer.time_text_embed)

    def add(_, inputs, first):
        t, hidden = inputs[:2]
        return first + second(transformer.r, hidden) * (t - transformer.r)[:, None]

    return transformer.time_text_embed.register_forward_hook(add)


@torch.no_grad()
def few_steps(pipeline, prompt, times, targets, share: float = 0.0, size=SIZE, number=0, seed=0):
    """The any-step sampler written out: (H, W, 3), integers.

    targets: the times r that the network is told. share: of fresh noise.
    """
    tokens, _ = pipeline.encode_prompt(prompt)
    x, key = noise_of(number, size, seed)
    hook = two_times(pipeline.transformer)
    for i, (t, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        pipeline.transformer.r = torch.tensor([targets[i]], dtype=torch.float32)
        velocity = pipeline.transformer(
            hidden_states=x, timestep=torch.tensor([t], dtype=torch.float32),
            encoder_hidden_states=tokens, img_shapes=[[(1, size[0] // 16, size[1] // 16)]],
        ).sample
        data, noise = x - t * velocity, x + (1 - t) * velocity
        fresh = normal(jax.random.fold_in(key, i), size)
        x = (1 - then) * data + then * ((1 - share) ** 0.5 * noise + share**0.5 * fresh)
    hook.remove()
    return decoded(pipeline, data, size)


@torch.no_grad()
def decoded(pipeline, x: torch.Tensor, size) -> np.ndarray:
    """The picture (H, W, 3) of packed latents, integers."""
    latents, config = pipeline._unpack_latents(x, *size, 8), pipeline.vae.config
    mean, std = (
        torch.tensor(v).view(1, 16, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    return pixels(pipeline.vae.decode(latents * std + mean).sample[0, :, 0])


def pixels(image: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3), integers."""
    return (image.clamp(-1, 1) * 127.5 + 127.5).round().int().permute(1, 2, 0).numpy()


def test_one_step_of_a_long_prompt(made, tmp_path, capsys):
    ours = draw(made.checkpoint, tmp_path, "--prompt", LONG, "--seed", "5")
    assert_close(ours[0], few_steps(made.pipeline, LONG, (1.0, 0.0), (0.0,), seed=5))
    printed = capsys.readouterr()
    warnings = [line for line in re.split(r"[\r\n]+", printed.err) if "warning: " in line]
    assert [re.sub(".*warning: ", "", line) for line in warnings] == [
        f"{made.checkpoint} is a base model, not trained to draw in a few steps: try --base",
        "prompt 1 of 1 makes 1209 tokens: only the first 1024 are used",
    ]
    first, *times = printed.out.strip().splitlines()
    assert first == f"picture in {next(tmp_path.iterdir())}"
    number = r"\d+\.\d\d s"
    for stage, line in zip(("text encoding", "denoising", "decoding"), times, strict=True):
        assert re.fullmatch(f"{stage}: load {number}, compile {number}, run {number}", line)


def test_two_steps_with_fresh_noise(made):
    """The recommended ones: r = 0, and all of the noise renewed."""
    theirs = [few_steps(made.pipeline, p, TWO_STEPS, (0.0, 0.0), share=1.0) for p in PROMPTS]
    assert_close(made.two_steps, np.stack(theirs))
    with Image.open(sorted((made.folder / "two_steps").iterdir())[1]) as picture:
        assert picture.text["prompt"] == PROMPTS[1] and picture.text["number"] == "0"
        settings = json.loads(picture.text["twinflow"])
    assert settings["nfe"] == 2 and settings["stochastic"] == [1, 0] and settings["seed"] == 0
    np.testing.assert_allclose(settings["times"], TWO_STEPS)


@pytest.mark.parametrize(("size", "negative"), [((64, 96), " "), ((80, 48), "a blurred photo")])
def test_base_sampling_is_the_published_pipeline(made, tmp_path, size, negative):
    settings = ["--base", "--steps", "6", "--guidance", "4"]
    settings += [] if negative == " " else ["--negative", negative]
    ours = draw(made.checkpoint, tmp_path, *made.prompts, *settings, size=size)
    theirs = made.pipeline(
        PROMPTS, [negative] * len(PROMPTS), true_cfg_scale=4.0, height=size[0], width=size[1],
        num_inference_steps=6, latents=noise_of(0, size)[0].expand(len(PROMPTS), -1, -1),
        output_type="pt",
    ).images
    assert_close(ours, np.stack([pixels(2 * image - 1) for image in theirs]))


@pytest.mark.parametrize(("none", "guidance"), [(1.0, 4.0), (0.0, 3.0), (0.0, 0.0)])
def test_guidance_is_counted_as_the_family_does(none, guidance, monkeypatch):
    """pos + w (pos - neg), w from 0, is neg + (1 + w) (pos - neg)."""
    sana = models.FAMILIES["sana"]
    counted = dataclasses.replace(sana.text_to_image, no_guidance=none)
    family = dataclasses.replace(sana, text_to_image=counted)
    monkeypatch.setitem(models.FAMILIES, "sana", family)
    pipeline = drawing.Pipeline(imported.Imported(epath.Path(), {"family": "sana"}), "float32")
    apply = lambda params, x, t, r, cond: cond
    draw = drawing.denoising.base(
        pipeline, sampling.Schedule((1.0, 0.0), (1.0,), "euler"), guidance
    )
    positive, negative = np.float32([[2.0]]), None if guidance == none else np.float32([[0.5]])
    x = draw(apply, {}, np.zeros((1, 1), np.float32), positive, negative, None)
    assert x == -(2.0 + (guidance - none) * (2.0 - (negative or 0.0)))


def test_pictures_do_not_depend_on_what_is_drawn_beside_them(made, tmp_path):
    alone = draw(made.checkpoint, tmp_path, "--prompt", PROMPTS[0], "--steps", "2")
    assert_close(alone, made.two_steps[:1])


def test_several_pictures_from_embeddings(made, tmp_path, monkeypatch):
    """In four steps, r the next time. The text encoder may be gone; the rest is loaded in turn."""
    stripped = tmp_path / "checkpoint"
    shutil.copytree(made.checkpoint, stripped, ignore=lambda *_: {"text_encoder", "tokenizer"})
    live = lambda: sum(array.nbytes for array in jax.live_arrays())
    before, loaded, load = live(), [], store.load

    def watch(arrays, abstract, label, progress):
        loaded.append(label)
        assert live() - before < 100_000  # the smallest network has 350 kB
        return load(arrays, abstract, label, progress)

    monkeypatch.setattr(store, "load", watch)
    ours = draw(
        stripped, tmp_path / "out", "--embeddings", str(made.embeddings), "--steps", "4",
        "--style", "any", "--count", "2", "--batch", "3",
    )
    assert loaded == ["transformer", "vae"] and live() - before < 100_000
    times = (*np.linspace(0.999, 0.5, 4), 0.0)
    theirs = [
        few_steps(made.pipeline, prompt, times, times[1:], number=number)
        for prompt in PROMPTS for number in (0, 1)
    ]
    assert_close(ours, np.stack(theirs))


def test_a_stopped_drawing_keeps_what_is_done_and_goes_on(made, tmp_path, monkeypatch, capsys):
    """Stopped while the last of four is decoded."""
    arguments = [
        "--embeddings", str(made.embeddings), "--count", "2", "--steps", "2", "--out",
        str(tmp_path / "out"), "--checkpoint", str(made.checkpoint), "--size", "96x64",
    ]
    whole, calls = tiling.tiled, []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(tiling, "tiled", stopping)
    assert call(sample, *arguments) == 130
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert len(kept) == 3
    calls.clear()
    monkeypatch.setattr(tiling, "tiled", lambda *given: calls.append(1) or whole(*given))
    assert call(sample, *arguments) == 0
    assert len(calls) == 1  # the one that was missing
    assert "4 pictures in" in (out := capsys.readouterr().out) and "3 of them there before" in out
    again = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert len(again) == 4 and again.items() >= kept.items()
    assert_close(read(tmp_path / "out")[::2], made.two_steps)


def test_a_drawing_that_is_stopped_while_it_denoises_keeps_what_is_done(
    made, tmp_path, monkeypatch, capsys
):
    """At the third of four: two are decoded, and no part of a sheet."""
    run, calls = drawing.Pipeline.run, []

    def stopping(pipeline, stage, *given):
        calls.append(stage)
        if stage == "denoising" and calls.count(stage) == 3:
            raise Terminated
        return run(pipeline, stage, *given)

    monkeypatch.setattr(drawing.Pipeline, "run", stopping)
    arguments = [
        "--checkpoint", str(made.checkpoint), "--embeddings", str(made.embeddings), "--count", "2",
        "--steps", "2", "--size", "96x64", "--batch", "1",
    ]
    assert call(sample, *arguments, "--out", str(tmp_path / "out")) == 143
    assert "decoding what is denoised" in capsys.readouterr().err
    [one, another] = sorted((tmp_path / "out").iterdir())
    assert "_00_" in one.name and "_01_" in another.name
    assert_close(read(tmp_path / "out")[:1], made.two_steps[:1])
    calls.clear()
    assert call(sample, *arguments, "--out", str(tmp_path / "sheet"), "--sheet") == 143
    assert "decoding" not in calls and not (tmp_path / "sheet").exists()


def test_pictures_of_other_settings_lie_beside(made, tmp_path, capsys):
    """Of other tokens or tiles, another size or time grid; sheets of other prompts too."""
    kept = safetensors.numpy.load_file(made.embeddings)
    kept["tokens"] = kept["tokens"][::-1].copy()
    kept["mask"] = kept["mask"][::-1].copy()
    safetensors.numpy.save_file(kept, tmp_path / "other.safetensors")
    arguments, there = ["--checkpoint", str(made.checkpoint), "--out", str(tmp_path / "out")], {}
    mine, other = (
        ["--embeddings", str(file)] for file in (made.embeddings, tmp_path / "other.safetensors")
    )
    for more, added in (
        (mine, 2), (mine, 0), (other, 2), ([*other, "--tile", "256"], 2),
        ([*mine, "--size", "96x64"], 2), ([*mine, "--gap", "0.2", "0"], 2),
        ([*mine, "--sheet"], 1), ([*other, "--sheet"], 1), ([*mine, "--sheet", "--count", "2"], 1),
    ):
        assert call(sample, *arguments, "--size", "64", *more) == 0
        before, there = there, {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
        assert there.items() >= before.items() and len(there) == len(before) + added, more
        assert ("2 of them there before" in capsys.readouterr().out) == (added == 0)


def test_a_folder_that_cannot_be_written_shows_before_anything_is_drawn(made, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert call(
            sample, "--checkpoint", str(made.checkpoint), "--prompt", "a fox", "--out", str(out)
        ) == 2
        assert "--out" in (said := capsys.readouterr().err) and "denoising" not in said


def test_bfloat16_on_a_sheet(made, tmp_path):
    [sheet] = draw(
        made.checkpoint, tmp_path, "--embeddings", str(made.embeddings), "--steps", "2",
        "--dtype", "bfloat16", "--sheet",
    )
    [name] = [file.name for file in tmp_path.iterdir()]
    assert re.fullmatch(r"sheet_few2nfe_seed0_[0-9a-f]{8}\.png", name)
    height, width = SIZE
    for row, picture in enumerate(made.two_steps):  # each pixel twice, a line between them
        top, left = 22 + 2 * (height + 1) * row, 4
        found = sheet[top : top + 2 * height : 2, left : left + 2 * width : 2]
        assert np.abs(found - picture).mean() < 2


def test_tiles(made):
    """Attention sees a tile and not the picture, so that there is some difference."""
    pipeline = drawing.open_pipeline(made.checkpoint)
    x = noise_of(0, (32, 288))[0]
    latents = made.pipeline._unpack_latents(x, 32, 288, 8)[0, :, 0].permute(1, 2, 0).numpy()
    codec = drawing.codec
    [ours] = codec.decode(pipeline, latents[None], codec.tile_of(pipeline, 256))
    theirs = decoded(made.pipeline, x, (32, 288))
    assert theirs.std() > 20 and 0 < np.abs(images.to_uint8(ours) - theirs).mean() < 3


def test_batches_share_one_program(made, compiled):
    """Of the encoders and of the sampler; the last batch has fewer rows than the others."""
    pipeline = drawing.open_pipeline(made.checkpoint)
    prompts = pipeline.family.tokenize(drawing.text.tokenizers(pipeline), PROMPTS[:1] * 5)
    with drawing.text.encoder(pipeline, batch=2) as encode:
        tokens = encode(prompts)
        encode(jax.tree.map(lambda a: a[:1], prompts))
    assert len(compiled) == 1
    with drawing.codec.encoder(pipeline) as encode:
        for rows in (2, 1):
            encode(np.zeros((rows, *SIZE, 3), np.float32), 2)
    assert len(compiled) == 2
    numbers, shape = np.arange(3), drawing.denoising.latent_shape(pipeline, SIZE)
    for _ in range(2):  # an equal sampler, made anew
        few = drawing.FewStep(sampling.few_step(2))
        parts = drawing.denoising.denoise(
            pipeline, few, tokens, numbers, numbers, shape, 0, batch=2
        )
        assert [len(part) for part in parts] == [2, 1] and len(compiled) == 3


SHARDED = """
import sys
import jax
import tests.conftest
from twinflow_jax import drawing, sample
from twinflow_jax.errors import run_verb

assert len(jax.devices()) == 8
pipeline = drawing.open_pipeline(sys.argv[2])
pipeline = drawing.Pipeline(pipeline.checkpoint, "float32", progress=False)
for name in ("transformer", "text_encoder"):
    with pipeline.loaded(name, name) as (_, params):
        leaves = jax.tree.leaves(params)
        mine = sum(leaf.addressable_shards[-1].data.nbytes for leaf in leaves)
        print(name, mine / sum(leaf.nbytes for leaf in leaves))
run_verb(sample.main)
"""


def test_eight_devices_draw_what_one_does(made, tmp_path):
    process = subprocess.run(
        [
            sys.executable, "-c", SHARDED, "--checkpoint", str(made.checkpoint), *made.prompts,
            "--out", str(tmp_path), "--count", "2", "--size", "96x64",
        ],
        env=os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        },
        capture_output=True, text=True, check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    shares = dict(line.split(" ") for line in process.stdout.splitlines()[:2])
    assert all(float(share) < 0.25 for share in shares.values()), shares  # 1/8, and small leaves
    theirs = [
        few_steps(made.pipeline, prompt, (1.0, 0.0), (0.0,), number=number)
        for prompt in PROMPTS for number in (0, 1)
    ]
    assert_close(read(tmp_path), np.stack(theirs))


def test_bad_inputs_get_one_line(made, tmp_path, capsys):
    def without(*names: str) -> pathlib.Path:
        """A new copy of the checkpoint's record and small files, some left out."""
        folder = tmp_path / f"copy_{len(list(tmp_path.iterdir()))}"
        left_out = {"arrays", "carried", *names}
        shutil.copytree(made.checkpoint, folder, ignore=lambda _, found: left_out & {*found})
        return folder

    def kept(**changes) -> list[str]:
        """A file of embeddings, with other arrays in it."""
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        arrays = safetensors.numpy.load_file(made.embeddings) | changes
        arrays = {name: array for name, array in arrays.items() if array is not None}
        safetensors.numpy.save_file(arrays, file)
        return ["--embeddings", str(file)]

    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    transformer, unfinished, other, broken = tmp_path / "one", without(), without(), without()
    importing.import_folder(
        str(made.folder / "pipeline/transformer"), str(transformer), progress=False
    )
    (unfinished / files.UNFINISHED).touch()
    scheduler = "files/scheduler/scheduler_config.json"
    (other / scheduler).write_text('{"_class_name": "DDIMScheduler"}')
    (broken / scheduler).write_text("{")
    fox = ["--prompt", "a fox"]
    on = lambda folder: [*fox, "--checkpoint", str(folder)]
    text = np.frombuffer(b"[]", np.uint8)
    cases = [
        ([], "give one of --prompt, --prompts and --embeddings"),
        ([*fox, *made.prompts], "give one of"),
        (["--prompt", " "], "prompt 1 of 1 is empty"),
        ([*fox, "--prompt", ""], "prompt 2 of 2 is empty"),
        (["--prompts", str(tmp_path / "no.txt")], r"no.txt cannot be read \(No such file"),
        (["--prompts", str(tmp_path / "empty.txt")], "empty.txt is empty: write one prompt a line"),
        (["--prompts", str(tmp_path / "latin.txt")], "latin.txt cannot be read"),
        ([*fox, "--size", "100x70"], "100x70 is not divisible by 16: choose 96x64"),
        ([*fox, "--size", "8"], "choose 16x16"),
        ([*fox, "--size", "0"], "'0' is no size; give pixels"),
        ([*fox, "--size", "64*96"], "give pixels like 512"),
        ([*fox, "--size", "1000000000"], "up to 9999"),
        ([*fox, "--classes", "1"], "--classes cannot be used: .* draws from prompts"),
        ([*fox, "--guidance", "4"], "--guidance cannot be used: a few steps take no guidance"),
        ([*fox, "--base", "--guidance", "nan"], "--guidance: nan is no finite number"),
        ([*fox, "--base", "--style", "few", "--order", "2"], "--style, --order cannot be used"),
        ([*fox, "--base", "--guidance", "1", "--negative", "a"], "--negative cannot be used"),
        ([*fox, "--base", "--steps", "0"], "steps is 0; sampling takes at least 1"),
        ([*fox, "--base", "--steps", "100000000"], "at most 1000"),
        ([*fox, "--tile", "100"], "--tile is 100; give a multiple of 8, 256 or more"),
        ([*fox, "--tile", "wide"], "argument --tile: invalid int value: 'wide'"),
        ([*fox, "--batch", "0"], "--batch: 0 is no whole number from 1 to 1,000,000"),
        ([*fox, "--count", "0"], "--count: 0 is no whole number"),
        ([*fox, "--count", "1000000000"], "--count: 1000000000 is no whole number"),
        ([*fox, *fox, "--count", "600000"], "1,200,000 pictures: at most 1,000,000 of one command"),
        ([*fox, "--sheet", "--count", "20000"], "at most 14,563 on a sheet of 96x64 each"),
        (["--prompt", "caf\udce9"], "prompt 1 of 1 is no text in UTF-8"),
        ([*fox, "--base", "--negative", "\udce9"], "prompt 1 of 1 is no text in UTF-8"),
        ([*fox, "--raw"], "is an imported checkpoint: --raw"),
        ([*fox, "--out", str(tmp_path / "empty.txt")], "empty.txt is a file: choose a folder"),
        ([*fox, "--save-embeddings", str(tmp_path)], "--save-embeddings .* is a folder: choose a"),
        ([*fox, "--save-latents", str(tmp_path / "empty.txt" / "a")],
         "--save-latents .*empty.txt is a file: choose a folder"),
        ([*fox, "--save-latents", ""], "--save-latents  is a folder"),
        ([*fox, "--out", ""], "--out is empty: name a folder"),
        ([*fox, "--out", "~nobody here/x"], "--out: ~nobody here/x names a user that there is not"),
        ([*fox, "--out", str(tmp_path / ("x" * 300))], "--out: .* has a name of over 255 bytes"),
        (on(tmp_path / "nothing"), "is no run and no imported checkpoint"),
        (on(made.folder / "pipeline"), "what `twinflow convert import` wrote"),
        (on(unfinished), "was not imported to its end: run the import again"),
        (on(transformer), "holds only transformer, no vae: import the whole pipeline"),
        (on(without("tokenizer")), "holds no tokenizer"),
        (on(without()), "text_encoder.* cannot be read"),
        ([*on(without("scheduler")), "--base"], "has no scheduler, so no base sampling"),
        ([*on(other), "--base"], "the scheduler is of class 'DDIMScheduler'; known are"),
        ([*on(broken), "--base"], "scheduler_config.json cannot be read"),
        (["--embeddings", str(tmp_path / "no")], "no cannot be read .No such file"),
        (["--embeddings", str(tmp_path / "empty.txt")], "is no safetensors file"),
        (kept(mask=None), "holds no embeddings: write one with --save-embeddings"),
        (kept(prompts=text[:1]), "holds no embeddings"),
        (kept(prompts=text), "for 0 prompts"),
        (kept(prompts=np.frombuffer(rb'["\ud800", "a"]', np.uint8)), "holds no embeddings"),
        (kept(mask=np.ones(2, bool)), r"a mask of \(2,\) for 2 prompts"),
        (kept(tokens=np.zeros((2, 128, 32), np.float32)), r"takes \(prompts, length, 64\)"),
    ]
    out = tmp_path / "out"
    for arguments, message in cases:
        begin = ["--checkpoint", str(made.checkpoint), "--size", "96x64", "--out", str(out)]
        assert call(sample, *begin, *arguments) == 2, arguments
        *_, error = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
        assert re.search(f"^ *(error|python.*: error): .*{message}", error), (arguments, error)
        assert not out.exists(), arguments
