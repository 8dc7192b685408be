"""An OpenUni folder of safetensors, which `twinflow convert import` takes, out of four sources:

    hf download wusize/openuni openuni_l_internvl3_2b_sana_1_6b_512_hf_blip3o60k.pth --local-dir src
    hf download OpenGVLab/InternVL3-2B --local-dir src/internvl3
    hf download Efficient-Large-Model/Sana_1600M_512px_diffusers --local-dir src/sana
    hf download mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers --local-dir src/dc-ae
    python tools/openuni.py --openuni src/openuni_l_internvl3_2b_sana_1_6b_512_hf_blip3o60k.pth \\
        --internvl src/internvl3 --sana src/sana --vae src/dc-ae openuni512
    python -m twinflow_jax.convert import openuni512 checkpoints/openuni512

OpenUni is published as a pickle, which could run code: here its tensors alone are read
(torch.load, weights_only), and nowhere else. Of InternVL3 the language model is kept. Needs
PyTorch, this once. OpenUni's weights are under the S-Lab License 1.0: not for commercial use.
"""

import json
import pickle
from collections.abc import Iterable

import ml_dtypes
import numpy as np
from etils import epath

from twinflow_jax import files
from twinflow_jax.checkpoints import published, tensors
from twinflow_jax.errors import Parser, UserError, run_verb
from twinflow_jax.models import openuni
from twinflow_jax.models.openuni import text_encoder

OWN = ("connector.", "projector.", "meta_queries")  # what OpenUni has of the text encoder
BODY = "language_model.model."  # what InternVL3 has of it
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
             "added_tokens.json", "special_tokens_map.json")
CONNECTOR = {  # which no file of the sources says
    "hidden_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 24,
    "intermediate_size": 8960,
}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    for name, what in (
        ("openuni", "the .pth file"), ("internvl", "InternVL3-2B's folder"),
        ("sana", "Sana_1600M_512px_diffusers' folder"), ("vae", "the autoencoder's folder"),
    ):
        parser.add_argument(f"--{name}", type=files.path, required=True, metavar="SRC", help=what)
    parser.add_argument("target", type=files.path, metavar="DST")
    args = parser.parse_args()
    trained = read_pickle(epath.Path(args.openuni))
    assemble(trained, *map(epath.Path, (args.internvl, args.sana, args.vae, args.target)))
    print(f"{args.target} is whole: python -m twinflow_jax.convert import {args.target} DST")


def read_pickle(file: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of OpenUni's checkpoint, and nothing else of it.

    Raises:
      UserError: it is none, or PyTorch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError("PyTorch is not installed: pip install torch (any version)") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {
            key: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if tensor.dtype == torch.bfloat16 else tensor.numpy()
            for key, tensor in state.items()
        }
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from error
    except (EOFError, RuntimeError, AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} holds more than PyTorch tensors, or is truncated") from error


def assemble(
    trained: dict[str, np.ndarray], internvl: epath.Path, sana: epath.Path, vae: epath.Path,
    target: epath.Path, connector: dict[str, int] = CONNECTOR,
) -> None:
    """Writes the folder, all or nothing. trained: OpenUni's tensors.

    Raises:
      UserError: a source is not what it should be; or as `published.open_folder`, of the result.
    """
    drawing = "transformer."
    transformer = {
        key.removeprefix(drawing): array
        for key, array in trained.items() if key.startswith(drawing)
    }
    own = {key: array for key, array in trained.items() if key.startswith(OWN)}
    unknown = [key for key in trained if not key.startswith((drawing, *OWN))]
    if unknown or not transformer or not {"projector.weight", "meta_queries"} <= own.keys():
        why = f"it holds {unknown[0]}" if unknown else "it lacks some of its parts"
        raise UserError(f"the .pth file is not OpenUni's ({why}): give the one that is named above")
    model = read_json(internvl / "config.json").get("llm_config")
    if not isinstance(model, dict):
        raise UserError(f"{internvl}/config.json has no llm_config: give InternVL3-2B's folder")
    known = {*text_encoder.NUMBERS, *text_encoder.ONLY, *text_encoder.OTHERS, "rope_scaling"}
    told = {
        "architectures": [text_encoder.ARCHITECTURE],
        "llm_config": {key: value for key, value in model.items() if key in known},
        "connector": connector, "num_queries": len(own["meta_queries"]),
        "caption_channels": len(own["projector.weight"]),
    }
    encoder = own | language_model(internvl)
    decoder = {file.name: file for file in vae.glob("*.safetensors")}
    [pipeline] = openuni.FAMILY.text_to_image.pipelines
    bytes_of = lambda parts: sum(part.nbytes for part in parts.values())
    needed = bytes_of(transformer) + bytes_of(encoder)
    needed += sum(file.stat().length for file in decoder.values())
    with files.whole_folder(target, needed):
        save(target / "transformer/diffusion_pytorch_model.safetensors", transformer)
        copy(sana / "transformer", target / "transformer", ["config.json"])
        save(target / "text_encoder/model.safetensors", encoder)
        files.write(target / "text_encoder/config.json", as_json(told))
        copy(sana / "scheduler", target / "scheduler", ["scheduler_config.json"])
        there = [name for name in TOKENIZER if (internvl / name).exists()]
        copy(internvl, target / "tokenizer", there)
        copy(vae, target / "vae", ["config.json", *decoder])
        files.write(target / "model_index.json", as_json({"_class_name": pipeline}))
        for name in openuni.NETWORKS:
            published.open_folder(str(target / name), "openuni")


def language_model(folder: epath.Path) -> dict[str, tensors.Tensor]:
    """InternVL3's, without its output head; not read yet."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= tensors.read_header(file)
    found = {key: tensor for key, tensor in found.items() if key.startswith(BODY)}
    if not found:
        raise UserError(f"{folder} holds no safetensors with {BODY}*: give InternVL3-2B's folder")
    return found


def save(file: epath.Path, parts: dict[str, np.ndarray | tensors.Tensor]) -> None:
    """Writes tensors, of which those that lie in files are read one after the other."""
    parts = dict(sorted(parts.items()))
    arrays = (p if isinstance(p, np.ndarray) else p.read() for p in parts.values())
    tensors.write(file, {key: (part.dtype, part.shape) for key, part in parts.items()}, arrays)


def copy(source: epath.Path, target: epath.Path, names: Iterable[str]) -> None:
    for name in names:
        try:
            target.mkdir(parents=True, exist_ok=True)
            (source / name).copy(target / name)
        except FileNotFoundError as error:
            raise UserError(f"{source} lacks {name}: download it whole") from error


def read_json(file: epath.Path) -> dict:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


if __name__ == "__main__":
    run_verb(main)
