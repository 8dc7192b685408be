"""Bad folders, targets and disks: what is said, and that nothing is left behind."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from etils import epath

from tests.checkpoints.folders import (
    CONVERT,
    NETWORKS,
    configure,
    convert,
    edit,
    sharded,
    weight_file,
)
from twinflow_jax import checkpoints, files
from twinflow_jax.checkpoints import imported, store, tensors
from twinflow_jax.errors import UserError

# Each changes `source` and returns what the message must say.


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
    return ["_class_name is 'SD3Transformer2DModel'"]


def other_meaning(source):
    configure(source / "transformer", guidance_embeds=True)
    configure(source / "vae", attn_scales=[1.0], base_dim="eight")
    configure(source / "text_encoder", architectures=["Qwen2ForCausalLM"])
    return ["transformer: .*guidance_embeds", "text_encoder: .*architectures",
            "vae: .*attn_scales.*base_dim is 'eight', not a positive int"]


def no_values(source):
    configure(source / "vae", dim_mult=["eight"])
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
        (["import", base, new, "--shards", "0"], "--shards: 0 is no whole number from 1"),
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


@pytest.mark.parametrize("text, message", [
    ("[1]", "holds no keys"), ('{"format": "two"}', "format is 'two', no number"),
    ('{"model": 5}', "model is 5; it takes a section"), ("{", "line 1 column 2"),
    ('{"model": {"name": "mlp"}, "objective": {"form": "paper"}, "train": {"steps": "9"}}',
     "train.steps is '9'; it takes int"),
])
def test_a_record_that_was_edited_wrongly_is_named_with_its_key(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json cannot be read.*{message}"):
        checkpoints.read_run(tmp_path)


def test_a_run_of_another_format_is_refused(run, tmp_path):
    """Of the former order of Qwen-Image's channels, which had no number, and of a later one."""
    record = json.loads((run / "config.json").read_text())
    assert record.pop("format") == imported.FORMAT
    for fields, refused in (
        (record, True), (record | {"format": imported.FORMAT + 1}, True),
        (record | {"model": {"name": "sana"}}, False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        if refused:
            with pytest.raises(UserError, match="of another version of this project"):
                checkpoints.read_run(tmp_path)
        else:
            assert checkpoints.read_run(tmp_path).model.name == "sana"


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
@pytest.mark.parametrize(
    "sent, said", [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")]
)
def test_an_interrupted_conversion_leaves_nothing(
    verb, sent, said, base, checkpoint, tmp_path, monkeypatch, capsys
):
    module, name = {"import": (store, "write"), "export": (tensors, "nbytes")}[verb]
    original, calls = getattr(module, name), []

    def signalled(*arguments):
        calls.append((tmp_path / "target" / files.UNFINISHED).exists())
        if sum(calls) == 2:
            signal.raise_signal(sent)
        return original(*arguments)

    monkeypatch.setattr(module, name, signalled)
    source = base if verb == "import" else checkpoint
    assert convert(verb, source, tmp_path / "target") == 128 + sent
    assert sum(calls) == 2 and not (tmp_path / "target").exists()
    assert capsys.readouterr().err.splitlines()[-1] == said


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
    """The one that began last is refused, and leaves the files of the other alone."""
    target = tmp_path / "target"
    with files.whole_folder(target, 0):
        files.write(target / "a", b"first")
        for _ in range(2):
            with pytest.raises(UserError, match="in use by process"), files.whole_folder(target, 0):
                pass
    assert [(f.name, f.read_bytes()) for f in target.iterdir()] == [("a", b"first")]


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
