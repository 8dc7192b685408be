"""The wheel and the sdist: what is in them, their version, and what they install."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from twinflow_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOST = 1 << 20  # bytes of a file in them


def call(*words, **options) -> str:
    return subprocess.run(
        list(map(str, words)), check=True, text=True, stdout=subprocess.PIPE, **options
    ).stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git keeps here, without git."""
    folder = tmp_path_factory.mktemp("package") / "source"
    for name in call("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """`(wheel, sdist)` of a commit with a tag."""
    pytest.importorskip("build", reason="pip install build twine")
    tagged = tmp_path_factory.mktemp("tagged") / "source"
    shutil.copytree(source, tagged)
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    call("git", "init", "-q", cwd=tagged)
    call("git", "add", ".", cwd=tagged)
    call(*git, "commit", "-qm", "all", cwd=tagged)
    call("git", "tag", "v7.8.9", cwd=tagged)
    call(sys.executable, "-m", "build", cwd=tagged)  # the wheel is made from the sdist
    [wheel], [sdist] = (list((tagged / "dist").glob(f"*.{end}")) for end in ("whl", "tar.gz"))
    return wheel, sdist


@pytest.mark.slow
def test_what_is_in_them(built):
    """The package, the configs and the pages; no tests, pictures or records of the author's."""
    wheel, sdist = built
    assert wheel.name == "twinflow_jax-7.8.9-py3-none-any.whl" and "-7.8.9." in sdist.name
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    with tarfile.open(sdist) as archive:
        sizes_of_source = {
            entry.name.partition("/")[2]: entry.size for entry in archive if entry.isfile()
        }
    configs = {f"configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    wanted = {"twinflow_jax/training/page.html", "twinflow_jax/serving/page.html"}
    assert wanted | {f"twinflow_jax/{name}" for name in configs} <= sizes.keys()
    assert wanted | configs | {"README.md", "LICENSE", "pyproject.toml"} <= sizes_of_source.keys()
    for name, size in (sizes | sizes_of_source).items():
        first = name.split("/")[0]
        known = ("twinflow_jax", "configs", "twinflow_jax-7.8.9.dist-info")
        assert first in known or "/" not in name, name
        assert size < MOST and not name.endswith((".png", ".pyc")), name
    call(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)


@pytest.mark.slow
def test_without_git_there_is_a_version(source, tmp_path):
    """As on the workers of a pod, to which a clone is copied without its history."""
    pytest.importorskip("build", reason="pip install build twine")
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(source.parent)}
    call(sys.executable, "-m", "build", "-w", "-o", tmp_path, source, env=outside)
    assert [file.name for file in tmp_path.iterdir()] == ["twinflow_jax-0.0.0-py3-none-any.whl"]


@pytest.mark.slow
def test_installed(built, tmp_path):
    """Every verb starts, and configs have names, in a folder that is no clone."""
    wheel, _ = built
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    bin = tmp_path / "venv/bin"
    call(bin / "pip", "install", "-q", "--no-deps", wheel)
    paths = call(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    here = {sysconfig.get_path("purelib"), str(pathlib.Path(pytest.__file__).parents[1])}
    (pathlib.Path(paths.strip()) / "dependencies.pth").write_text("\n".join(here))
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    twinflow = lambda *words: call(bin / "twinflow", *words, cwd=tmp_path, env=outside)
    assert twinflow("--version") == "7.8.9\n"
    for verb in cli.VERBS:
        assert verb in twinflow("--help") and f"twinflow {verb}" in twinflow(verb, "--help")
    few = ("--config.train.steps=2", "--config.sample.score_count=0")
    for config, folder in (("digits", "a"), ("configs/digits.py", "b")):
        twinflow("train", "--config", config, "--workdir", folder, *few)
        assert (tmp_path / folder / "checkpoints/2").exists()
