"""Published folders, written by diffusers, through tools/convert.py and back."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import types
import weakref

import huggingface_hub
import ml_collections
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from etils import epath

from tests import qwen_folder
from tests.test_verbs import call
from twinflow_jax import checkpoints, files
from twinflow_jax.checkpoints import (
    exporting,
    imported,
    importing,
    published,
    store,
    tensors,
)
from twinflow_jax.errors import UserError
from twinflow_jax.models import names

CONVERT = pathlib.Path(__file__).parents[2] / "tools" / "convert.py"
NETWORKS = ("transformer", "vae", "text_encoder")
SEED = int(np.random.default_rng().integers(1 << 30))
verb = types.SimpleNamespace(main=runpy.run_path(str(CONVERT))["main"])


def convert(*arguments) -> int:
    return call(verb, *map(str, arguments))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline's folder, float32, one file for each network."""
    folder = tmp_path_factory.mktemp(f"seed_{SEED}")
    print(f"seed {SEED}")
    qwen_folder.write(folder, seed=SEED)
    return folder / "pipeline"


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    """Its import."""
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    importing.import_folder(str(base), str(folder), progress=False)
    return folder


@pytest.fixture
def source(base, tmp_path):
    """A copy of it, to be changed."""
    return pathlib.Path(shutil.copytree(base, tmp_path / "source"))


def weight_file(folder: pathlib.Path) -> pathlib.Path:
    return next(folder.glob("*.safetensors"))


def read(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    """A network's tensors, by the library."""
    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in safetensors.torch.load_file(file).items()
    }


def edit(folder: pathlib.Path, change) -> None:
    """Writes a network's only file anew with `change(tensors)`."""
    changed = {key: tensor.contiguous() for key, tensor in change(read(folder)).items()}
    safetensors.torch.save_file(changed, weight_file(folder))


def configure(folder: pathlib.Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys(), f"seed {SEED}"
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype, key
        assert ours[key].shape == theirs[key].shape, key
        assert bits(ours[key]) == bits(theirs[key]), f"{key}, seed {SEED}"


# Variants of a published folder: each changes `source` and returns the published tensors by
# network, as export should give them back.


def to_bfloat16(source):
    for name in NETWORKS:
        edit(source / name, lambda all: {k: v.bfloat16() for k, v in all.items()})
    return {name: read(source / name) for name in NETWORKS}


def as_it_is(source):
    return {name: read(source / name) for name in NETWORKS}


def sharded(source):
    """As large models are: several files and an index; beside it a variant's files.

    Some repositories have a config.json that says nothing at the top, for the hub's counting.
    """
    (source / "config.json").write_text("{}")
    wanted = to_bfloat16(source)
    pipeline = QwenImagePipeline.from_pretrained(source).to(torch.bfloat16)
    for name in ("transformer", "text_encoder"):
        plain = weight_file(source / name)
        stem = plain.name.removesuffix(".safetensors")
        plain.rename(source / name / f"{stem}.fp16.safetensors")
        (source / name / f"{stem}.safetensors.index.fp16.json").write_text("{}")
        getattr(pipeline, name).save_pretrained(source / name, max_shard_size="100KB")
        assert len(list(source.glob(f"{name}/{stem}-*.safetensors"))) > 3
    return wanted


def twinflow(source):
    """A trainer's wrapper, with its prefixes, and the second embedder; newer names of text keys."""
    wanted = as_it_is(source)
    for key, tensor in list(wanted["transformer"].items()):
        if key.startswith("time_text_embed."):
            second = key.replace("time_text_embed.", "time_text_embed_2.")
            wanted["transformer"][second] = tensor + 1
    prefix = {0: "", 1: "module.", 2: "base_model.model.transformer.", 3: "module.transformer."}
    edit(source / "transformer", lambda _: {
        prefix[i % 4] + key: tensor for i, (key, tensor) in enumerate(wanted["transformer"].items())
    })
    wrapper = "QwenImageTransformer2DModelWrapper"
    configure(source / "transformer", _class_name=wrapper)
    file = source / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformer": ["own", wrapper]}))
    edit(source / "text_encoder", lambda all: {
        re.sub("^model.", "model.language_model.", re.sub("^visual.", "model.visual.", key)): value
        for key, value in all.items()
    })
    return wanted


def mixed(source):
    """Layers of several dtypes in one stack; NaN, infinity and -0 among the values."""
    key = "transformer_blocks.0.attn.to_q.weight"
    odd = torch.tensor([float("nan"), float("-inf"), -0.0])

    def change(all):
        all = {k: v.bfloat16() for k, v in all.items()} | {key: all[key]}
        all[key][0, :3] = odd
        all["img_in.weight"][0, :3] = odd.bfloat16()
        return all

    edit(source / "transformer", change)
    return as_it_is(source)


@pytest.mark.parametrize(
    ("variant", "options", "stored"),
    [
        (as_it_is, [], "float32"), (sharded, ["--shards", "2"], "bfloat16"),
        (twinflow, [], "float32"), (mixed, [], "bfloat16"),
        (to_bfloat16, ["--dtype", "float32"], "float32"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_there_and_back(variant, options, stored, source, tmp_path, capsys):
    index = json.loads((source / "model_index.json").read_text())
    wanted = variant(source)
    source = source.rename(tmp_path / "no url%20 #é?")
    target, back = tmp_path / "checkpoint %", tmp_path / "back"
    assert convert("import", source, target, *options) == 0
    added = 0 if variant is twinflow else 4
    assert ("4 tensors added" in capsys.readouterr().out) == bool(added)
    arrays = imported.open_imported(target).arrays("transformer")
    assert arrays["image_in/kernel"].dtype.name == stored
    first, second = (
        arrays[f"{name}/out/bias"].read().result()
        for name in ("time_embedder", "second_time_embedder")
    )
    np.testing.assert_array_equal(second, first if added else first + 1)

    assert convert("verify", source, target) == 0
    counted = "equal after conversion" if "--dtype" in options else "tensors identical"
    lines = [line for line in capsys.readouterr().out.splitlines() if counted in line]
    assert len(lines) == 3 and all(line.endswith(" 0 not") for line in lines)

    assert convert("export", target, back) == 0
    for name in NETWORKS:
        assert_same(read(back / name), wanted[name])
        config = json.loads((back / name / "config.json").read_text())
        theirs = json.loads((source / name / "config.json").read_text())
        if "_class_name" in theirs:
            theirs["_class_name"] = theirs["_class_name"].removesuffix("Wrapper")
        assert config == theirs
    for kept in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        assert (back / kept).read_bytes() == (source / kept).read_bytes()
    assert json.loads((back / "model_index.json").read_text()) == index
    assert ("E1(t)" in (back / "README.md").read_text()) == (not added)
    assert convert("verify", back, target) == 0


def test_export_is_the_file_that_the_library_wrote(base, checkpoint, tmp_path):
    assert convert("export", checkpoint, tmp_path / "back") == 0
    for name in NETWORKS:
        file = weight_file(base / name)
        assert (tmp_path / "back" / name / file.name).read_bytes() == file.read_bytes()


def test_narrowed_and_widened(source, tmp_path, capsys):
    """--dtype bfloat16 of a float32 folder; then the transformer's export in float32."""
    theirs = as_it_is(source)
    assert convert("import", source, tmp_path / "ours", "--dtype", "bfloat16") == 0
    assert convert("verify", source, tmp_path / "ours") == 0
    assert "0 tensors identical, 77 equal after conversion, 0 not" in capsys.readouterr().out
    assert convert("export", tmp_path / "ours", tmp_path / "back", "--dtype", "float32") == 0
    rounded = {key: tensor.bfloat16() for key, tensor in theirs["transformer"].items()}
    assert_same(
        read(tmp_path / "back" / "transformer"), {k: v.float() for k, v in rounded.items()}
    )
    carried = read(tmp_path / "back" / "vae")["encoder.down_blocks.5.time_conv.weight"]
    assert carried.dtype == torch.float32  # nothing computes with it
    assert read(tmp_path / "back" / "vae")["encoder.conv_in.weight"].dtype == torch.bfloat16


def test_one_network_alone(base, tmp_path):
    for name in NETWORKS:
        ours, back = tmp_path / f"ours_{name}", tmp_path / f"back_{name}"
        assert convert("import", base / name, ours) == 0
        assert imported.open_imported(ours).parts == (name,)
        assert convert("verify", base, ours) == 0
        assert convert("export", ours, back) == 0
        assert {f.name for f in back.iterdir()} >= {"config.json", "README.md"}
        assert_same(read(back), read(base / name))
    QwenImageTransformer2DModel.from_pretrained(tmp_path / "back_transformer")


def test_large_arrays_are_written_in_parts(base, tmp_path, monkeypatch):
    """Layer by layer, and by rows where there are no layers; a few tensors in memory at a time."""
    monkeypatch.setattr(importing, "FILE", 5000)
    live, most = weakref.WeakSet(), 0
    original = tensors.Tensor.read

    class Counted(np.ndarray):
        __hash__ = object.__hash__

    def counted_read(self):
        nonlocal most
        array = original(self).view(Counted)
        live.add(array)
        most = max(most, sum(a.nbytes for a in live))
        return array

    monkeypatch.setattr(tensors.Tensor, "read", counted_read)
    assert convert("import", base, tmp_path / "ours", "--shards", "4") == 0
    monkeypatch.undo()
    parts = published.open_folder(str(base)).parts.values()
    assert most <= 3 * max(t.nbytes for part in parts for t in part.tensors.values())

    checkpoint = imported.open_imported(tmp_path / "ours")
    layout = lambda array: tuple(
        chunk.shape for chunk in (array.chunk_layout.write_chunk, array.chunk_layout.read_chunk)
    )
    layers, rows = (
        checkpoint.arrays(name)[path]
        for name, path in (("transformer", "layers/image/query/kernel"),
                           ("text_encoder", "embedding"))
    )
    assert layout(layers) == ((1, 64, 64), (1, 16, 64))
    assert layout(rows)[0] == (19, 64) and rows.shape == (400, 64)  # the last of them is cut
    assert convert("verify", base, tmp_path / "ours") == 0


def test_hub_id_in_the_local_cache(base, tmp_path, monkeypatch, capsys):
    """As the hub keeps it: snapshots of links to blobs. The pipeline may be in a folder of it."""
    repository = tmp_path / "hub" / "models--Somebody--Some-Model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for number, file in enumerate(f for f in base.rglob("*") if f.is_file()):
        blob = shutil.copy(file, repository / "blobs" / f"{number:040x}")
        for inner in (".", "v1/pipeline"):
            link = repository / "snapshots" / commit / inner / file.relative_to(base)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for source in ("Somebody/Some-Model", "Somebody/Some-Model/v1/pipeline"):
        ours = tmp_path / source.replace("/", "_")
        assert convert("import", source, ours) == 0
        assert convert("verify", base, ours) == 0
        assert imported.open_imported(ours).record["source"] == source
    for source, message in (
        ("Somebody/Other", "neither a folder nor in the local hub cache"),
        ("Somebody/Some-Model/v2", "no folder v2"), ("a/b c", "no folder a/b c"),
    ):
        assert convert("import", source, tmp_path / "new") == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """A run's folder with trained weights: its arrays by path, the checkpoint's plus 1."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = ml_collections.ConfigDict(
        {
            "model": {"name": "qwen_image"}, "pipeline": str(checkpoint),
            "train": {"ema_decay": 0.9, "keep": 1},
        }
    )
    arrays = imported.open_imported(checkpoint).arrays("transformer")
    values = {path: array.read().result() + 1 for path, array in arrays.items()}
    average = {path: array * 2 for path, array in values.items()}
    checkpoints.claim(workdir, config)
    saver = checkpoints.Saver(workdir, keep=1)
    saver.save(7, {"params": names.unflatten(values), "average": names.unflatten(average)})
    saver.wait()
    saver.close()
    return workdir


def test_export_of_a_run(base, run, checkpoint, tmp_path):
    """Its transformer, with the second embedder, in a folder that diffusers loads."""
    assert convert("export", run, tmp_path / "raw", "--raw") == 0
    for name in ("vae", "text_encoder"):
        assert_same(read(tmp_path / "raw" / name), read(base / name))
    theirs = read(base / "transformer")
    ours = read(tmp_path / "raw" / "transformer")
    extra = {f"time_text_embed_2.timestep_embedder.linear_{i}.{kind}"
             for i in (1, 2) for kind in ("weight", "bias")}
    assert ours.keys() - theirs.keys() == extra
    assert_same({k: ours[k] for k in theirs}, {k: v + 1 for k, v in theirs.items()})
    assert "7 steps (raw weights)" in (tmp_path / "raw" / "README.md").read_text()
    assert "E1(t)" in (tmp_path / "raw" / "README.md").read_text()
    assert convert("verify", tmp_path / "raw", run, "--raw") == 0

    assert convert("export", run, tmp_path / "average", "--dtype", "bfloat16") == 0
    average = {k: ((v + 1) * 2).bfloat16() for k, v in theirs.items()}
    ours = read(tmp_path / "average" / "transformer")
    assert_same({k: ours[k] for k in theirs}, average)

    pipeline = QwenImagePipeline.from_pretrained(tmp_path / "average")
    assert_same(dict(pipeline.transformer.state_dict()), {k: v.float() for k, v in average.items()})
    assert_same(dict(pipeline.vae.state_dict()), read(base / "vae"))
    # and what was exported is imported again, its own second embedder included
    assert convert("import", tmp_path / "raw", tmp_path / "again") == 0
    assert convert("verify", tmp_path / "raw", tmp_path / "again") == 0


def test_verify_names_what_differs(source, checkpoint, run, capsys):
    changed = "transformer_blocks.1.attn.to_q.weight"

    def change(all):
        all[changed][3, 5] += 0.25
        all["norm_out.linear.bias"][0] = 0.0
        return all

    edit(source / "transformer", change)
    assert convert("verify", source, checkpoint) == 1
    out = capsys.readouterr().out
    assert "transformer: 75 tensors identical, 2 not" in out and "vae: 146 tensors" in out
    assert re.search(rf"{re.escape(changed)}: differs by up to 0\.25", out)
    assert convert("verify", source, run) == 1
    out = capsys.readouterr().out
    assert "transformer: 0 tensors identical, 81 not" in out
    assert "only in the checkpoint: time_text_embed_2." in out


def test_verify_tells_zeros_of_two_signs_apart(source, tmp_path, capsys):
    def fill(value):
        key = "norm_out.linear.bias"
        edit(source / "transformer", lambda all: all | {key: torch.full_like(all[key], value)})

    fill(0.0)
    assert convert("import", source / "transformer", tmp_path / "ours") == 0
    fill(-0.0)
    assert convert("verify", source / "transformer", tmp_path / "ours") == 1
    assert "norm_out.linear.bias: differs by up to 0" in capsys.readouterr().out


# Bad folders: each changes `source` and returns what the message must say.


def no_shard(source):
    sharded(source)
    file = next(source.glob("transformer/*-00002-of-*"))
    file.unlink()
    return [f"{file.name} is missing"]


def truncated(source):
    file = weight_file(source / "vae")
    file.write_bytes(file.read_bytes()[:-1])
    return ["vae: .*is truncated"]


def corrupted(source):
    file = weight_file(source / "text_encoder")
    file.write_bytes(b"x" + file.read_bytes()[1:])
    return ["text_encoder: .*no safetensors file|text_encoder: .*corrupt header"]


def index_outside(source):
    sharded(source)
    file = source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, second = list(index["weight_map"])[:2]
    shutil.copy(source / "vae" / "diffusion_pytorch_model.safetensors", source / "x.safetensors")
    index["weight_map"] |= {first: "../x.safetensors", second: str(source / "x.safetensors")}
    file.write_text(json.dumps(index))
    return ["points to '../x.safetensors'", "points to '/.*x.safetensors', no file of this"]


def index_wrong(source):
    sharded(source)
    file = source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(file.read_text())["weight_map"]
    key, other = next(iter(index)), sorted(set(index.values()))[-1]
    assert index[key] != other
    file.write_text(json.dumps({"weight_map": index | {key: other, "more": other}}))
    return [
        f"not in {other}, where the index puts it: {key}", "where the index puts it: more",
        f"in .*, where the index does not put it: {key}",
    ]


def index_no_object(source):
    (source / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    weight_file(source / "vae").rename(source / "vae" / "diffusion-1-of-1.safetensors")
    return ["vae: diffusion_pytorch_model.safetensors.index.json is no JSON object"]


def no_index(source):
    file = weight_file(source / "vae")
    shutil.copy(file, file.with_name("diffusion-1-of-2.safetensors"))
    file.rename(file.with_name("diffusion-2-of-2.safetensors"))
    return ["vae: .*leave one, or the index"]


def no_tensors(source):
    safetensors.torch.save_file({}, weight_file(source / "vae"))
    return ["vae: .*holds no tensors"]


def wrong_shape(source):
    configure(source / "transformer", joint_attention_dim=32)
    return [r"shape \[64, 64\] where config.json asks for \[64, 32\]: txt_in.weight"]


def wrong_keys(source):
    def change(all):
        all["transformer_blocks.2.more"] = torch.ones(1)
        all["module.proj_out.bias"] = all["proj_out.bias"].clone()
        for layer in (0, 1):
            del all[f"transformer_blocks.{layer}.attn.norm_q.weight"]
        return all

    edit(source / "transformer", change)
    return [
        "transformer: unexpected: transformer_blocks.2.more", "a second tensor for proj_out.bias",
        r"missing: transformer_blocks.0.attn.norm_q.weight and 1 more like transformer_blocks.\*",
    ]


def integers(source):
    edit(source / "vae", lambda all: all | {"encoder.conv_in.bias": torch.ones(8).int()})
    return ["vae: int32 where weights are float32, float16, bfloat16: encoder.conv_in.bias"]


def half_an_embedder(source):
    key = "time_text_embed_2.timestep_embedder.linear_1.bias"
    edit(source / "transformer", lambda all: all | {key: torch.ones(64)})
    return [f"missing: {key.replace('1.bias', '2.weight')}", f"missing: {key[:-4]}weight"]


def other_class(source):
    configure(source / "transformer", _class_name="SD3Transformer2DModel")
    return ["_class_name is SD3Transformer2DModel"]


def other_meaning(source):
    configure(source / "transformer", guidance_embeds=True)
    configure(source / "vae", attn_scales=[1.0])
    configure(source / "text_encoder", architectures=["Qwen2ForCausalLM"])
    return ["transformer: .*guidance_embeds", "vae: .*attn_scales", "text_encoder: .*architectures"]


def no_values(source):
    configure(source / "vae", base_dim="eight")
    return ["vae: config.json holds values that make no network"]


def no_json(source):
    (source / "transformer" / "config.json").write_text("{'a': 1}")
    (source / "vae" / "config.json").unlink()
    (source / "model_index.json").write_text("[]")
    return [
        "model_index.json is no JSON object", "transformer: config.json cannot be read as JSON",
        "vae: no config.json",
    ]


def pickled(source):
    weight_file(source / "vae").rename(source / "vae" / "diffusion_pytorch_model.bin")
    weight_file(source / "transformer").rename(source / "transformer" / "model.pth")
    return [
        "vae: diffusion_pytorch_model.bin is a pickle, which can run code", "model.pth is a pickle"
    ]


def no_tokenizer(source):
    (source / "tokenizer" / "tokenizer.json").unlink()
    return ["tokenizer: holds none of tokenizer.json"]


def no_folder(source):
    shutil.rmtree(source / "vae")
    return ["vae: no such folder"]


def no_pipeline(source):
    for name in NETWORKS:
        shutil.rmtree(source / name)
    return ["is no pipeline folder"]


def unfinished(source):
    (source / files.UNFINISHED).write_text("")
    return ["was not written to its end"]


def everything(source):
    """Problems of each part, and two of one part, in one message."""
    changes = (no_tokenizer, truncated, no_values, wrong_keys, corrupted)
    return [message for change in changes for message in change(source)]


@pytest.mark.parametrize(
    "change",
    [
        no_shard, truncated, corrupted, index_outside, index_wrong, index_no_object, no_index,
        no_tensors, wrong_shape, wrong_keys, integers, half_an_embedder, other_class,
        other_meaning, no_values, no_json, pickled, no_tokenizer, no_folder, no_pipeline,
        unfinished, everything,
    ],
)
def test_bad_folders(change, source, tmp_path, capsys):
    wanted = change(source)
    assert convert("import", source, tmp_path / "target") == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "error: " in message
    for pattern in wanted:
        assert re.search(pattern, message), (pattern, message)
    assert not (tmp_path / "target").exists()


def test_a_missing_shard_is_one_line(source, tmp_path, capsys):
    """And not one for each tensor in it; what lacks elsewhere is named all the same."""
    no_shard(source)
    index = source / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    place = json.loads(index.read_text())["weight_map"]
    file = next(f for f in source.glob("transformer/*-0000*.safetensors"))
    key = next(key for key, name in place.items() if name == file.name)
    del place[key]
    index.write_text(json.dumps({"weight_map": place}))
    edited = {k: v for k, v in safetensors.torch.load_file(file).items() if k != key}
    safetensors.torch.save_file(edited, file)
    capsys.readouterr()
    assert convert("import", source, tmp_path / "target") == 2
    lines = capsys.readouterr().err.splitlines()[1:]
    assert len(lines) == 2 and "is missing, one of" in lines[0] and f"missing: {key}" in lines[1]


def test_files_that_are_not_kept(source, tmp_path):
    (source / "transformer" / "model.py").write_text("raise SystemExit(1)")
    (source / "tokenizer" / "code.py").write_text("raise SystemExit(1)")
    (source / "tokenizer" / "old.bin").write_bytes(b"x")
    (source / "tokenizer" / ".hidden").write_bytes(b"x")
    (source / "tokenizer" / "merges.txt").write_text("kept")
    assert convert("import", source, tmp_path / "ours") == 0
    kept = {str(f.relative_to(tmp_path / "ours/files")) for f in tmp_path.glob("ours/files/*/*")}
    assert kept == {
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/merges.txt",
        "scheduler/scheduler_config.json", "text_encoder/generation_config.json",
    }


def test_bad_targets_and_options(base, checkpoint, run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    vae = tmp_path / "vae"
    assert convert("import", base / "vae", vae) == 0
    new = tmp_path / "new"
    cases = [
        (["import", base, tmp_path / "full"], "full is not empty"),
        (["import", base, tmp_path / "file"], "is a file"),
        (["import", base, tmp_path / "file" / "below"], "could not be written"),
        (["export", checkpoint, tmp_path / "full"], "full is not empty"),
        (["import", base, new, "--shards", "0"], "--shards is 0"),
        (["import", base / "vae" / "config.json", new], "is a file"),
        (["export", base, new], "cannot be read as a run's|is no run"),
        (["export", checkpoint, new, "--raw"], "--raw, --at-step and --pipeline are for runs"),
        (["export", vae, new, "--dtype", "float32"], "holds only vae, no transformer"),
        (["export", run, new, "--pipeline", vae], "holds only vae, no transformer"),
        (["verify", base / "transformer", vae], "nothing to compare"),
    ]
    for arguments, message in cases:
        assert convert(*arguments) == 2, arguments
        assert re.search(message, capsys.readouterr().err), (arguments, message)
    assert not new.exists() and (tmp_path / "full" / "file").read_text() == "mine"


def test_a_run_of_another_network_is_not_exported(source, run, tmp_path, capsys):
    def change(all):
        return {k: v for k, v in all.items() if "blocks.1." not in k}

    edit(source / "transformer", change)
    configure(source / "transformer", num_layers=1)
    assert convert("import", source, tmp_path / "other") == 0
    assert convert("export", run, tmp_path / "new", "--pipeline", tmp_path / "other") == 2
    assert "the run's transformer is not that of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


KILLED = """
import os, runpy, signal, sys
from twinflow_jax.checkpoints import store
write, calls = store.write, []
def stop(array, values):
    write(array, values)
    calls.append(1)
    if len(calls) == 40:
        os.kill(os.getpid(), signal.SIGKILL)
store.write = stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_import_never_looks_finished(base, tmp_path, capsys):
    target = tmp_path / "target"
    command = [sys.executable, "-c", KILLED, str(CONVERT), "import", str(base), str(target)]
    killed = subprocess.run(command, capture_output=True, cwd=CONVERT.parents[1])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (target / files.UNFINISHED).exists() and any(target.glob("*/arrays/*/zarr.json"))
    with pytest.raises(UserError, match="not imported to its end"):
        imported.open_imported(target)
    assert convert("export", target, tmp_path / "back") == 2
    assert convert("verify", base, target) == 2
    assert convert("import", base, target) == 0  # in the same place
    assert convert("verify", base, target) == 0


@pytest.mark.parametrize("verb", ["import", "export"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_conversion_leaves_nothing(
    verb, sent, base, checkpoint, tmp_path, monkeypatch, capsys
):
    module, name = {"import": (store, "write"), "export": (exporting, "nbytes")}[verb]
    original, calls = getattr(module, name), []

    def signalled(*arguments):
        calls.append((tmp_path / "target" / files.UNFINISHED).exists())
        if sum(calls) == 2:
            signal.raise_signal(sent)
        return original(*arguments)

    monkeypatch.setattr(module, name, signalled)
    source = base if verb == "import" else checkpoint
    assert convert(verb, source, tmp_path / "target") == 130
    assert sum(calls) == 2 and not (tmp_path / "target").exists()
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("verb", ["import", "export"])
def test_a_full_disk_leaves_nothing(verb, base, checkpoint, tmp_path, capsys):
    """Files over 20 kB cannot be written, which the writers report as they do a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = base if verb == "import" else checkpoint
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert convert(verb, source, tmp_path / "target") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch("error: .*(written|made).*File too large.*", last), last
    assert "tensorstore_spec" not in last and not (tmp_path / "target").exists()


def test_too_little_room_is_said_before(base, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert convert("import", base, tmp_path / "target") == 2
    assert re.search(r"takes 0\.0 GB, and .* has 0\.0 GB free", capsys.readouterr().err)
    assert not (tmp_path / "target").exists()


def test_two_processes_do_not_share_a_target(tmp_path):
    """The one that began last goes on; the other one fails, and leaves its files alone."""
    target = tmp_path / "target"
    first, last = (files.whole_folder(target, 0) for _ in range(2))
    first.__enter__()
    files.write(target / "a", b"first")
    last.__enter__()
    files.write(target / "a", b"last")
    with pytest.raises(UserError, match="written by another process"):
        first.__exit__(None, None, None)
    assert (target / files.UNFINISHED).exists()
    last.__exit__(None, None, None)
    assert [(f.name, f.read_bytes()) for f in target.iterdir()] == [("a", b"last")]


def test_what_is_left_of_an_interrupted_removal_is_still_marked(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    (tmp_path / files.UNFINISHED).write_text("")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.whole_folder(tmp_path, 0).__enter__()
    assert (tmp_path / files.UNFINISHED).exists()


def test_a_lost_or_short_file_of_a_checkpoint_is_no_zeros(base, tmp_path, capsys):
    assert convert("import", base / "vae", tmp_path / "ours") == 0
    chunks = (tmp_path / "ours/vae/arrays/encoder.conv_in.kernel/c").rglob("*")
    [file] = (f for f in chunks if f.is_file())
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(whole[:-1]), file.unlink):
        damage()
        capsys.readouterr()
        assert convert("verify", base, tmp_path / "ours") == 2
        assert re.search("error: an array cannot be read: .*conv_in", capsys.readouterr().err)


def test_what_no_file_holds_is_drawn(base):
    """Rules with random values instead of a copy: the same ones whatever else is imported."""
    part = published.open_folder(str(base)).parts["transformer"]
    rules = tuple(
        dataclasses.replace(rule, copy_of="", normal=0.0 if rule.key.endswith("bias") else 0.5)
        if rule.copy_of else rule
        for rule in part.table.rules
    )
    part = dataclasses.replace(part, table=dataclasses.replace(part.table, rules=rules))
    plans = {plan.path: plan for plan in importing._plans(part, None)}
    [kernel] = plans["second_time_embedder/out/kernel"].blocks()
    [bias] = plans["second_time_embedder/out/bias"].blocks()
    assert kernel.shape == (64, 64) and abs(kernel.std() - 0.5) < 0.05 and not bias.any()
    [again] = plans["second_time_embedder/out/kernel"].blocks()
    np.testing.assert_array_equal(kernel, again)
