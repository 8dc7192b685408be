"""Runs and exports on the Hugging Face hub, of a server here that speaks as it does."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from tests.hub import TOKEN, Hub
from tests.test_verbs import call
from twinflow_jax import checkpoints, train
from twinflow_jax import config as configs
from twinflow_jax.checkpoints import steps_of
from twinflow_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARGUMENTS = [
    "--config", "configs/digits.py", "--config.model.width=32", "--config.model.depth=1",
    "--config.data.batch_size=32", "--config.train.log_every=1",
    "--config.train.checkpoint_every=2", "--config.train.keep=2", "--config.train.sample_every=100",
    "--config.sample.score_count=0", "--config.sample.columns=1", "--config.sample.steps=(1,)",
]
REPOSITORY = "user/run"
CARRIED = f"--config.train.hub={REPOSITORY}"


def trained(workdir: pathlib.Path, steps: int, *more: str) -> int:
    return call(
        train, *ARGUMENTS, f"--config.train.steps={steps}", "--workdir", str(workdir), *more
    )


def weights(workdir: pathlib.Path) -> list[np.ndarray]:
    params = checkpoints.load_weights(workdir, raw=True)[2]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def files(folder: pathlib.Path, below: str = "") -> dict[str, bytes]:
    found = {f.relative_to(folder).as_posix(): f.read_bytes()
             for f in folder.rglob("*") if f.is_file()}
    return {name: data for name, data in found.items() if name.startswith(below)}


def steps_there(hub: Hub, name: str = REPOSITORY) -> list[int]:
    found = (re.match(r"checkpoints/(\d+)/", file) for file in hub.files(name))
    return sorted({int(match[1]) for match in found if match})


def is_commit(method: str, address: str) -> bool:
    return method == "POST" and "/commit/" in address


def test_a_killed_run_goes_on_on_a_new_machine_with_the_same_bits(hub, tmp_path, capsys):
    """Killed while it commits its second checkpoint, of which the hub then has nothing."""
    assert trained(tmp_path / "undisturbed", 12) == 0
    commits = []

    def kill_at_the_third(method: str, address: str) -> int:
        if is_commit(method, address):
            commits.append(steps_of(tmp_path / "first"))
            if len(commits) == 3:
                process.kill()
        return 503 if len(commits) >= 3 else 0

    hub.refuse = kill_at_the_third
    process = subprocess.Popen(
        [sys.executable, "-m", "twinflow_jax.train", *ARGUMENTS, "--config.train.steps=12",
         "--workdir", str(tmp_path / "first"), CARRIED], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    assert process.wait() == -signal.SIGKILL
    hub.refuse = lambda method, address: 0
    [before] = steps_there(hub)
    assert before < 12
    capsys.readouterr()
    assert trained(tmp_path / "second", 12, CARRIED) == 0
    said = capsys.readouterr()
    assert f"step {before} comes from hub user/run" in said.out
    for a, b in zip(weights(tmp_path / "undisturbed"), weights(tmp_path / "second"), strict=True):
        np.testing.assert_array_equal(a, b)
    metrics = [tmp_path / folder / "metrics.jsonl" for folder in ("undisturbed", "second")]
    assert metrics[0].read_bytes() == metrics[1].read_bytes() == hub.files(REPOSITORY)[
        "metrics.jsonl"]
    # The hub has two whole checkpoints, nothing of others even in its history, and no more.
    assert len(steps_there(hub)) == 2 and steps_there(hub)[-1] == 12
    there = {k: data for k, data in hub.files(REPOSITORY).items() if k.startswith("checkpoints/12")}
    assert there == files(tmp_path / "second", "checkpoints/12")
    assert len(hub.repositories[REPOSITORY]) == 1 and hub.private[REPOSITORY]
    assert {name.split("/")[0] for name in hub.files(REPOSITORY)} == {
        entry.name for entry in (tmp_path / "second").iterdir()} | {".gitattributes"}
    everything = [said.out.encode(), said.err.encode(), *hub.files(REPOSITORY).values()]
    assert not any(TOKEN.encode() in text for text in everything)


def test_a_slow_push_does_not_hold_up_training_nor_lose_what_training_lets_go(hub, tmp_path):
    held = []

    def hold(method: str, address: str) -> int:
        """The first checkpoint's commit, until training has let go of it."""
        if "/preupload/" in address and not held and steps_of(tmp_path / "run"):
            held.append(steps_of(tmp_path / "run")[-1])
            while held[0] in steps_of(tmp_path / "run"):
                time.sleep(0.01)
        return 0

    hub.refuse = hold
    assert trained(tmp_path / "run", 12, CARRIED, "--config.train.keep=1") == 0
    assert f"step {held[0]}" in hub.messages and hub.messages[-1] == "step 12"
    assert steps_there(hub) == [12]
    assert not (tmp_path / "run" / ".hub").exists()


def test_a_hub_that_is_away_for_a_while_stops_nothing(hub, tmp_path, capsys):
    refused = []

    def away(method: str, address: str) -> int:
        if is_commit(method, address) and hub.messages and not refused:
            refused.append(address)
            return 503
        return 0

    hub.refuse = away
    assert trained(tmp_path / "run", 8, CARRIED) == 0
    [line] = [li for li in capsys.readouterr().err.splitlines() if "warning" in li]
    assert re.fullmatch(
        r".*warning: step \d is not on the hub: hub user/run: it does not answer as it should "
        r"\(.*503.*\); tried again with the next checkpoint", line)
    assert steps_there(hub)[-1] == 8


def test_without_permission_to_push_training_ends_and_says_what_is_missing(hub, tmp_path, capsys):
    assert trained(tmp_path / "run", 2, CARRIED) == 0
    hub.refuse = lambda method, address: 403 if is_commit(method, address) else 0
    capsys.readouterr()
    assert trained(tmp_path / "run", 4, CARRIED) == 0
    last = [line for line in capsys.readouterr().err.splitlines() if "warning" in line][-1]
    assert re.search(
        r"warning: step 4 is not on the hub: hub user/run: this token may not do that: .*; the "
        r"same command again pushes it", last)
    assert TOKEN not in last and steps_of(tmp_path / "run")[-1] == 4
    hub.refuse = lambda method, address: 0
    assert trained(tmp_path / "run", 4, CARRIED) == 0
    assert steps_there(hub)[-1] == 4


def test_a_folder_that_is_ahead_wins_and_another_run_is_refused(hub, tmp_path, capsys):
    assert trained(tmp_path / "run", 2, CARRIED) == 0
    assert trained(tmp_path / "run", 4) == 0
    before = files(tmp_path / "run", "checkpoints")
    assert trained(tmp_path / "run", 4, CARRIED) == 0
    assert files(tmp_path / "run", "checkpoints") == before
    assert steps_there(hub) == [2, 4]
    assert "pushing step 4 to hub user/run" in capsys.readouterr().out
    assert trained(tmp_path / "run", 4, CARRIED) == 0
    assert "pushing" not in capsys.readouterr().out
    assert trained(tmp_path / "other", 4, CARRIED, "--config.train.seed=7") == 2
    assert capsys.readouterr().err == (
        "error: hub user/run holds another run (train.seed is 42 there, 7 here): choose another "
        "train.hub, or the config that it was started with\n")
    hub.put("user/model", {"config.json": b"{}", "model.safetensors": b"weights"})
    assert trained(tmp_path / "other", 4, "--config.train.hub=user/model") == 2
    assert "hub user/model is not empty and holds no run" in capsys.readouterr().err
    assert not (tmp_path / "other").exists() and len(hub.repositories["user/model"]) == 1


@pytest.mark.parametrize("name, refusing, token, says", [
    (f"user/{TOKEN}!", {}, TOKEN, "train.hub is no name of a repository: give USER/NAME"),
    ("run", {}, TOKEN, "train.hub is no name of a repository: give USER/NAME"),
    (REPOSITORY, {}, "", "hub user/run: it takes a token: set HF_TOKEN, or hf auth login"),
    (REPOSITORY, {}, "hf_other", "hub user/run: it does not take the token: set HF_TOKEN"),
    ("somebody/run", {}, TOKEN, "hub somebody/run: this token may not do that: give it permission"),
    (REPOSITORY, {"commit": 403}, TOKEN, "hub user/run: this token may not do that"),
    (REPOSITORY, {"api": 503}, TOKEN, "hub user/run: it does not answer as it should"),
    (REPOSITORY, None, TOKEN, "hub user/run: it does not answer as it should"),
])
def test_a_hub_that_refuses_at_the_start_is_told_in_one_line(
    hub, tmp_path, capsys, monkeypatch, name, refusing, token, says
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    hub.refuse = lambda method, address: next(
        (status for part, status in (refusing or {}).items() if f"/{part}/" in address), 0)
    if refusing is None:  # no network
        hub.close()
    assert trained(tmp_path / "run", 4, f"--config.train.hub={name}") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{says}.*\n", said)
    assert TOKEN not in said and not steps_of(tmp_path / "run")


def test_a_run_in_a_bucket_is_not_carried():
    run = configs.parse("configs/digits.py", [f"train.hub={REPOSITORY}"])
    with pytest.raises(UserError, match="in a bucket, where any machine goes on with it: leave"):
        checkpoints.Carrier("gs://bucket/run", run, "", leads=True)
