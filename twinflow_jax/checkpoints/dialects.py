"""Files of adapters (LoRA), as tools spell them: read from all dialects, written in four.

An adapter of a module W (out, in) is A (rank, in) and B (out, rank); it adds alpha / rank B A.
Tools differ in what they write before a module's name and after it, in whether its dots stay, and
in where alpha is: a tensor of each module, the header's JSON, a file beside, or nowhere, where it
is the rank. A file is of one dialect, and is recognised by its keys.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Float

from twinflow_jax import files
from twinflow_jax.checkpoints import tensors
from twinflow_jax.errors import UserError, few, reason

# What stands before a module's name, and whether the name's dots are then underscores.
PREFIXES = {
    "base_model.model.transformer.": False,  # peft, of TwinFlow's wrapper
    "base_model.model.": False,  # peft
    "model.diffusion_model.": False,
    "diffusion_model.": False,  # ComfyUI, ai-toolkit, SimpleTuner
    "transformer.": False,  # diffusers
    "pipe.dit.": False,  # DiffSynth
    "lora_unet_": True,  # kohya, musubi
    "lora_transformer_": True,  # OneTrainer
    "lycoris_": True,  # SimpleTuner
    "": False,  # Lightning, DiffSynth
}
# What stands after it, of A and of B.
PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),  # peft, diffusers, ai-toolkit, SimpleTuner
    (".lora_A.default.weight", ".lora_B.default.weight"),  # DiffSynth, peft in memory
    (".lora_down.weight", ".lora_up.weight"),  # kohya, musubi, Lightning
    (".lora.down.weight", ".lora.up.weight"),  # diffusers, formerly
)
ALPHA = ".alpha"
ENDS = {end: (part, pair) for pair in PAIRS for part, end in zip("ab", pair, strict=True)} | {
    ALPHA: ("alpha", None)
}
HEADER = "lora_adapter_metadata"  # of diffusers, SimpleTuner: peft's config as JSON
NETWORK = "transformer."  # begins its fields in diffusers' header
BESIDE = "adapter_config.json"  # the same, in peft's own folders
OURS = "twinflow_"  # begins what our headers say besides
FEW = "few steps"  # what those of `twinflow_sampler` are for that learn jumps
WHOLE = "whole.safetensors"  # beside adapters of ours: the weights that trained whole with them

TEXT_ENCODER = re.compile(r"(base_model\.model\.)?text_encoders?(_\d)?\.|lora_te\d?_")
UNSUPPORTED = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector|\.magnitude"),
    "LoKr": re.compile(r"lokr_"),
    "LoHa": re.compile(r"hada_"),
    "Tucker": re.compile(r"lora_mid"),
    "difference of whole weights": re.compile(r"\.(diff|diff_b|set_weight|reshape_weight)$"),
    "bias": re.compile(r"(\.|lora_)bias$"),
}
FLOATS = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Format:
    """How we write: prefix and pair as above; alpha, which is the rank, in the "header", in
    "tensors", in a file "beside", or nowhere. file: its name, where readers want one."""

    prefix: str
    pair: tuple[str, str]
    alpha: str = ""
    file: str = ""


FORMATS = {
    "diffusers": Format("transformer.", PAIRS[0], "header", "pytorch_lora_weights.safetensors"),
    "comfyui": Format("diffusion_model.", PAIRS[0]),
    "kohya": Format("lora_unet_", PAIRS[2], "tensors"),
    "peft": Format("base_model.model.", PAIRS[0], "beside", "adapter_model.safetensors"),
}


@runtime_checkable
class LowRank(Protocol):
    """A module's adapter. shape: (rank, in, out)."""

    shape: tuple[int, int, int]

    def read(self) -> tuple[Float[np.ndarray, "rank in"], Float[np.ndarray, "out rank"]]:
        """A and B in float32, scale 1."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """The LowRank of a file; scale: what it means its B A to be multiplied with."""

    a: tensors.Tensor
    b: tensors.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.a.shape[:2], self.b.shape[0]

    def read(self) -> tuple[Float[np.ndarray, "rank in"], Float[np.ndarray, "out rank"]]:
        a, b = (t.read().reshape(t.shape[:2]).astype(np.float32) for t in (self.a, self.b))
        return a, b * np.float32(self.scale)


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What a file holds. low: by published name of the module. texts: of its header. notes: what
    was taken for granted or left out, a line each."""

    path: epath.Path
    low: dict[str, Stored]
    texts: dict[str, str]
    notes: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of its tensors, float32 where they differ."""
        found = {t.dtype for low in self.low.values() for t in (low.a, low.b)}
        return found.pop() if len(found) == 1 else np.dtype(np.float32)

    @property
    def ours(self) -> dict[str, str]:
        """What a header of ours says of where the adapter comes from; {} of others' files."""
        return ours(self.texts)


def ours(texts: Mapping[str, str]) -> dict[str, str]:
    return {key: text for key, text in texts.items() if key.startswith(OURS)}


def find(source: epath.PathLike) -> epath.Path:
    """The file of adapters that a path is, or the one in a folder.

    Raises:
      UserError: there is none, or several.
    """
    path = epath.Path(source)
    if not path.is_dir():
        return path
    there = {file.name: file for file in path.iterdir() if file.name.endswith(".safetensors")}
    there.pop(WHOLE, None)
    known = [there[form.file] for form in FORMATS.values() if form.file in there]
    found = known or list(there.values())
    if len(found) != 1:
        raise UserError(f"{path} holds {len(found)} files of adapters: give the one that you mean")
    return found[0]


def read(
    source: epath.PathLike, modules: Mapping[str, tuple[int, int]], alpha: float | None = None
) -> AdapterFile:
    """A file of adapters, or the folder of one, checked; tensors are read when they are asked for.

    modules: (in, out) of all that may have one, by published name. alpha: of all modules, in place
    of what the file says.
    Raises:
      UserError: it is no such file, or holds what these modules cannot take; all is listed.
    """
    path = find(source)
    found, texts = tensors.read_header(path), tensors.metadata(path)
    wrong: dict[str, list[str]] = collections.defaultdict(list)
    text = [key for key in found if TEXT_ENCODER.match(key)]
    keys = _by_module([key for key in found if key not in text], modules, wrong)
    if not keys and not wrong:
        raise UserError(f"{path} holds no adapter of this network's modules")
    config = _config(path, texts, wrong)
    notes = [f"{len(text)} keys of text encoders are left out"] if text else []
    if alpha is not None:
        alphas = dict.fromkeys(keys, alpha)
    elif not (alphas := _alphas(found, keys, config, wrong)) and not ours(texts):
        notes.append("no alpha is in it: taken for the rank, scale 1 (import --alpha overrides)")
    low = {}
    for name, parts in keys.items():
        if {"a", "b"} <= parts.keys():
            a, b = (found[parts[part]] for part in "ab")
            if _fits(parts["a"], a, b, modules[name], wrong):
                rank = a.shape[0]
                per = math.sqrt(rank) if config.get("use_rslora") else rank
                low[name] = Stored(a, b, alphas[name] / per if name in alphas else 1.0)
        else:
            wrong["half a pair, of which this is missing"].append(_partner(parts))
    if any(wrong.values()):
        lines = (f"{what} ({len(keys)}): {few(keys)}" for what, keys in wrong.items() if keys)
        raise UserError("\n  ".join((f"{path} cannot be used:", *lines)))
    return AdapterFile(path, low, texts, tuple(notes))


def _by_module(
    found: Iterable[str], modules: Collection[str], wrong: dict[str, list[str]]
) -> dict[str, dict[str, str]]:
    """The keys of each module's "a", "b" and "alpha", by its published name; the rest is wrong."""
    flat = {name.replace(".", "_"): name for name in modules}
    keys: dict[str, dict[str, str]] = collections.defaultdict(dict)
    before, after = {}, {}  # prefixes and pairs, with the first key of each
    unknown, seen = {}, set()
    for key in found:
        if kind := next((kind for kind, one in UNSUPPORTED.items() if one.search(key)), None):
            wrong[f"{kind}, not supported: merge it with its own tool"].append(key)
            continue
        prefix = _prefix(key)
        end = next((end for end in ENDS if key.endswith(end)), "")
        if not end:
            wrong["keys of no adapter"].append(key)
            continue
        part, pair = ENDS[end]
        before.setdefault(prefix, key)
        if pair:
            after.setdefault(pair, key)
        spelled = key[len(prefix) : len(key) - len(end)]
        seen.add(spelled)
        name = flat.get(spelled) if PREFIXES[prefix] else spelled
        if name in modules:
            keys[name][part] = key
        else:
            unknown.setdefault(spelled, key)
    for ways in (before, after):
        if len(ways) > 1:
            wrong["several spellings in one file"] += ways.values()
    if unknown:
        wrong[f"{len(unknown)} of {len(seen)} modules are not of this network"] += unknown.values()
    return dict(keys)


def _prefix(key: str) -> str:
    return next(prefix for prefix in PREFIXES if key.startswith(prefix))


def _partner(parts: Mapping[str, str]) -> str:
    """The key that a module lacks, of its pair; parts: its other keys."""
    key = parts.get("a") or parts.get("b")
    if key is None:
        return f"A and B of {parts['alpha']}"
    pair = next(pair for pair in PAIRS for end in pair if key.endswith(end))
    have, lack = pair if "a" in parts else pair[::-1]
    return key.removesuffix(have) + lack


def _alpha_key(parts: Mapping[str, str]) -> str:
    """The key that a module's alpha would have."""
    key = parts.get("a") or parts["b"]
    return key.removesuffix(next(end for end in ENDS if key.endswith(end))) + ALPHA


def _fits(
    key: str, a: tensors.Tensor, b: tensors.Tensor, module: tuple[int, int],
    wrong: dict[str, list[str]],
) -> bool:
    """Whether both have a module's shape; what they have else is wrong."""
    into, out = module
    flat = all(len(t.shape) >= 2 and math.prod(t.shape[2:]) == 1 for t in (a, b))
    if not flat or a.shape[1] != into or b.shape[0] != out:
        wrong["shapes of another network: an adapter of another base?"].append(
            f"{key} {list(a.shape)}, its partner {list(b.shape)}, for {into} to {out} channels"
        )
    elif a.shape[0] != b.shape[1] or not a.shape[0]:
        wrong["ranks that differ or are 0"].append(f"{key} {a.shape[0]}, {b.shape[1]}")
    elif {a.dtype.name, b.dtype.name}.difference(FLOATS):
        wrong[f"dtypes that are not {', '.join(FLOATS)}"].append(f"{key} {a.dtype}, {b.dtype}")
    else:
        return True
    return False


def _config(
    path: epath.Path, texts: Mapping[str, str], wrong: dict[str, list[str]]
) -> dict[str, Any]:
    """peft's config of a file, in its header or beside it; {} where there is none."""
    beside = path.parent / BESIDE if path.name == FORMATS["peft"].file else None
    where = "the header" if HEADER in texts else BESIDE
    try:
        none = beside is None or not beside.exists()
        text = texts.get(HEADER) or ("{}" if none else beside.read_text())
        config = dict(json.loads(text))
        if where != BESIDE:  # of all networks of a pipeline, each with its name, or of one
            own = {k.removeprefix(NETWORK): v for k, v in config.items() if k.startswith(NETWORK)}
            config = own or {key: value for key, value in config.items() if "." not in key}
        for key, usual in (("peft_type", "LORA"), ("use_dora", False), ("bias", "none")):
            if config.get(key, usual) not in (usual, None):
                wrong[f"{where} asks for what is not supported"].append(f"{key}={config[key]}")
        patterns = dict(config.get("alpha_pattern") or {})
        for pattern, value in [*patterns.items(), ("", config.get("lora_alpha") or 0)]:
            re.compile(pattern)
            if not math.isfinite(float(value)):
                raise ValueError(f"alpha {value}")
        return config
    except (ValueError, TypeError, AttributeError, OSError, re.error) as error:
        raise UserError(f"{path}: {where} holds no config of peft's ({reason(error)})") from error


def _alphas(
    found: Mapping[str, tensors.Tensor], keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any], wrong: dict[str, list[str]],
) -> dict[str, float]:
    """Each module's alpha, as tensors or a config say it; {} where nothing does."""
    told = {}
    for name, parts in keys.items():
        if "alpha" in parts:
            value = found[parts["alpha"]].read().astype(np.float64)
            told[name] = float(value.reshape(-1)[0]) if value.size == 1 else math.nan
            if not math.isfinite(told[name]):
                wrong["alpha that is no finite number"].append(parts["alpha"])
    if told:
        wrong["modules without alpha, where others have it: --alpha gives all one"] += [
            _alpha_key(parts) for name, parts in keys.items() if name not in told
        ]
    if config.get("lora_alpha") is None:
        return told
    patterns = config.get("alpha_pattern") or {}
    of_config = {
        name: float(next(
            (value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", name)),
            config["lora_alpha"],
        ))
        for name in keys
    }
    wrong["alpha is another in the tensors than in the config: --alpha gives all one"] += [
        f"{keys[name]['alpha']} {value:g}, {of_config[name]:g}"
        for name, value in told.items() if value != of_config[name]
    ]
    return of_config


def write(
    folder: epath.Path, form: str, low: Mapping[str, LowRank], ones: Mapping[str, int],
    dtype: np.dtype, said: Mapping[str, str],
) -> epath.Path:
    """Writes adapters of scale 1 to a folder, the same bytes each time; returns the file.

    form: one of FORMATS. low: by published name of the module; ones: trailing axes of length 1 that
    its weight has. said: texts for the header.
    """
    how, dtype = FORMATS[form], np.dtype(dtype)
    made: dict[str, tuple[np.dtype, tuple[int, ...], Callable[[], np.ndarray]]] = {}
    for name, one in low.items():
        (rank, into, out), more = one.shape, (1,) * ones[name]
        key = how.prefix + (name.replace(".", "_") if PREFIXES[how.prefix] else name)
        made[key + how.pair[0]] = dtype, (rank, into, *more), lambda one=one: one.read()[0]
        made[key + how.pair[1]] = dtype, (out, rank, *more), lambda one=one: one.read()[1]
        if how.alpha == "tensors":
            made[key + ALPHA] = np.dtype(np.float32), (), lambda rank=rank: np.array(rank)
    keys = sorted(made, key=lambda key: (-made[key][0].itemsize, key))

    def arrays() -> Iterator[np.ndarray]:
        for key in keys:
            kind, shape, make = made[key]
            yield tensors.contiguous(make()).astype(kind, copy=False).reshape(shape)

    ranks = {name: one.shape[0] for name, one in sorted(low.items())}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = {"r": most, "lora_alpha": most, "target_modules": list(ranks)}
    config |= {"rank_pattern": others, "alpha_pattern": others} if others else {}
    texts = {**tensors.PLAIN, **said}
    if how.alpha == "header":
        named = {NETWORK + key: value for key, value in config.items()}
        texts[HEADER] = json.dumps(named, sort_keys=True)
    elif how.alpha == "beside":
        text = json.dumps({"peft_type": "LORA"} | config, sort_keys=True, indent=2)
        files.write(folder / BESIDE, text.encode())
    file = folder / (how.file or f"{folder.name}.safetensors")
    shapes = {key: made[key][:2] for key in keys}
    tensors.write(file, shapes, arrays(), dict(sorted(texts.items())))
    return file
