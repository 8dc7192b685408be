"""Saving: under any name, readable before older checkpoints go, and the reason where it fails."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import ocdbt_utils

from twinflow_jax.checkpoints.saver import Saver
from twinflow_jax.errors import UserError


def parts(value: float) -> dict:
    return {
        "params": {"a/b": {"w.x": jnp.full((2, 3), value)}, "c": jnp.float32(value)},
        "progress": {"step": jnp.int32(value), "decays": {}},
    }


def save(workdir, step: int, value: float, keep: int = 1) -> None:
    saver = Saver(workdir, keep)
    saver.save(step, parts(value))
    saver.wait()
    saver.close()


def restored(workdir) -> float:
    saver = Saver(workdir, keep=1, writes=False)
    found = saver.restore(parts(0.0))
    saver.close()
    jax.tree.map(np.testing.assert_array_equal, found, parts(float(found["params"]["c"])))
    return float(found["params"]["c"])


@pytest.mark.parametrize("name, other", [
    ("runs [v1]", "runs v"), ("a*b", "axyb"), ("a?b", "axb"), ("a[!x]b", "ayb"), ("a]b[", "a"),
    ("100%", "100"), ("a%41", "aA"), ("#1?x=2", "#1"), ("x" * 255, "x"),
    ("caf\u00e9", "cafe\u0301"), ("{0} %s $HOME", "0"), ("ends in ", "ends in"), ("a:b@c", "b@c"),
])
def test_a_folder_has_its_own_checkpoints_whatever_its_name(tmp_path, name, other):
    """And none of a folder that its name would stand for as a pattern or an address."""
    save(tmp_path / other, 3, 2.0)
    save(tmp_path / name, 3, 1.0)
    assert restored(tmp_path / name) == 1.0 and restored(tmp_path / other) == 2.0
    assert {entry.name for entry in tmp_path.iterdir()} == {name, other}


@pytest.mark.parametrize("name", ["a\\b", "settings:", os.fsdecode(b"latin \xe9")])
def test_names_that_arrays_cannot_have_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UserError, match="rename"):
        Saver(tmp_path / name, keep=1)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_back_is_no_checkpoint_and_older_ones_stay(tmp_path, monkeypatch):
    save(tmp_path, 1, 1.0)

    async def nothing(*_, **__):
        pass

    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", nothing)
    with pytest.raises(UserError, match=r"step 2 could not be saved.*: start.*checkpoints: \[1\]"):
        save(tmp_path, 2, 2.0)
    assert restored(tmp_path) == 1.0


def test_a_part_that_lacks_an_array_is_no_checkpoint(tmp_path, monkeypatch):
    saver = Saver(tmp_path, keep=1)
    monkeypatch.setattr(saver, "_check", lambda check=saver._check: (
        saver._shapes["params"].update([(7,)]), check(),
    ))
    saver.save(1, parts(1.0))
    with pytest.raises(UserError, match="its params cannot be read back whole"):
        saver.wait()
    saver.close()
    assert saver.steps == []


def test_a_save_that_fails_when_the_run_ends_is_said(tmp_path, monkeypatch, capsys):
    saver = Saver(tmp_path, keep=1)
    monkeypatch.setattr(saver, "_check", lambda: 1 / 0)
    saver.save(1, parts(1.0))
    saver.close()
    assert "warning: the checkpoint of step 1 could not be saved" in capsys.readouterr().err


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "make room there"),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "make room there"),
    (ValueError("RESOURCE_EXHAUSTED: ... [No space left on device]"), "make room there"),
    (OSError(errno.EACCES, os.strerror(errno.EACCES)), "start the same command"),
    (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), "start the same command"),
])
def test_only_a_full_disk_needs_room(tmp_path, monkeypatch, error, advice):
    saver = Saver(tmp_path, keep=1)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(saver._checkpointer, "save_checkpointables_async", fail)
    with pytest.raises(UserError, match=rf"\): {advice}"):
        saver.save(1, parts(1.0))
    saver.close()
