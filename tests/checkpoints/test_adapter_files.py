"""Files of adapters of all dialects, against merging in PyTorch; ours in the hands of others."""

import copy
import dataclasses
import functools
import inspect
import itertools
import json
import os
import pathlib
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

from tests.checkpoints.folders import SEED, convert
from tests.models import oracles
from tests.qwen_folder import randomise
from tests.sana_folder import without_class
from twinflow_jax import convert as verb
from twinflow_jax import models
from twinflow_jax.checkpoints import adapter_export, adapter_files, dialects, imported, importing
from twinflow_jax.models import names

FAMILIES = {
    "qwen_image": (QwenImageTransformer2DModel, QwenImagePipeline),
    "sana": (SanaTransformer2DModel, SanaPipeline),
}


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
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "conv_depth" not in name
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
        opened = [
            adapter_files.open_adapter(file, self.network, self.config, True) for file in files
        ]
        leaves = adapter_files.put([(one, factor) for one in opened], self.network, self.config)
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
def small(request, tmp_path_factory) -> Base:
    print(f"seed {SEED}")
    return Base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Base:
    return Base("qwen_image", tmp_path_factory.mktemp("qwen"))


def truth_of(
    small: Base, alpha: float, rank: int = 4, leave_out: str = "nothing", other: str = "nothing"
) -> Truth:
    """Random adapters of all modules: of other rank where the name has `other` in it."""
    generator = torch.Generator().manual_seed(SEED)
    made = {}
    for name, module in small.modules.items():
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


def convolutions(small: Base) -> list[str]:
    return [name for name, one in small.modules.items() if isinstance(one, torch.nn.Conv2d)]


def rounded(truth: Truth, dtype: torch.dtype) -> Truth:
    return {k: (a.to(dtype).float(), b.to(dtype).float(), c) for k, (a, b, c) in truth.items()}


def assert_moved(small: Base, output: np.ndarray, expected: np.ndarray) -> None:
    """As expected, and not as the base."""
    assert np.abs(output - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max()), SEED
    apart = np.linalg.norm(expected - small.before) / np.linalg.norm(small.before)
    assert apart > 1e-2, apart


@pytest.mark.parametrize("name", TOOLS)
def test_foreign_files_are_a_merge_in_torch(name, small, tmp_path):
    tool = TOOLS[name]
    truth = truth_of(small, alpha=2 if has_alpha(tool) else 4)
    file = tool.write(tmp_path / "theirs", truth, convolutions(small))
    expected = small.merged(rounded(truth, tool.dtype))
    assert_moved(small, small.ours(file), expected)
    assert_moved(small, small.ours(file.parent), expected)


@pytest.mark.parametrize("changes", [
    {"alpha": 8, "rank": 64}, {"alpha": 2, "other": "transformer_blocks.1.attn"},
    {"alpha": 2, "leave_out": "transformer_blocks.0."},
], ids=["8 at 64", "another rank", "half the layers"])
@pytest.mark.parametrize("name", ["diffusers", "musubi", "peft"])
def test_ranks_and_layers_that_differ(name, changes, qwen, tmp_path):
    truth = truth_of(qwen, **changes)
    file = TOOLS[name].write(tmp_path / "theirs", truth)
    assert_moved(qwen, qwen.ours(file), qwen.merged(truth))


def comfyui(module: torch.nn.Module, file: pathlib.Path) -> torch.nn.Module:
    """ComfyUI's rule: its names of modules and halves, alpha / rank or 1; it reads no header, and
    passes over what it does not know."""
    module, found = copy.deepcopy(module), safetensors.torch.load_file(file)
    halves = (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"),
              ("lora_B.default.weight", "lora_A.default.weight"))
    for key, weight in list(module.state_dict().items()):
        name = key.removesuffix(".weight")
        flat = name.replace(".", "_")
        spelled = (f"diffusion_model.{name}", f"transformer.{name}", name, f"lora_unet_{flat}",
                   f"lycoris_{flat}")
        for one in spelled if key.endswith(".weight") else ():
            for up, down in halves:
                if f"{one}.{up}" in found:
                    a, b = (found[f"{one}.{end}"].float().flatten(1) for end in (down, up))
                    alpha = found.get(f"{one}.alpha")
                    scale = 1.0 if alpha is None else float(alpha) / len(a)
                    with torch.no_grad():
                        weight += scale * (b @ a).reshape(weight.shape)
    return module


def put_on(
    module: torch.nn.Module, pipeline: type, form: str, file: pathlib.Path
) -> torch.nn.Module:
    """The module, changed in place, as a pipeline of diffusers', or peft, loads the file."""
    if form == "peft":
        peft.PeftModel.from_pretrained(module, file.parent)
        return module
    parts = dict.fromkeys(inspect.signature(pipeline).parameters) | {"transformer": module}
    pipeline(**parts).load_lora_weights(file.parent, weight_name=file.name)
    return module


@pytest.fixture(scope="module")
def kept(small) -> tuple[pathlib.Path, Truth]:
    """An imported adapter, of alpha that is not the rank and a module of another."""
    truth = truth_of(small, alpha=3, other="to_q")
    file = TOOLS["musubi"]
    file = dataclasses.replace(file, tensors=torch.float32).write(
        small.folder / "theirs", truth, convolutions(small)
    )
    assert convert("adapter", "import", file, small.folder / "kept", "--base",
                   small.folder / "base") == 0
    return small.folder / "kept", truth


@pytest.mark.parametrize("form", dialects.FORMATS)
def test_ours_in_other_hands(form, small, kept, tmp_path, capsys):
    folder, truth = kept
    assert tuple(dialects.FORMATS) == verb.FORMATS
    status = convert("adapter", "export", folder, tmp_path / "out", "--format", form)
    if form not in (models.FAMILIES[small.family].adapter_forms or dialects.FORMATS):
        assert status == 2 and "no tool loads adapters of sana" in capsys.readouterr().err
        return
    assert status == 0
    expected = small.merged(truth)
    [file] = (tmp_path / "out").glob("*.safetensors")
    with_it = put_on(copy.deepcopy(small.module), small.pipeline, form, file)
    assert_moved(small, small.theirs(with_it), expected)
    if form != "peft":
        assert_moved(small, small.theirs(comfyui(small.module, file)), expected)

    with safetensors.safe_open(file, "pt") as opened:
        keys, header = list(opened.keys()), opened.metadata()
        ranks = {len(opened.get_tensor(k)) for k in keys if k.endswith((AB[0], UP[0]))}
        assert len(ranks) == 2
        alphas = {k for k in keys if k.endswith(".alpha")}
        assert not alphas or form == "kohya"
        for key in alphas:
            down = opened.get_tensor(key.removesuffix(".alpha") + UP[0])
            assert opened.get_tensor(key).dtype == torch.float32
            assert float(opened.get_tensor(key)) == len(down)
    told = json.loads(header.get("lora_adapter_metadata", "{}"))
    assert bool(told) == (form == "diffusers")
    assert told.get("transformer.r") == told.get("transformer.lora_alpha")
    assert told.get("transformer.rank_pattern") == told.get("transformer.alpha_pattern")


def test_the_same_bytes_again(small, kept, tmp_path):
    """What we wrote comes back from import and export in the same format, in any process."""
    forms = models.FAMILIES[small.family].adapter_forms or tuple(dialects.FORMATS)
    dtypes = itertools.cycle(("float32", "bfloat16"))
    wanted = list(zip(forms, dtypes, strict=False))
    first = lambda form, dtype: tmp_path / f"{form}_{dtype}" / "adapter"
    for form, dtype in wanted:
        options = "--format", form, "--dtype", dtype
        assert convert("adapter", "export", kept[0], first(form, dtype), *options) == 0
        again = tmp_path / f"{form}_{dtype}" / "again"
        assert convert("adapter", "import", first(form, dtype), again, "--base",
                       small.folder / "base") == 0
        for back, more in (("same", ()), ("adapter", ("--format", form))):
            target = tmp_path / f"{form}_{dtype}_{back}" / "adapter"
            assert convert("adapter", "export", again, target, *more) == 0
            assert_same_files(target, first(form, dtype), ignore=back == "same")
    if small.family == "sana":
        return
    program = """if True:
        import sys
        from twinflow_jax.checkpoints import adapter_export
        for where in sys.argv[2:]:
            form, dtype = where.rpartition("/")[2].split("_")
            adapter_export.export_imported(sys.argv[1], f"{where}/adapter", form, dtype)"""
    started = []
    for seed in "01":
        targets = [str(tmp_path / seed / f"{form}_{dtype}") for form, dtype in wanted]
        started.append(subprocess.Popen(
            [sys.executable, "-c", program, kept[0], *targets],
            env=os.environ | {"PYTHONHASHSEED": seed},
        ))
    assert [process.wait() for process in started] == [0, 0]
    for seed in "01":
        for form, dtype in wanted:
            there = tmp_path / seed / f"{form}_{dtype}" / "adapter"
            assert_same_files(there, first(form, dtype))


def assert_same_files(ours: pathlib.Path, theirs: pathlib.Path, ignore: bool = False) -> None:
    """ignore: their README, and the name of the file of adapters."""
    files = lambda folder: [
        file.read_bytes() for file in sorted(folder.iterdir())
        if not (ignore and file.suffix == ".md")
    ]
    assert files(ours) == files(theirs)


@pytest.mark.parametrize("name", ["musubi", "simpletuner", "diffsynth", "twinflow"])
def test_foreign_files_come_back_as_they_were(name, qwen, tmp_path):
    tool = TOOLS[name]
    file = tool.write(tmp_path / "theirs", truth_of(qwen, 2, leave_out="transformer_blocks.0."))
    small = qwen.folder / "base"
    assert convert("adapter", "import", file, tmp_path / "kept", "--base", small) == 0
    assert convert("adapter", "export", tmp_path / "kept", tmp_path / "back") == 0
    [back] = (tmp_path / "back").glob("*.safetensors")
    assert back.read_bytes() == file.read_bytes()
    assert (tmp_path / "back/adapter_config.json").exists() == tool.beside


def test_merging_and_what_it_costs(small, kept, tmp_path, capsys):
    folder, truth = kept
    target = tmp_path / "merged"
    assert convert("adapter", "merge", small.folder / "base", f"{folder}:-0.5", target) == 0
    assert " cost 0.0% " in capsys.readouterr().out
    merged = imported.open_imported(target)
    assert merged.record["networks"] == small.checkpoint.record["networks"]
    params = names.unflatten(
        {path: array.read().result() for path, array in merged.arrays("transformer").items()}
    )
    output = oracles.compiled(small.network, small.config)(params, *small.inputs)
    assert_moved(small, np.asarray(output), small.merged(truth, -0.5))
    assert_moved(small, small.ours(folder, factor=-0.5), small.merged(truth, -0.5))

    narrow = tmp_path / "narrow"
    importing.import_folder(str(small.folder / "published"), str(narrow), "bfloat16", 1, False)
    weak = adapter_files.open_for(small.checkpoint, folder)
    costs = [
        adapter_export.merge(
            imported.open_imported(narrow), weak, factor, tmp_path / str(factor), False
        )
        for factor in (1.0, 0.01)
    ]
    assert costs[0] < 0.03 and 0.1 < costs[1] < 0.9, costs


def test_several_add_up(qwen, tmp_path):
    one, two = truth_of(qwen, 2), truth_of(qwen, 4, rank=8, leave_out="transformer_blocks.0.")
    two = {name: (a.flip(0) + 0.01, b, alpha) for name, (a, b, alpha) in two.items()}
    files = [
        TOOLS["diffusers"].write(tmp_path / str(number), truth)
        for number, truth in enumerate((one, two))
    ]
    both = {
        name: (a, b, alpha) if name not in two else (
            torch.cat([a, two[name][0]]), torch.cat([b * alpha / 4, two[name][1] * 4 / 8], 1), 12
        )
        for name, (a, b, alpha) in one.items()
    }
    assert_moved(qwen, qwen.ours(*files), qwen.merged(both))
