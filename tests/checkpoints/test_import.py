"""Published folders, written by diffusers, through twinflow convert and back."""

import codecs
import dataclasses
import json
import os
import re
import shutil
import weakref

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from etils import epath

from tests.checkpoints.folders import (
    NETWORKS,
    as_it_is,
    assert_same,
    configure,
    convert,
    edit,
    read,
    sharded,
    to_bfloat16,
)
from twinflow_jax import models
from twinflow_jax.checkpoints import imported, importing, published, tensors
from twinflow_jax.models import sana
from twinflow_jax.models.names import KNOWS_R


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


@pytest.mark.parametrize("wrapped", [
    "_orig_mod.{}.{}", "module._orig_mod.{}.{}", "model.diffusion_model.{}.{}",
    "_fsdp_wrapped_module.{}._fsdp_wrapped_module._checkpoint_wrapped_module.{}",
])
def test_names_from_modules_in_others(wrapped, source):
    """As compiled, sharded and checkpointed modules are saved, and networks within others."""
    wanted = published.open_folder(str(source)).parts["transformer"].tensors.keys()
    edit(source / "transformer", lambda all: {
        wrapped.format(*key.split(".", 1)): tensor for key, tensor in all.items()
    })
    assert published.open_folder(str(source)).parts["transformer"].tensors.keys() == wanted


def test_byte_order_marks(source, tmp_path):
    """Before any JSON of a published folder; ours has none, as tokenizers want it."""
    for file in source.rglob("*.json"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert convert("import", source, tmp_path / "ours") == 0
    assert convert("verify", source, tmp_path / "ours") == 0
    kept = list((tmp_path / "ours").rglob("*.json"))
    assert len(kept) > 3 and not any(f.read_bytes().startswith(codecs.BOM_UTF8) for f in kept)


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
        record = imported.open_imported(ours).record
        assert record["source"] == source and record["hub"] == "Somebody/Some-Model"
    for source, message in (
        ("Somebody/Other", "neither a folder nor in the local hub cache"),
        ("Somebody/Some-Model/v2", "no folder v2"), ("a/b c", "no folder a/b c"),
    ):
        assert convert("import", source, tmp_path / "new") == 2
        assert message in capsys.readouterr().err


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


def test_what_no_file_holds_is_drawn(base):
    """Rules with random values instead of a copy: the same ones whatever else is imported."""
    part = published.open_folder(str(base)).parts["transformer"]
    rules = tuple(
        dataclasses.replace(rule, copy_of="", normal=0.0 if rule.key.endswith("bias") else 0.5)
        if rule.copy_of else rule
        for rule in part.table.rules
    )
    part = dataclasses.replace(part, table=dataclasses.replace(part.table, rules=rules))
    plans = {plan.rule.path: plan for plan in importing._plans(part, None)}
    [kernel] = plans["second_time_embedder/out/kernel"].blocks()
    [bias] = plans["second_time_embedder/out/bias"].blocks()
    assert kernel.shape == (64, 64) and abs(kernel.std() - 0.5) < 0.05 and not bias.any()
    [again] = plans["second_time_embedder/out/kernel"].blocks()
    np.testing.assert_array_equal(kernel, again)


def test_other_added_tensors_say_nothing_of_r(tmp_path):
    """A group of its own, as the twin's sign would be, may be added to a network that knows r."""
    tiny = models.FAMILIES["sana"].text_to_image.tiny["transformer"]
    table = sana.transformer.table(sana.transformer.Config.from_published(tiny))
    for added, knows_r in (([], True), (["sign"], True), (sorted(table.group(KNOWS_R)), False)):
        network = {"published": tiny, "added": added}
        record = {"family": "sana", "networks": {"transformer": network}}
        assert imported.Imported(epath.Path(tmp_path), record).knows_r == knows_r
