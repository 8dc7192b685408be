"""Files of adapters of all dialects, against merging in PyTorch; ours in the hands of others."""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import peft
import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import (
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)

from tests.checkpoints.folders import bits, convert
from tests.models import oracles
from tests.qwen_folder import randomise
from tests.sana_folder import without_class
from twinflow_jax import checkpoints, models, objectives
from twinflow_jax.checkpoints import adapting, dialects, imported, importing
from twinflow_jax.config import Run
from twinflow_jax.models import names

SEED = int(np.random.default_rng().integers(1 << 30))
FAMILIES = {
    "qwen_image": (QwenImageTransformer2DModel, QwenImagePipeline),
    "sana": (SanaTransformer2DModel, SanaPipeline),
}
ALL = "all"  # modules with low rank, of which these are left out:
PLAIN = re.compile(r"conv_depth")


class Base:
    """A small transformer of diffusers', its import, inputs, and what both make of them."""

    def __init__(self, family: str, folder: pathlib.Path):
        self.family, self.folder = family, folder
        kind, self.pipeline = FAMILIES[family]
        tiny = models.FAMILIES[family].text_to_image.tiny["transformer"]
        self.module = randomise(kind(**without_class(tiny)), SEED)
        self.module.save_pretrained(folder / "published")
        importing.import_folder(str(folder / "published"), str(folder / "base"), progress=False)
        self.checkpoint = imported.open_imported(folder / "base")
        self.network = self.checkpoint.network("transformer")
        self.config = self.checkpoint.config("transformer")
        self.modules = {
            name: module for name, module in self.module.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and not PLAIN.search(name)
        }
        rng = np.random.default_rng(SEED)
        normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
        cond = {"tokens": normal(2, 5, self.config.text_width), "mask": np.ones((2, 5), bool)}
        t = np.array([0.83, 0.37], np.float32)
        self.inputs = normal(2, 4, 4, self.config.latent_channels), t, t, cond
        self.before = self.theirs(self.module)

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        arrays = self.checkpoint.arrays("transformer")
        return {path: array.read().result() for path, array in arrays.items()}

    def theirs(self, module) -> np.ndarray:
        """PyTorch's output, channels last."""
        x, t, _, cond = jax.tree.map(torch.from_numpy, self.inputs)
        with torch.no_grad():
            if self.family == "sana":
                x = x.permute(0, 3, 1, 2)
                out = module(x, cond["tokens"], 1000 * t, encoder_attention_mask=cond["mask"])
                return out.sample.permute(0, 2, 3, 1).numpy()
            patches = x.reshape(2, 2, 2, 2, 2, -1).permute(0, 1, 3, 5, 2, 4).reshape(2, 4, -1)
            out = module(
                hidden_states=patches, timestep=t, img_shapes=[[(1, 2, 2)]] * 2,
                encoder_hidden_states=cond["tokens"],
            ).sample
            out = out.reshape(2, 2, 2, -1, 2, 2).permute(0, 1, 4, 2, 5, 3)
            return out.reshape(x.shape).numpy()

    def ours(self, *files: pathlib.Path, factor: float = 1.0) -> np.ndarray:
        """Our output with these files' adapters on the network."""
        opened = [adapting.open_adapter(file, self.network, self.config) for file in files]
        leaves = adapting.put([(one, factor) for one in opened], self.network, self.config)
        put_on = {path: leaf.read().result() for path, leaf in leaves.items()}
        params = names.unflatten(self.params | put_on)
        return np.asarray(oracles.compiled(self.network, self.config)(params, *self.inputs))

    def merged(self, truth: "Truth", factor: float = 1.0) -> np.ndarray:
        """PyTorch's output with the adapters in its weights."""
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            for name, (a, b, alpha) in truth.items():
                weight = module.get_submodule(name).weight
                delta = factor * alpha / len(a) * b @ a
                weight += delta.reshape(weight.shape)
        return self.theirs(module)


Truth = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # A, B, alpha by module


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> Base:
    print(f"seed {SEED}")
    return Base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Base:
    return Base("qwen_image", tmp_path_factory.mktemp("qwen"))


def truth_of(
    base: Base, alpha: float, rank: int = 4, leave_out: str = "nothing", other: str = "nothing"
) -> Truth:
    """Random adapters of all modules: of other rank where the name has `other` in it."""
    generator = torch.Generator().manual_seed(SEED)
    made = {}
    for name, module in base.modules.items():
        own = rank + 2 if other in name else rank
        out, into = module.weight.shape[:2]
        a = torch.randn(own, into, generator=generator) * into**-0.5
        b = torch.randn(out, own, generator=generator) * 0.5 * rank**-0.5 * rank / alpha
        if leave_out not in name:
            made[name] = a, b, alpha
    return made


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How a tool writes. header: prefix of the fields in the header's JSON, None for no such."""

    prefix: str
    pair: tuple[str, str]
    flat: bool = False
    tensors: torch.dtype | None = None
    header: str | None = None
    beside: bool = False
    dtype: torch.dtype = torch.float32
    name: str = "lora.safetensors"

    def write(self, folder: pathlib.Path, truth: Truth, convolutions=()) -> pathlib.Path:
        found, alphas, ranks = {}, {}, {}
        for module, (a, b, alpha) in truth.items():
            key = self.prefix + (module.replace(".", "_") if self.flat else module)
            ones = (1, 1) if module in convolutions else ()
            found[key + self.pair[0]] = a.to(self.dtype).reshape(*a.shape, *ones)
            found[key + self.pair[1]] = b.to(self.dtype).reshape(*b.shape, *ones).contiguous()
            if self.tensors:
                found[key + ".alpha"] = torch.tensor(alpha, dtype=self.tensors)
            alphas[module], ranks[module] = alpha, len(a)
        first = next(iter(truth))
        fields = {
            "r": ranks[first], "lora_alpha": alphas[first], "target_modules": list(truth),
            "rank_pattern": {k: r for k, r in ranks.items() if r != ranks[first]},
            "alpha_pattern": {k: a for k, a in alphas.items() if a != alphas[first]},
        }
        header = {"format": "pt"}
        if self.header is not None:
            told = {self.header + key: value for key, value in fields.items()}
            header["lora_adapter_metadata"] = json.dumps(told)
        folder.mkdir(exist_ok=True)
        if self.beside:
            (folder / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "bias": "none"} | fields)
            )
        safetensors.torch.save_file(found, folder / self.name, header)
        return folder / self.name


AB, DEFAULT = ((f".lora_A{x}.weight", f".lora_B{x}.weight") for x in ("", ".default"))
UP, OLD = (".lora_down.weight", ".lora_up.weight"), (".lora.down.weight", ".lora.up.weight")
PEFT = {"beside": True, "name": "adapter_model.safetensors"}
TOOLS = {
    "diffusers": Foreign("transformer.", AB, header="transformer."),
    "diffusers without": Foreign("transformer.", AB),
    "diffusers formerly": Foreign("transformer.", OLD),
    "lightning": Foreign("", UP, tensors=torch.float32),
    "musubi": Foreign("lora_unet_", UP, flat=True, tensors=torch.int64),
    "ai-toolkit": Foreign("diffusion_model.", AB, dtype=torch.float16),
    "simpletuner": Foreign("diffusion_model.", AB, tensors=torch.float32, header=""),
    "lycoris": Foreign("lycoris_", UP, flat=True, tensors=torch.bfloat16),
    "diffsynth": Foreign("", DEFAULT, dtype=torch.bfloat16),
    "diffsynth trainer": Foreign("pipe.dit.", DEFAULT),
    "onetrainer": Foreign("lora_transformer_", UP, flat=True, tensors=torch.float32),
    "checkpoint": Foreign("model.diffusion_model.", AB, tensors=torch.float32),
    "peft": Foreign("base_model.model.", AB, **PEFT),
    "twinflow": Foreign("base_model.model.transformer.", AB, **PEFT),
}


def has_alpha(tool: Foreign) -> bool:
    return bool(tool.tensors or tool.header is not None or tool.beside)


def convolutions(base: Base) -> list[str]:
    return [name for name, one in base.modules.items() if isinstance(one, torch.nn.Conv2d)]


def rounded(truth: Truth, dtype: torch.dtype) -> Truth:
    return {k: (a.to(dtype).float(), b.to(dtype).float(), c) for k, (a, b, c) in truth.items()}


def assert_moved(base: Base, output: np.ndarray, expected: np.ndarray) -> None:
    """As expected, and not as the base."""
    assert np.abs(output - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max()), SEED
    apart = np.linalg.norm(expected - base.before) / np.linalg.norm(base.before)
    assert apart > 1e-2, apart


@pytest.mark.parametrize("name", TOOLS)
def test_foreign_files_are_a_merge_in_torch(name, base, tmp_path):
    tool = TOOLS[name]
    truth = truth_of(base, alpha=2 if has_alpha(tool) else 4)
    file = tool.write(tmp_path / "theirs", truth, convolutions(base))
    expected = base.merged(rounded(truth, tool.dtype))
    assert_moved(base, base.ours(file), expected)
    assert_moved(base, base.ours(file.parent), expected)


@pytest.mark.parametrize("changes", [
    {"alpha": 8, "rank": 64}, {"alpha": 2, "other": "transformer_blocks.1.attn"},
    {"alpha": 2, "leave_out": "transformer_blocks.0."},
], ids=["8 at 64", "another rank", "half the layers"])
@pytest.mark.parametrize("name", ["diffusers", "musubi", "peft"])
def test_ranks_and_layers_that_differ(name, changes, qwen, tmp_path):
    truth = truth_of(qwen, **changes)
    file = TOOLS[name].write(tmp_path / "theirs", truth)
    assert_moved(qwen, qwen.ours(file), qwen.merged(truth))
