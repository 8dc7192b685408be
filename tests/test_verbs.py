"""The verbs as a user meets them: what they write, and one clear line for each bad input."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from twinflow_jax import evaluate, features, sample, train
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.errors import run_verb

SMALL = [
    "--config.model.width=32", "--config.model.depth=1", "--config.data.batch_size=32",
    "--config.train.steps=4", "--config.sample.score_count=0",
]


def call(verb, *arguments: str) -> int:
    """Runs a verb in this process; returns its exit status."""
    before, sys.argv = sys.argv, ["verb", *arguments]
    try:
        with pytest.raises(SystemExit) as stop:
            run_verb(verb.main)
        return stop.value.code or 0
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose --workdir was given relative to the folder where the verb ran."""
    folder, config = tmp_path_factory.mktemp("verbs"), pathlib.Path("configs/digits.py").resolve()
    with contextlib.chdir(folder):
        assert call(train, "--config", str(config), "--workdir", "run", *SMALL) == 0
    return folder / "run"


def test_sample_writes_pictures_that_the_seed_decides(run, tmp_path):
    base = ["--checkpoint", str(run), "--classes", "3,7", "--steps", "2"]
    assert call(sample, *base, "--out", str(tmp_path / "a"), "--count", "2") == 0
    assert call(sample, *base, "--out", str(tmp_path / "b"), "--count", "3") == 0
    assert call(sample, *base, "--out", str(tmp_path / "c"), "--count", "2", "--seed", "1") == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(names) == 4
    for name in names:  # whatever else is drawn with it
        with Image.open(tmp_path / "a" / name) as a, Image.open(tmp_path / "b" / name) as b:
            np.testing.assert_allclose(np.asarray(a, int), np.asarray(b, int), atol=1)
            settings = json.loads(a.text["twinflow"])
            assert settings["nfe"] == 2 and settings["seed"] == 0 and settings["at_step"] == 4
    of_seed_1 = min((tmp_path / "c").iterdir())
    with Image.open(tmp_path / "a" / names[0]) as a, Image.open(of_seed_1) as c:
        assert not np.array_equal(np.asarray(a), np.asarray(c))


def test_seeds_have_64_bits(run, tmp_path):
    base = ["--checkpoint", str(run), "--classes", "3", "--count", "1", "--out", str(tmp_path)]
    seeds = (0, 2**32, 2**50, 2**64 - 1)
    assert [call(sample, *base, "--seed", str(seed)) for seed in seeds] == [0] * 4
    pictures = {Image.open(file).tobytes() for file in tmp_path.iterdir()}
    assert len(pictures) == 4
    config = ["--config", "configs/digits.py", *SMALL, f"--config.train.seed={2**64 - 1}"]
    assert call(train, *config, "--workdir", str(tmp_path / "run")) == 0


def test_sheet_and_raw_weights(run, tmp_path):
    out = ["--checkpoint", str(run), "--out", str(tmp_path), "--sheet"]
    assert call(sample, *out) == 0
    assert call(sample, *out, "--raw") == 0
    assert call(sample, *out, "--classes", "3") == 0  # beside the first
    assert sorted(re.sub("_[0-9a-f]{8}[.]png", "", p.name) for p in tmp_path.iterdir()) == [
        "sheet_run_step4_few1nfe_seed0", "sheet_run_step4_few1nfe_seed0",
        "sheet_run_step4_raw_few1nfe_seed0",
    ]


def test_evaluate_writes_table_json_plot_and_sheet(run, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("s.json", "p.png", "g.png")}
    assert call(
        evaluate, "classes", "--checkpoint", str(run), "--count", "200", "--steps", "1,4",
        "--json", str(files["s.json"]), "--plot", str(files["p.png"]),
        "--sheet", str(files["g.png"]),
    ) == 0
    table = capsys.readouterr().out
    record = json.loads(files["s.json"].read_text())
    assert [row["nfe"] for row in record["scores"]] == [1, 4]
    for row in record["scores"]:
        assert f"{row['accuracy']:.3f}" in table
        assert row["nearest"] > 0 and np.isfinite(row["frechet"])
    assert record["real"]["accuracy"] > 0.9
    assert all(Image.open(files[name]).size[0] > 100 for name in ("p.png", "g.png"))


def test_bad_inputs_get_one_line(run, tmp_path, capsys):
    new = ["--workdir", str(tmp_path / "new")]
    digits = ["--config", "configs/digits.py"]
    out = ["--checkpoint", str(run), "--out", str(tmp_path / "out")]
    cases = [
        (train, [*digits, *new, "--config.train.stesp=3"], "did you mean 'train.steps'"),
        (train, [*digits, *new, "--steps=3"], "unknown argument '--steps=3'"),
        (train, ["--config", "nothing.py", *new], "no config file"),
        (train, [*digits, "--workdir", str(run)], "holds another run"),
        (train, [*digits, *new, "--config.objective.guidance=1.5"], "diverges"),
        (train, [*digits, *new, f"--config.train.seed={2**64}"],
         "train.seed is .*; give a number in .*551615"),
        (train, [*digits, *new, "--config.train.seed=-1"], "train.seed is -1; give a number"),
        (train, [*digits, "--workdir", "two\nlines"], "line break"),
        (train, [*digits, "--workdir", "http://host/runs"], "is no path"),
        (train, [*digits, *new, "--process", "one"], "--process: invalid int value: 'one'"),
        (train, digits, "arguments are required: --workdir"),
        (train, [*digits, "--workdir", "README.md/below"], "README.md takes no files; choose"),
        (train, [*digits, "--workdir", "x" * 300], "a name of over 255 bytes"),
        (train, [*digits, *new, "--process", "1"], "process 1 of 1: give --coordinator"),
        (train, [*digits, *new, "--coordinator", "foo", "--processes", "2"], "'foo'; give HOST:"),
        (train, [*digits, *new, "--coordinator", "foo:0"], "'foo:0'; give HOST:PORT"),
        (train, [*digits, *new, "--config.model.width=1000000"], "220003.* GB.* has .* GB: "),
        (sample, [*out, "--seed=--5"], "--seed: the seed is '--5'; give a whole"),
        (sample, [*out, "--seed", "-1"], "--seed: the seed is -1; give a whole"),
        (sample, [*out, "--seed", str(2**64)], "--seed: the seed is 1844.*; give a whole"),
        (evaluate, ["classes", "--checkpoint", str(run), "--seed", "-1"],
         "--seed: the seed is -1; give a whole"),
        (sample, ["--checkpoint", str(tmp_path), "--out", "x"], "is no run"),
        (sample, [*out, "--classes", "11"], "classes 0 to 9"),
        (sample, [*out, "--classes", "9" * 30], "classes 0 to 9"),
        (sample, [*out, "--classes", "cat"], "give numbers"),
        (sample, [*out, "--steps", "0"], "at least 1"),
        (sample, [*out, "--steps", "100000000"], "at most 1000"),
        (sample, [*out, "--count", "200000"], "2,000,000 pictures: at most 1,000,000"),
        (sample, [*out, "--sheet", "--count", "200000"], "at most 1,398,101 on a sheet of 8x8"),
        (sample, [*out, "--extrapolation", "nan"], "--extrapolation: nan is no finite number"),
        (sample, [*out, "--warp", "1", "inf", "1"], "--warp: inf is no finite number"),
        (evaluate, ["captions", "--guidance", "1e999"], "--guidance: 1e999 is no finite number"),
        (train, [*digits, *new, "--config.sample.columns=100000000"], r"a number in \[1, 100\]"),
        (train, [*digits, *new, '--config.sample.prompts=("a", " ")'], "has an empty one"),
        (sample, [*out, "--gap", "0", "1"], "gap is"),
        (sample, [*out, "--at-step", "9"], "no checkpoint of step 9"),
        (sample, [*out, "--stochastic", "2"], r"stochastic is 2.0; give a share in \[0, 1\]"),
        (sample, [*out, "--steps", "3", "--order", "2", "--stochastic", "1"], "deterministic"),
        (evaluate, ["classes", "--checkpoint", str(run), "--steps", "one"], "give numbers"),
        (evaluate, ["classes", "--checkpoint", str(run), "--count", "3"], "at least 200"),
        (evaluate, ["classes", "--checkpoint", str(run), "--count", str(10**12)], "most 100,000"),
        (evaluate, ["classes", "--checkpoint", str(run), "--steps", f"1,{10**12}"], "whole"),
        (evaluate, ["--checkpoint", str(run)], "`evaluate classes` for .* `evaluate captions` for"),
        (evaluate, [], "`evaluate classes` for"),
        *((evaluate, ["classes", "--checkpoint", "none", flag, f"{run}/config.json/x"],
           f"{flag} .*/config.json is a file: choose a folder")
          for flag in ("--json", "--plot", "--sheet")),
        (evaluate, ["classes", "--checkpoint", "x", "--json", str(run)], "--json .* is a folder"),
        (features, ["none", f"{run}/config.json/x"], "DST .*/config.json is a file"),
    ]
    for verb, arguments, message in cases:
        assert call(verb, *arguments) == 2, arguments
        [error] = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("error: ") and re.search(message, error), (arguments, error)
    assert not (tmp_path / "new").exists() and not (tmp_path / "out").exists()


def test_whoever_reads_may_have_enough():
    """As `| head` has: no traceback."""
    command = [sys.executable, "-m", "twinflow_jax.train", "--config", "configs/digits.py",
               "--help-config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "sent, said", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_while_a_step_compiles(tmp_path, sent, said):
    """Status and one line, no crash; XLA's threads are in the middle of something."""
    environment = os.environ | {"JAX_LOG_COMPILES": "1"}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    with subprocess.Popen(
        [sys.executable, "-m", "twinflow_jax.train", "--config", "configs/digits.py",
         "--workdir", str(tmp_path / "run")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:
        for line in process.stderr:
            if "Compiling jit(step)" in line:
                process.send_signal(sent)
                break
        after = process.stderr.read().strip().splitlines()
    assert process.returncode == 128 + sent
    assert [line for line in after if "jax._src" not in line and "Compiling" not in line] == [said]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


# Sends itself a signal where Python swallows what a handler raises: in a finaliser, while a module
# is imported or, for "", when nothing is.
SWALLOWED = """
import os, runpy, sys, time
from twinflow_jax.errors import run_verb
wanted, number, *sys.argv = sys.argv[1:]
class Gone:
    def __del__(self):
        os.kill(os.getpid(), int(number))
class Finder:
    def find_spec(self, name, *_):
        if name == wanted:
            Gone()
sys.meta_path.insert(0, Finder())
def main():
    Gone()
    time.sleep(600)
if wanted:
    runpy.run_module("twinflow_jax.train", run_name="__main__")
else:
    run_verb(main)
"""


@pytest.mark.parametrize("number, said", [(2, "interrupted"), (15, "terminated")])
@pytest.mark.parametrize("wanted", ["", "jax", "flax.linen", "orbax.checkpoint"])
def test_a_signal_is_never_swallowed(tmp_path, wanted, number, said):
    given = ["train", "--config", "configs/digits.py", "--workdir", str(tmp_path / "run"), *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, wanted, str(number), *given],
        capture_output=True, text=True, check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"{said}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("raises, status, last", [
    ("UserError('no')", 2, "error: no"), ("KeyError('no')", 1, "KeyError: 'no'"),
])
def test_an_error_ends_a_process_whose_threads_go_on(raises, status, last):
    program = f"""
import threading
from twinflow_jax.errors import UserError, run_verb
def main():
    threading.Thread(target=threading.Event().wait).start()
    raise {raises}
run_verb(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status and done.stderr.splitlines()[-1] == last


# Verbs that touch a device at different moments; each says the same.
EVERY_VERB = """
import sys
import jax.extend.backend
from twinflow_jax import encode, errors, evaluate, sample, train
errors.end = sys.exit
run, new, pipeline, platform = sys.argv[1:]
for verb, arguments in (
    (train, ["--config", "configs/digits.py", "--workdir", new]),
    (sample, ["--checkpoint", run, "--out", new]),
    (evaluate, ["classes", "--checkpoint", run]),
    (encode, ["README.md", new, "--pipeline", pipeline]),
):
    jax.extend.backend.clear_backends()
    jax.config.update("jax_platforms", platform)
    sys.argv = ["verb", *arguments]
    try:
        errors.run_verb(verb.main)
    except SystemExit as stop:
        print(stop.code)
"""


@pytest.mark.parametrize(
    "platform, way", [("cuda", r"install 'jax\[cuda"), ("tpu", r"install -e '.\[pod\]'")]
)
def test_a_backend_that_is_not_there_gets_one_line(run, tmp_path, platform, way):
    write_random("minilm_dit", tmp_path / "pipeline", seed=0)
    given = [str(run), str(tmp_path / "new"), str(tmp_path / "pipeline"), platform]
    done = subprocess.run(
        [sys.executable, "-c", EVERY_VERB, *given], env=os.environ | {"JAX_PLATFORMS": platform},
        capture_output=True, text=True, check=False,
    )
    assert done.stdout.split() == ["2"] * 4, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and len(set(lines)) == 1, done.stderr
    assert re.match(
        f"error: JAX's backend {platform} does not start .*'{platform}', and there is cpu: .*{way}",
        lines[0],
    )
    assert not (tmp_path / "new").exists()


ON_GOOGLES_MACHINE = """
import glob, runpy, sys
real, (devices, module) = glob.glob, sys.argv[1:3]
glob.glob = lambda pattern: real(pattern.replace("/sys/bus/pci/devices", devices))
sys.argv = sys.argv[2:]
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.parametrize("verb", ["train", "sample"])
def test_tpus_without_libtpu_are_not_left_idle(run, tmp_path, verb):
    """A v5e chip beside Google's network card; the card alone is no TPU."""
    new = str(tmp_path / "new")
    arguments = {
        "train": ["--config", "configs/digits.py", "--workdir", new],
        "sample": ["--checkpoint", str(run), "--out", new, "--classes", "3", "--count", "1"],
    }[verb]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    call = lambda: subprocess.run(
        [sys.executable, "-c", ON_GOOGLES_MACHINE, str(tmp_path / "pci"), f"twinflow_jax.{verb}",
         *arguments], env=environment, capture_output=True, text=True, check=False,
    )

    def plug(slot: str, device: str):
        (tmp_path / "pci" / slot).mkdir(parents=True)
        (tmp_path / "pci" / slot / "vendor").write_text("0x1ae0\n")
        (tmp_path / "pci" / slot / "device").write_text(device + "\n")

    plug("0000:00:04.0", "0x0042")
    if verb == "sample":
        assert call().returncode == 0
    plug("0000:00:05.0", "0x0063")
    done = call()
    assert done.returncode == 2, done.stderr
    *warnings, last = done.stderr.splitlines()
    assert re.match(r"error: JAX's backend tpu does not start .*install -e '.\[pod\]'", last)
    assert not any("Traceback" in line for line in warnings)


def test_few_style_without_noise_warns(run, tmp_path, capsys):
    call(
        sample, "--checkpoint", str(run), "--out", str(tmp_path), "--sheet",
        "--steps", "3", "--style", "few", "--stochastic", "0",
    )
    lines = capsys.readouterr().err.splitlines()
    [warning] = [line for line in lines if line.startswith("warning: ")]
    assert "gets worse with every step" in warning


def test_the_product_imports_no_oracle():
    """torch, diffusers and TensorFlow are for tests and benchmarks only."""
    pattern = re.compile(r"^\s*(import|from) (torch|diffusers|tensorflow)\b", re.MULTILINE)
    for file in (pathlib.Path(train.__file__).parent).rglob("*.py"):
        if file.name != "features.py":  # which converts a file of PyTorch's, this once
            assert not pattern.search(file.read_text()), file
