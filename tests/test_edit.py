"""Editing from the command line against diffusers' own pipelines."""

import copy
import functools
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import (
    BatchFeature,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorPil,
)

from tests import qwen_folder
from tests.models.qwen_image import test_transformer as parity
from tests.test_text_to_image import assert_same_tensors, noise_of, pixels
from tests.test_verbs import call
from twinflow_jax import checkpoints, convert, encode, models, sample
from twinflow_jax import config as configs
from twinflow_jax.checkpoints import exporting, imported, importing
from twinflow_jax.drawing import denoising, text
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.adapters import is_adapter
from twinflow_jax.models.qwen_image import edit, tiny

SMALLER = 64  # times: than the published pipelines' pictures
KINDS = {  # name: class, settings of the transformer, files of its pictures
    "edit": (QwenImageEditPipeline, {}, ["wide.png"]),
    "2509": (QwenImageEditPlusPipeline, {}, ["wide.png", "turned.jpg"]),
    "2511": (QwenImageEditPlusPipeline, {"zero_cond_t": True}, ["clear.png", "wide.png"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Pictures, and the pipelines of KINDS."""
    folder, rng = tmp_path_factory.mktemp("edit"), np.random.default_rng(0)
    noise = lambda h, w, c: rng.integers(0, 255, (h, w, c), np.uint8).repeat(9, 0).repeat(9, 1)
    Image.fromarray(noise(10, 20, 3)).save(folder / "wide.png")
    Image.fromarray(noise(15, 12, 4)).save(folder / "clear.png")
    turned = Image.fromarray(noise(13, 16, 3))
    turned.getexif()[274] = 6  # a quarter turn
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    return folder


@functools.cache
def written(folder: pathlib.Path, name: str):
    """A small pipeline of diffusers', in folder/name, and its import in folder/name_imported."""
    kind, changes, _ = KINDS[name]
    base = qwen_folder.write(folder / "base") if not (folder / "base").exists() else None
    base = base or qwen_folder.build(tokenizer_folder=str(folder / "base/tokenizer_source"))
    tiny.save_edit_tokenizer(folder / "tokenizer")
    tokenizer = Qwen2TokenizerFast.from_pretrained(folder / "tokenizer")
    number = lambda token: tokenizer.convert_tokens_to_ids(token)
    text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={key: value for key, value in tiny.SEEING_ENCODER.items() if key in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "vocab_size",
        )} | {"rope_theta": 1e6, "rope_scaling": tiny.SEEING_ENCODER["rope_scaling"]},
        vision_config=tiny.SEEING_ENCODER["vision_config"],
        image_token_id=number("<|image_pad|>"), video_token_id=699,
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    ))
    looks = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056)
    transformer = type(base.transformer).from_config(base.transformer.config, **changes)
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**qwen_folder.SCHEDULER), vae=base.vae,
        text_encoder=qwen_folder.randomise(text, 2), tokenizer=tokenizer, processor=None,
        transformer=qwen_folder.randomise(transformer, 3),
    )
    pipeline.save_pretrained(folder / name)
    looks.save_pretrained(folder / name / "processor")
    pipeline.processor = functools.partial(processed, looks, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    forward = pipeline.text_encoder.forward

    def told(input_ids, **others):  # which diffusers leaves out, and transformers 5 needs
        kinds = (input_ids == number("<|image_pad|>")).int()
        return forward(input_ids=input_ids, mm_token_type_ids=kinds, **others)

    pipeline.text_encoder.forward = told
    importing.import_folder(str(folder / name), str(folder / f"{name}_imported"), progress=False)
    return pipeline


def processed(looks, tokenizer, text, images, **_):
    """transformers' Qwen2VLProcessor, which takes torchvision: one text, its pictures."""
    seen = looks(images, return_tensors="pt")
    counts, [prompt] = iter(seen["image_grid_thw"].prod(1) // 4), text
    token = "<|image_pad|>"
    first, *others = prompt.split(token)
    prompt = first + "".join(token * next(counts) + other for other in others)
    return BatchFeature(tokenizer([prompt], return_tensors="pt") | seen)


@pytest.fixture
def small(monkeypatch):
    """Both sides take pictures for SMALLER times smaller."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        theirs = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda a, r, f=theirs: f(a / SMALLER, r)
        )
    ours = edit.size_of_area
    monkeypatch.setattr(edit, "size_of_area", lambda area, size: ours(area // SMALLER, size))


@pytest.mark.parametrize("name", [
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("edit", "2509")), "2511",
])
def test_base_sampling_is_the_published_pipeline(name, folder, small, tmp_path, monkeypatch):
    """Latents within 1e-4 of them, pictures within a level, and in the size of the source."""
    denoise, latents = denoising.denoise, []
    kept = lambda *given: (latents.append(part) or part for part in denoise(*given))
    monkeypatch.setattr(denoising, "denoise", kept)
    pipeline, (_, _, files) = written(folder, name), KINDS[name]
    names = itertools.chain(*(("--image", str(folder / file)) for file in files))
    given = ["--checkpoint", str(folder / f"{name}_imported"), *names, "--prompt", "make it night"]
    base = ["--base", "--steps", "2", "--guidance", "4"]
    assert call(sample, "--out", str(tmp_path / "a"), "--model-size", *given, *base) == 0
    [file] = (tmp_path / "a").iterdir()
    ours = np.asarray(Image.open(file), int)

    pictures = [edit.upright(Image.open(folder / one)) for one in files]
    size = ours.shape[:2]
    theirs = pipeline(
        pictures if len(pictures) > 1 else pictures[0], "make it night", " ", true_cfg_scale=4.0,
        num_inference_steps=2, latents=noise_of(0, size)[0], output_type="pt",
        callback_on_step_end=lambda *step: latents.append(step[-1]["latents"]) or {},
    ).images[0]
    mine, *_, last = latents
    assert np.abs(parity.packed(mine) - last.numpy()).max() <= 1e-4 < np.abs(mine).max()
    assert ours.std() > 20 and np.abs(ours - pixels(2 * theirs - 1)).max() <= 1

    assert call(sample, "--out", str(tmp_path / "b"), *given, "--steps", "1") == 0
    [file] = (tmp_path / "b").iterdir()
    deciding = pictures[0] if name == "edit" else pictures[-1]
    assert Image.open(file).size == deciding.size


def test_adapters_of_a_run_edit_in_diffusers(folder, tmp_path):
    """A pass of Edit-2511 about two pictures, at r = 0, where half_r is the network alone."""
    module = copy.deepcopy(written(folder, "2511").transformer)
    assert module.config.zero_cond_t
    base = folder / "2511_imported"
    run = configs.parse("configs/qwen_edit_lora_tpu.py:tiny", [
        f"pipeline={base}", f"train.init_from={base}", "train.weights=float32",
        "train.ema_decay=0", "model.zero_cond_t=True",
    ])
    rng, model = np.random.default_rng(0), models.build(run.model, adapter=run.adapter)
    adapters = {
        path: rng.standard_normal(leaf.shape).astype(np.float32) * leaf.shape[-2] ** -0.5
        for path, leaf in names.flatten(model.abstract_params()).items() if is_adapter(path)
    }
    with checkpoints.claim(tmp_path / "run", run):
        saver = checkpoints.Saver(tmp_path / "run", keep=1)
        saver.save(7, {"params": names.unflatten(adapters)})
        saver.wait()
        saver.close()
    given = str(tmp_path / "run"), str(tmp_path / "out"), "--format", "diffusers"
    assert call(convert, "adapter", "export", *given) == 0

    x_t, _, _, cond = parity.inputs(run.model, ((4, 6), (6, 8)))
    t, r = np.array([0.83, 0.37], np.float32), np.zeros(2, np.float32)
    _, model, params, _ = checkpoints.load_weights(tmp_path / "run")
    ours = parity.packed(jax.jit(model.apply)(params, x_t, t, r, cond))
    about = jax.tree.map(torch.from_numpy, (x_t, t, r, cond))
    pipeline = QwenImageEditPlusPipeline(*[None] * 5, transformer=module)
    with torch.no_grad():
        before = parity.theirs(module, *about).numpy()
        pipeline.load_lora_weights(tmp_path / "out")
        theirs = parity.theirs(pipeline.transformer, *about).numpy()
    assert np.abs(ours - theirs).max() <= 2e-5 * max(1.0, np.abs(theirs).max())
    assert np.linalg.norm(theirs - before) > 0.1 * np.linalg.norm(before)


def test_an_export_is_what_was_imported(folder, tmp_path):
    written(folder, "2511")
    before, after = folder / "2511", tmp_path / "out"
    kept = imported.open_imported(folder / "2511_imported")
    exporting.export_folder(kept, after, progress=False)
    assert_same_tensors(before, after, ("transformer", "text_encoder", "vae"))
    for file in ("transformer/config.json", "processor/preprocessor_config.json"):
        theirs, ours = (json.loads((one / file).read_text()) for one in (before, after))
        assert ours == theirs, file
    assert kept.config("transformer").zero_cond_t
    module = type(written(folder, "2511").transformer).from_pretrained(after / "transformer")
    assert module.config.zero_cond_t


def test_pictures_are_turned_and_laid_on_white(folder):
    turned = edit.upright(Image.open(folder / "turned.jpg"))
    assert turned.mode == "RGB"
    stored = np.asarray(Image.open(folder / "turned.jpg"))
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))  # its tag is 6: a quarter clockwise
    clear = Image.open(folder / "clear.png")
    seen = np.asarray(edit.upright(clear), float)
    rgba = np.asarray(clear, float)
    share = rgba[..., 3:] / 255
    np.testing.assert_allclose(seen, rgba[..., :3] * share + 255 * (1 - share), atol=1)
    for value, kind in ((90, np.uint8), (90 * 256 + 7, np.uint16)):  # 16 bits a pixel are no white
        grey = Image.fromarray(np.full((30, 40), value, kind))
        assert np.asarray(edit.upright(grey)).tolist() == np.full((30, 40, 3), 90).tolist()
    with pytest.raises(UserError, match="its pixels are numbers without a known range"):
        edit.upright(Image.fromarray(np.zeros((30, 40), np.float32)))


@pytest.mark.parametrize("area, size, made", [  # of the published pipelines
    (1024**2, (640, 480), (1184, 896)), (1024**2, (500, 300), (1312, 800)),
    (1024**2, (768, 512), (1248, 832)), (1024**2, (1664, 928), (1376, 768)),
    (1024**2, (1080, 1920), (768, 1376)), (1024**2, (512, 512), (1024, 1024)),
    (384**2, (640, 480), (448, 320)), (384**2, (512, 512), (384, 384)),
])
def test_sizes_are_the_pipelines(area, size, made):
    assert edit.size_of_area(area, size) == made
    theirs = pipeline_qwenimage_edit_plus.calculate_dimensions(area, size[0] / size[1])
    assert tuple(theirs[:2]) == made


@pytest.mark.parametrize("size", [
    (350, 350), (406, 406), (448, 320), (1184, 896), (28, 28), (57, 29), (300, 1000), (33, 700),
    (384, 384), (1024, 1024), (29, 1500), (641, 479),
])
def test_what_is_looked_at_is_what_the_processor_makes(size):
    picture = Image.fromarray(
        np.random.default_rng(size[0]).integers(0, 255, (*size[::-1], 3), np.uint8)
    )
    least, most = 3136, 200_000
    theirs = Qwen2VLImageProcessorPil(min_pixels=least, max_pixels=most)(picture)
    ours = edit.pixels(edit.looked_at(picture, edit.vision.Config(), least, most))
    assert [1, ours.shape[0] // 14, ours.shape[1] // 14] == theirs["image_grid_thw"][0].tolist()
    height, width, _ = ours.shape
    rows = ours.reshape(height // 28, 2, 14, width // 28, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    rows = rows[:, :, :, :, :, None].repeat(2, axis=5).reshape(-1, 1176)
    np.testing.assert_allclose(rows, theirs["pixel_values"], atol=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from twinflow_jax.checkpoints.random import write_random

    return write_random("qwen_image_edit_plus", tmp_path_factory.mktemp("random") / "c", 0).folder


def test_what_is_no_edit_is_refused(checkpoint, tmp_path, capsys):
    """Pictures with captions, and a folder of this family imported as one that draws from text."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (300, 300)).save(tmp_path / "photos/a.png")
    (tmp_path / "photos/a.txt").write_text("a photo")
    given = str(tmp_path / "photos"), str(tmp_path / "o"), "--pipeline", str(checkpoint)
    assert call(encode, *given, "--size", "64") == 2
    assert "photos holds no edits: give a folder with target/" in capsys.readouterr().err
    folder = tmp_path / "published"
    exporting.export_folder(imported.open_imported(checkpoint), folder, progress=False)
    index = {"_class_name": "QwenImageEditPlusPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    says = "is of a QwenImageEditPlusPipeline: import it with --family qwen_image_edit_plus"
    into = str(tmp_path / "c")
    with pytest.raises(UserError, match=says):
        importing.import_folder(str(folder), into, family="qwen_image")
    (folder / "model_index.json").unlink()  # what it looks at pictures with still says it
    says = "network that looks at pictures: import it with --family qwen_image_edit or qwen_image_e"
    with pytest.raises(UserError, match=says):
        importing.import_folder(str(folder), into, family="qwen_image")
    with pytest.raises(UserError, match="say which with --family NAME"):
        importing.import_folder(str(folder), into)
    assert not (tmp_path / "c").exists()


def test_a_file_of_edits(folder, small, checkpoint, tmp_path):
    """Of several shapes, its pictures beside it: each is drawn as alone and in its own size; the
    same command again draws nothing."""
    asked = [(["wide.png"], "make it night"), (["wide.png", "clear.png"], "put both together"),
             (["wide.png"], "draw it in red")]
    lines = [json.dumps({"images": sources, "prompt": prompt}) for sources, prompt in asked]
    (folder / "edits.jsonl").write_text("\n".join(lines))
    given = ["--checkpoint", str(checkpoint), "--steps", "1", "--out"]

    def whole():
        edits = "--edits", str(folder / "edits.jsonl")
        assert call(sample, *given, str(tmp_path / "whole"), *edits) == 0
        files = sorted((tmp_path / "whole").iterdir())
        return {file: file.stat().st_mtime_ns for file in files}

    made = whole()
    assert [file.name[:4] for file in made] == ["0000", "0001", "0002"] and whole() == made
    for number, (file, (sources, prompt)) in enumerate(zip(made, asked, strict=True)):
        out = tmp_path / str(number)
        about = itertools.chain(*(("--image", str(folder / source)) for source in sources))
        assert call(sample, *given, str(out), *about, "--prompt", prompt) == 0
        [alone] = map(Image.open, out.iterdir())
        assert alone.size == Image.open(folder / sources[-1]).size
        ours, theirs = (np.asarray(one, int) for one in (Image.open(file), alone))
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("arguments, says", [
    (["--prompt", "x"], "this network edits pictures: give --image and --prompt, or --edits"),
    (["--image", "wide.png"], "give --image and --prompt, or --edits"),
    (["--image", "none.png", "--prompt", "x"], "none.png cannot be read as a picture (No such"),
    (["--image", "text.png", "--prompt", "x"], "text.png cannot be read as a picture (it is n"),
    (["--image", "dot.png", "--prompt", "x"], "dot.png: a picture of 10x10 pixels: sides are"),
    (["--image", "long.png", "--prompt", "x"], "20000x30 pixels: sides are from 28 to 16,384"),
    (["--image", "wide.png"] * 4 + ["--prompt", "x"], "is about 4 pictures: this network takes 1"),
    (["--image", "wide.png", "--prompt", " "], "prompt 1 of 1 is empty: write what to do with the"),
    (["--image", "wide.png", "--prompt", "a b " * 900], "they may make"),
    (["--edits", "none.jsonl"], "none.jsonl cannot be read"),
    (["--image", "wide.png", "--prompt", "x", "--sheet"], "--sheet: edits have sizes"),
    (["--image", "wide.png", "--prompt", "x", "--classes", "1"], "--classes cannot be used"),
])
def test_requests_that_are_refused(arguments, says, folder, checkpoint, tmp_path, capsys):
    Image.new("RGB", (10, 10)).save(folder / "dot.png")
    Image.new("L", (20_000, 30)).save(folder / "long.png")
    (folder / "text.png").write_text("no picture")
    here = [str(folder / a) if a.endswith((".png", ".jsonl")) else a for a in arguments]
    assert call(sample, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "o"), *here) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error and error.startswith("error: ")
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize("line, says", [
    ("oops", 'write {"images":'),
    ('["wide.png"]', 'write {"images":'),
    ({"prompt": "x"}, 'write {"images":'),
    ({"images": [], "prompt": "x"}, "'x' is about 0 pictures: this network takes 1"),
    ({"images": ["wide.png"] * 4, "prompt": "x"}, "'x' is about 4 pictures: this network takes 1"),
    ({"images": ["../wide.png"], "prompt": "x"}, "'../wide.png' is no file in the folder of"),
    ({"images": [7], "prompt": "x"}, "7 is no file in the folder of"),
    ({"images": ["none.png"], "prompt": "x"}, "none.png cannot be read as a picture (No such"),
    ({"images": ["wide.png"], "prompt": " "}, "is empty: write what to do with the picture"),
    ({"images": ["wide.png"], "prompt": "a b " * 900}, "they may make"),
])
def test_a_line_that_is_refused_is_named_before_any_work(
    line, says, folder, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(text, "encoder", None)
    good = json.dumps({"images": ["wide.png"], "prompt": "x"})
    bad = line if isinstance(line, str) else json.dumps(line)
    (folder / "bad.jsonl").write_text(f"{good}\n\n{bad}\n")
    given = "--checkpoint", str(checkpoint), "--out", str(tmp_path / "o")
    assert call(sample, *given, "--edits", str(folder / "bad.jsonl")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: --edits {folder / 'bad.jsonl'}, line 3: ") and says in error
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())
