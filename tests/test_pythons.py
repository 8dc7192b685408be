"""Digits on every Python that the package says it takes: installed, trained, drawn, scored."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FEW = ("--config.train.steps=40", "--config.sample.score_count=0")


def starts(python: str) -> bool:
    """Whether there is an interpreter of that name; pyenv's names may stand for none."""
    file = shutil.which(python)
    return bool(file) and subprocess.run([file, "--version"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("python, versions", [
    ("python3.11", ["-c", "constraints.txt"]), ("python3.12", ["-c", "constraints.txt"]),
    ("python3.13", ["-c", "constraints.txt"]), ("python3.13", []),
], ids=["3.11", "3.12", "3.13", "newest packages"])
def test_digits(tmp_path, python, versions):
    if not starts(python):
        pytest.skip(f"no {python} on PATH")
    bin = tmp_path / "venv" / "bin"
    call = lambda *words, **options: subprocess.run(words, check=True, **options)
    call(python, "-m", "venv", tmp_path / "venv")
    call(bin / "pip", "install", "-q", *versions, ".", cwd=ROOT)
    twinflow = lambda *words: call(bin / "twinflow", *words, cwd=tmp_path)
    twinflow("train", "--config", "configs/digits.py", "--workdir", "run", *FEW)
    twinflow("sample", "--checkpoint", "run", "--out", "samples", "--classes", "3")
    twinflow("evaluate", "classes", "--checkpoint", "run", "--count", "200", "--steps", "1")
    assert len(list((tmp_path / "samples").glob("*.png"))) == 8
