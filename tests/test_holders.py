"""One command at a time in a folder, whatever becomes of the one before."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading

import pytest

from twinflow_jax import holders
from twinflow_jax.errors import UserError
from twinflow_jax.holders import Holder, held

HOLD = """
import sys
from twinflow_jax.holders import held
with held(sys.argv[1], "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / "in_use"


def name(file, **changes) -> None:
    """Makes a file name a holder, this process but for some changes."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(dataclasses.replace(Holder.here(), **changes).to_json())


def test_a_living_process_is_named_and_a_killed_one_does_not_block(file):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        before = file.read_bytes()
        said = rf"^it is in use by process {other.pid} on \S+, since 20..-..-.. ..:..:..: let that"
        for _ in range(2):
            with pytest.raises(UserError, match=said), held(file, "it"):
                pass
        assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has noticed
        with held(file, "it"):
            assert Holder.of(file).process == os.getpid()
    assert not file.exists()


def test_a_process_that_got_the_number_of_a_dead_one_is_another(file):
    name(file, started=holders.started(os.getpid()) - 1)
    with held(file, "it"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"owner": 1}', "0123abcd"])
def test_what_names_nobody_does_not_block(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with held(file, "it"):
        assert Holder.of(file).process == os.getpid()


def test_a_sign_of_life_from_another_machine_is_enough(file, monkeypatch, capsys):
    monkeypatch.setattr(holders, "LOOK", 0.05)
    name(file, machine="other", host="far")
    over = threading.Event()

    def show_life():
        while not over.wait(0.01):
            os.utime(file)

    thread = threading.Thread(target=show_life)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process .* on far"), held(file, "it"):
            pass
    finally:
        over.set()
        thread.join()
    assert "waiting for a sign of life, up to 120 s" in capsys.readouterr().err


def test_silence_of_another_machine_counts_as_death(file, monkeypatch):
    name(file, machine="other")
    os.utime(file, (0, 0))  # long ago: at once
    with held(file, "it"):
        pass
    monkeypatch.setattr(holders, "LOOK", 0.05)
    monkeypatch.setattr(holders, "LEASE", 0.2)
    name(file, machine="other")
    with held(file, "it"):
        pass
    assert os.listdir(file.parent) == []


@pytest.mark.parametrize("dead", [False, True])
def test_of_those_that_start_at_the_same_moment_one_gets_it(file, dead):
    for _ in range(20):
        if dead:
            name(file, process=2**22 + 1)
        start, finish, won = threading.Barrier(6), threading.Barrier(6), []

        def one(start=start, finish=finish, won=won):
            start.wait()
            with contextlib.suppress(UserError), held(file, "it"):
                won.append(1)
                finish.wait()
                return
            finish.wait()

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [1] and not file.exists()


def test_a_holder_whose_place_was_taken_ends(file, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(holders, "BEAT", 0.01)
    monkeypatch.setattr(holders, "end", lambda status: ended.set())
    with pytest.raises(UserError, match="was taken over by process 7 on"), held(file, "it"):
        name(file, process=7)
        ended.wait()
    assert "error: it was taken over by process 7" in capsys.readouterr().err
    assert Holder.of(file).process == 7  # not ours to remove


def test_a_holder_shows_that_it_lives(file, monkeypatch):
    monkeypatch.setattr(holders, "BEAT", 0.01)
    with held(file, "it"):
        os.utime(file, (0, 0))
        while not file.stat().st_mtime:
            pass
