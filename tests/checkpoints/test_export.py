"""Exports of checkpoints and of runs, and what `verify` says of them."""

import json
import re
import shutil

import torch
from diffusers import QwenImagePipeline

from tests.checkpoints.folders import (
    NETWORKS,
    assert_same,
    configure,
    convert,
    edit,
    read,
    weight_file,
)


def test_export_is_the_file_that_the_library_wrote(base, checkpoint, tmp_path):
    assert convert("export", checkpoint, tmp_path / "back") == 0
    for name in NETWORKS:
        file = weight_file(base / name)
        assert (tmp_path / "back" / name / file.name).read_bytes() == file.read_bytes()


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


def test_export_of_a_run_without_a_second_embedder(base, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run")
    record = json.loads((other / "config.json").read_text())
    record["model"]["time_conditioning"] = "half_r"
    (other / "config.json").write_text(json.dumps(record))
    assert convert("export", other, tmp_path / "new", "--raw") == 0
    theirs = read(base / "transformer")
    assert_same(read(tmp_path / "new" / "transformer"), {k: v + 1 for k, v in theirs.items()})
    assert "E1(t - r/2)" in (tmp_path / "new" / "README.md").read_text()


def test_a_run_of_another_network_is_not_exported(source, run, tmp_path, capsys):
    def change(all):
        return {k: v for k, v in all.items() if "blocks.1." not in k}

    edit(source / "transformer", change)
    configure(source / "transformer", num_layers=1)
    assert convert("import", source, tmp_path / "other") == 0
    assert convert("export", run, tmp_path / "new", "--pipeline", tmp_path / "other") == 2
    assert "the run's transformer is not that of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


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
