"""Adapters of runs in files, and files on runs and base models: from the command line."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from etils import epath
from PIL import Image

from tests.checkpoints.folders import SEED, bits, convert, read
from tests.test_verbs import call
from twinflow_jax import checkpoints, models, objectives, sample
from twinflow_jax.checkpoints import adapter_files, dialects, imported, random, store, tensors
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.training import checks

SECOND = {  # the embedder of each time conditioning
    "second_embedder": "second_time_embedder", "gated": "gated_time_embedder", "half_r": "",
}


@pytest.fixture(scope="module", params=["second_embedder"])
def trained(request, checkpoint, tmp_path_factory) -> pathlib.Path:
    """A run of adapters and of what embeds r, with random values."""
    workdir, time = tmp_path_factory.mktemp("trained") / "run", request.param
    whole = [f"{SECOND[time]}/.*"] if SECOND[time] else []
    run = Run.of({
        "model": {"name": "qwen_image"}, "pipeline": str(checkpoint),
        "objective": objectives.preset("released", guidance=0.0),
        "train": {"ema_decay": 0.0, "keep": 1, "init_from": str(checkpoint)},
        "adapter": {"rank": 3, "targets": ["released"], "whole": whole},
    })
    small = imported.open_imported(checkpoint).config("transformer")
    run = dataclasses.replace(run, model=dataclasses.replace(small, time_conditioning=time))
    leaves = names.flatten(models.build(run.model, adapter=run.adapter).abstract_params())
    rng = np.random.default_rng(SEED)
    values = {
        path: rng.normal(size=leaf.shape).astype(np.float32) * 0.2
        for path, leaf in leaves.items() if not re.fullmatch(run.adapter.frozen, path)
    }
    with checkpoints.claim(workdir, run):
        saver = checkpoints.Saver(workdir, keep=1)
        saver.save(7, {"params": names.unflatten(values)})
        saver.wait()
        saver.close()
    return workdir


@pytest.mark.parametrize("trained", SECOND, indirect=True)
def test_a_run_in_a_file_is_the_run(trained, checkpoint, tmp_path, capsys):
    """Its adapters and what trained whole, bit for bit, on the base from the file."""
    time = checkpoints.read_run(trained).model.time_conditioning
    assert convert("export", trained, tmp_path / "no") == 2
    assert "convert adapter export" in capsys.readouterr().err
    for form in dialects.FORMATS:
        out = tmp_path / form
        assert convert("adapter", "export", trained, out, "--format", form) == 0
        portable = "any pipeline" in (out / "README.md").read_text()
        assert portable == (time != "second_embedder")
        base = imported.open_imported(checkpoint)
        opened = adapter_files.open_for(base, out)
        assert not opened.file.notes
        put_on = adapter_files.put([(opened, 1.0)], base.network("transformer"), opened.config)
        arrays = checkpoints.open_weights(trained)[1]
        for path in arrays:
            if "lora_" in path or SECOND[time] and SECOND[time] in path:
                ours, theirs = (one[path].read().result() for one in (put_on, arrays))
                np.testing.assert_array_equal(ours, theirs)
        assert put_on.keys() < arrays.keys()
    said = opened.said
    assert {said[f"twinflow_{key}"] for key in ("rank", "alpha", "step", "time", "order")} == {
        "3", "7", time, "2"
    }
    assert said["twinflow_targets"] == "released" and said["twinflow_base"] == "pipeline"
    assert (out / "whole.safetensors").exists() == bool(SECOND[time])
    if not SECOND[time]:
        return
    (out / "whole.safetensors").unlink()
    assert convert("adapter", "import", out, tmp_path / "kept", "--base", checkpoint) == 2
    assert "whole.safetensors, which is not beside it" in capsys.readouterr().err


@pytest.mark.parametrize("trained", ["gated"], indirect=True)
def test_merged_into_its_base_and_no_other(trained, checkpoint, tmp_path, capsys):
    other = tmp_path / "other"
    record = random.write_random("qwen_image", other, SEED).record
    record["networks"]["transformer"]["added"] = imported.open_imported(
        checkpoint
    ).record["networks"]["transformer"]["added"]  # as of a base model
    (other / "checkpoint.json").write_text(json.dumps(record))
    out = tmp_path / "out"
    assert convert("adapter", "export", trained, out) == 0
    assert convert("adapter", "merge", checkpoint, out, tmp_path / "merged") == 0
    merged = imported.open_imported(tmp_path / "merged")
    assert merged.knows_r and merged.config("transformer").time_conditioning == "gated"
    kernel = "gated_time_embedder/out/kernel"
    np.testing.assert_array_equal(*(
        one[kernel].read().result()
        for one in (merged.arrays("transformer"), checkpoints.open_weights(trained)[1])
    ))
    assert convert("export", tmp_path / "merged", tmp_path / "back") == 0
    assert "time_text_embed_gated.timestep_embedder.linear_1.bias" in read(
        tmp_path / "back" / "transformer"
    )
    assert convert("import", tmp_path / "back", tmp_path / "again") == 0  # as somebody else would
    again = imported.open_imported(tmp_path / "again")
    assert again.knows_r and again.config("transformer").time_conditioning == "gated"
    config = tmp_path / "back/transformer/config.json"
    config.write_text(config.read_text().replace('"gated"', '"gate"'))
    assert convert("import", tmp_path / "back", tmp_path / "wrong") == 2
    assert "time_conditioning is 'gate'; known are second_embedder" in capsys.readouterr().err
    assert convert("adapter", "merge", other, out, tmp_path / "new") == 2
    assert "was trained on other weights, pipeline (" in capsys.readouterr().err
    assert convert("adapter", "import", out, tmp_path / "kept", "--base", other) == 2
    assert not (tmp_path / "new").exists() and not (tmp_path / "kept").exists()


def draw(out: pathlib.Path, *arguments) -> tuple[str, np.ndarray]:
    """The name and the pixels of the picture that the verb draws."""
    fixed = ("--out", out, "--size", "64", "--steps", "1")
    assert call(sample, *map(str, (*fixed, *arguments))) == 0
    [file] = out.iterdir()
    return file.name, np.asarray(Image.open(file), int)


def test_the_digest_of_weights_sees_all_of_their_adapters():
    arrays = {name: np.ones((3, 4), np.float32) for name in "abcdefgh"}
    low = {f"a/lora_{end}": np.ones((4, 2), np.float32) for end in "ab"}
    changed = low | {"a/lora_b": low["a/lora_b"].copy()}
    changed["a/lora_b"][3, 1] += 1e-6
    digests = [store.fingerprint(arrays | more) for more in ({}, low, changed)]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("trained", ["gated"], indirect=True)
def test_pictures_with_adapters_put_on(trained, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert("adapter", "export", trained, out) == 0
    kept = tmp_path / "embeddings"
    _, of_run = draw(
        tmp_path / "run", "--checkpoint", trained, "--prompt", "a fox", "--save-embeddings", kept
    )
    prompt = "--embeddings", kept
    name, put_on = draw(tmp_path / "put", "--checkpoint", checkpoint, "--adapter", out, *prompt)
    np.testing.assert_array_equal(put_on, of_run)
    assert "base model" not in capsys.readouterr().err

    low = safetensors.torch.load_file(out / "pytorch_lora_weights.safetensors")
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({k: -v if "lora_B" in k else v for k, v in low.items()}, theirs)
    half, once = (
        draw(tmp_path / f"at{end}", "--checkpoint", trained, "--adapter", f"{theirs}{end}", *prompt)
        for end in (":0.5", "")
    )
    assert "no alpha is in it" in capsys.readouterr().err
    assert len({once[0], half[0], name}) == 3
    gap = lambda a, b: np.abs(a - b).mean()
    assert gap(once[1], of_run) > gap(half[1], of_run) > 1


def test_time_conditioning_has_to_be_that_of_the_network(trained, tmp_path, capsys):
    assert convert("adapter", "export", trained, tmp_path / "out") == 0
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    header = tensors.metadata(epath.Path(file)) | {"twinflow_time": "gated"}
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, header)
    arguments = ("--checkpoint", trained, "--out", tmp_path / "no", "--prompt", "a fox",
                 "--adapter", file)
    assert call(sample, *map(str, arguments)) == 2
    assert "time conditioning gated, this network with second_emb" in capsys.readouterr().err


def test_training_starts_from_an_imported_adapter(trained, checkpoint, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert convert("adapter", "export", trained, out) == 0
    assert convert("adapter", "import", out, kept, "--base", checkpoint) == 0
    run = checkpoints.read_run(trained)
    starts = lambda **changes: dataclasses.replace(
        run, train=dataclasses.replace(run.train, init_from=str(kept)),
        adapter=dataclasses.replace(run.adapter, **changes),
    )
    checks.check_start(starts())
    ours, theirs = checkpoints.base_of(starts()), checkpoints.open_weights(trained)[1]
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        np.testing.assert_array_equal(ours[path].read().result(), array.read().result())
    for changes, says in (({"rank": 4}, "rank 3 there, 4 here"),
                          ({"targets": ("attention",)}, "rank 3 there, 0 here")):
        with pytest.raises(UserError, match=says):
            checks.check_start(starts(**changes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_transformer_as_one_file(dtype, base, run, tmp_path, capsys):
    """Published keys, the second embedder's too; only matrices of blocks in eight bits."""
    out = tmp_path / "one.safetensors"
    options = "--single-file", "--raw", "--dtype", dtype
    assert convert("export", run, out, *options) == 0
    ours, theirs = safetensors.torch.load_file(out), read(base / "transformer")
    assert {key.split(".")[0] for key in ours.keys() - theirs.keys()} == {"time_text_embed_2"}
    eight = 0
    for key, tensor in ours.items():
        in_block = tensor.ndim == 2 and key.startswith("transformer_blocks.")
        wanted = getattr(torch, dtype if in_block else "bfloat16")
        eight += tensor.dtype == torch.float8_e4m3fn
        assert tensor.dtype == wanted, key
        if key in theirs:
            assert bits(tensor) == bits((theirs[key] + 1).to(wanted)), key
    assert eight == (28 if dtype.startswith("float8") else 0)
    assert convert("export", run, out, *options) == 2
    assert convert("export", run, tmp_path / "folder", "--dtype", "float8_e4m3fn") == 2
    assert "is for --single-file" in capsys.readouterr().err


MODULES = {"blocks.0.to_q": (6, 4), "blocks.1.to_q": (6, 4), "out": (4, 6)}
Pairs = dict[str, np.ndarray]


def pairs(prefix: str = "transformer.", alpha: bool = False, rank: int = 2) -> Pairs:
    made = {}
    for name, (into, out) in MODULES.items():
        made[f"{prefix}{name}.lora_A.weight"] = np.ones((rank, into), np.float32)
        made[f"{prefix}{name}.lora_B.weight"] = np.ones((out, rank), np.float32)
        if alpha:
            made[f"{prefix}{name}.alpha"] = np.float32(1)
    return {key: np.asarray(value) for key, value in made.items()}


def header(**fields) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(fields)}


Q, OUT = "transformer.blocks.1.to_q", "transformer.out"
ONE = np.ones((2, 2), np.float32)
BAD = {
    "half": (lambda all: all.pop(f"{Q}.lora_B.weight"), rf"missing \(1\): {Q}.lora_B.weight"),
    "other half": (lambda all: all.pop(f"{Q}.lora_A.weight"), rf"missing \(1\): {Q}.lora_A.wei"),
    "alpha": (lambda all: all.pop(f"{Q}.alpha"), rf"without alpha.*\(1\): {Q}.alpha"),
    "alpha alone": (
        lambda all: [all.pop(f"{Q}.lora_{x}.weight") for x in "AB"], f"A and B of {Q}.alpha"
    ),
    "NaN": (lambda all: all.update({f"{Q}.alpha": np.array(np.nan, "f4")}), rf"finite.*{Q}.alpha"),
    "renamed": (
        lambda all: all.update({"transformer.three.lora_A.weight": all.pop(f"{Q}.lora_A.weight")}),
        r"1 of 4 modules are not of this network \(1\): transformer.three.lora_A.weight",
    ),
    "mixed": (
        lambda all: all.update({"lora_unet_out.lora_up.weight": all.pop(f"{OUT}.lora_B.weight")}),
        rf"several spellings in one file .*{Q[:12]}.*lora_unet_out",
    ),
    "of another base": (
        lambda all: all.update({f"{Q}.lora_A.weight": np.ones((2, 9), np.float32)}),
        rf"another base\? \(1\): {Q}.lora_A.weight \[2, 9\], .* for 6 to 4 channels",
    ),
    "ranks": (
        lambda all: all.update({f"{Q}.lora_A.weight": np.ones((3, 6), np.float32)}), "ranks.* 3, 2"
    ),
    "dtype": (
        lambda all: all.update({f"{Q}.lora_A.weight": np.ones((2, 6), np.int8)}), "dtypes.* int8"
    ),
    "unsupported": (
        lambda all: all.update({
            f"{OUT}.dora_scale": ONE, f"{OUT}.lora_magnitude_vector": ONE, f"{OUT}.lokr_w1": ONE,
            f"{OUT}.hada_w1_a": ONE, f"{OUT}.diff_b": ONE, f"{OUT}.lora_B.bias": ONE,
            f"{OUT}.weight": ONE,
        }),
        r"(?s)(?=.*DoRA.*\(2\))(?=.*LoKr.*w1)(?=.*LoHa)(?=.*whole weights)(?=.*bias)"
        r"(?=.*of no adapter \(1\): transformer.out.weight)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_files_hold_that_cannot_be_used(case, tmp_path):
    change, says = BAD[case]
    found = pairs(alpha=True)
    change(found)
    safetensors.numpy.save_file(found, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=says):
        dialects.read(tmp_path / "bad.safetensors", MODULES)


def test_everything_wrong_is_listed_together(tmp_path):
    found = pairs(alpha=True)
    for case in ("NaN", "renamed", "unsupported"):
        BAD[case][0](found)
    safetensors.numpy.save_file(found, tmp_path / "bad.safetensors")
    with pytest.raises(UserError) as error:
        dialects.read(tmp_path / "bad.safetensors", MODULES)
    assert len(str(error.value).splitlines()) == 10, error.value


@pytest.mark.parametrize(("found", "told", "says"), [
    (pairs(rank=0), {}, "ranks that differ or are 0 .3."),
    ({"text_encoder.q.lora_A.weight": ONE}, {}, "holds no adapter of this network's modules"),
    (pairs(), {"lora_adapter_metadata": "{"}, "the header holds no config of peft's"),
    (pairs(), header(**{"transformer.lora_alpha": "x"}), "the header holds no config of peft's"),
    (pairs(), header(lora_alpha=float("nan")), "the header holds no config of peft's .alpha nan"),
    (pairs(), header(lora_alpha=1, alpha_pattern={"(": 1}), "the header holds no config of peft's"),
    (pairs(), header(**{"transformer.use_dora": True}), "not supported .1.: use_dora=True"),
    (pairs(), header(**{"transformer.bias": "all"}), "not supported .1.: bias=all"),
    (pairs(alpha=True), header(lora_alpha=2), "in the tensors than in the config.*: .*alpha 1, 2"),
])
def test_files_that_cannot_be_used(found, told, says, tmp_path):
    safetensors.numpy.save_file(found, tmp_path / "bad.safetensors", told)
    with pytest.raises(UserError, match=says):
        dialects.read(tmp_path / "bad.safetensors", MODULES)


def test_what_alpha_is_taken_to_be(tmp_path):
    file = tmp_path / "one.safetensors"

    def scales(found: Pairs, told: dict[str, str] | None = None, alpha: float | None = None):
        safetensors.numpy.save_file(found, file, told)
        one = dialects.read(file, MODULES, alpha)
        return [one.low[name].scale for name in MODULES], one.notes

    text = {"lora_te1_q.lora_down.weight": ONE, "text_encoder.q.lora_A.weight": ONE}
    none, notes = scales(pairs() | text)
    assert none == [1, 1, 1] and "2 keys of text encoders" in notes[0] and "alpha" in notes[1]
    assert scales(pairs(alpha=True)) == ([0.5] * 3, ())
    patterns = {"blocks.1.to_q": 6}
    told = header(**{"transformer.lora_alpha": 2, "transformer.alpha_pattern": patterns})
    assert scales(pairs(), told) == ([1, 3, 1], ())
    root = header(**{"transformer.lora_alpha": 2, "transformer.use_rslora": True})
    np.testing.assert_allclose(scales(pairs(), root)[0], 2**0.5)
    assert scales(pairs(alpha=True), header(lora_alpha=2), alpha=8) == ([4] * 3, ())


def test_files_that_are_none(tmp_path):
    for name, says in (("none", "cannot be read"), ("empty", "holds 0 files of adapters")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=says):
            dialects.read(tmp_path / name, MODULES)
    (tmp_path / "old.bin").write_bytes(b"PK\x03\x04 pickled")
    with pytest.raises(UserError, match="no safetensors file"):
        dialects.read(tmp_path / "old.bin", MODULES)
