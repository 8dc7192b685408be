"""Training of adapters against PyTorch: diffusers' Qwen-Image with peft, draw by draw.

JAX computes in float32, PyTorch in float64 from the same float32 weights, data and draws.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_reference as reference
from peft import LoraConfig, inject_adapter_in_model

from tests.models import oracles
from tests.models.qwen_image import test_transformer as qwen
from twinflow_jax import models, objectives
from twinflow_jax.config import Optimizer, Train
from twinflow_jax.models import names, qwen_image
from twinflow_jax.models.adapters import Adapter, is_adapter
from twinflow_jax.training import ema, optimizers, state, step

NETWORK = qwen_image.NETWORKS["transformer"]
SMALL = qwen_image.transformer.Config(
    sample_shape=(4, 4, 16), layers=2, heads=2, head_dim=16, text_width=12, rope_axes=(4, 6, 6)
)
RANK, ROWS, PROMPTS, LENGTHS = 4, 4, 3, (3, 1, 4)
RATE, BETAS, STEPS = 1e-4, (0.9, 0.99), 8
DEAD = {  # of the last block, whose text goes nowhere
    f"layers/text/{name}/lora_{half}" for half in "ab"
    for name in ("query", "out", "mlp_hidden", "mlp_out")
}
ORDER_2 = {"order": 2, "teacher_decay": 0.99}
ORDER_1 = {"order": 1, "teacher_decay": 1.0, "guidance": 4.0, "target_time": "zero"}


class Network(torch.nn.Module):
    """diffusers' transformer as `torch_reference` calls networks: a label is a prompt's number."""

    def __init__(self, module: torch.nn.Module, cond: dict):
        super().__init__()
        self.module, self.cond = module, cond

    def forward(self, x_t, t, r, labels):
        cond = {k: a[labels] for k, a in self.cond.items()} | {"references": ()}
        packed = qwen.theirs(self.module, x_t, t, r, cond)
        rows, height, width, channels = x_t.shape
        patches = packed.view(rows, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 1, 4, 2, 5, 3).reshape(x_t.shape)


def keys_of(path: str, table: names.NameTable) -> tuple[names.Rule, list[str]]:
    """The rule behind a trained leaf, and its names in peft, one for each layer."""
    kernel = path.removesuffix("lora_a").removesuffix("lora_b") + "kernel"
    rule = next(rule for rule in table.rules if rule.path in (path, kernel))
    if not is_adapter(path):
        return rule, table.keys(rule)
    half = f"lora_{path[-1].upper()}.default.weight"
    return rule, [f"{key.removesuffix('weight')}{half}" for key in table.keys(rule)]


def to_ours(path: str, table: names.NameTable, of) -> np.ndarray:
    """A trained leaf in our layout; of: a published name -> PyTorch's array."""
    rule, keys = keys_of(path, table)
    # An adapter's output axis is the kernel's, its input axis as it is.
    ours = np.transpose if path.endswith("lora_a") else rule.ours
    leaves = [ours(of(key)) for key in keys]
    return np.stack(leaves) if rule.stacked else leaves[0]


def moved_by(seed: int, module: torch.nn.Module, fresh: bool = False) -> torch.nn.Module:
    """A copy with other random adapters; fresh: with those that add nothing."""
    module, draw = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
                if fresh and "lora_B" in key:
                    parameter.zero_()
    return module


@pytest.fixture(params=[
    ("half_r", ORDER_2), ("half_r", ORDER_1), ("second_embedder", ORDER_2), ("gated", ORDER_1),
], ids=lambda case: f"{case[0]}-{case[1]['order']}")
def case(request):
    """(model, objective, params, teacher, ours of data, torch student, torch teacher)."""
    sees, fields = request.param
    config = dataclasses.replace(SMALL, time_conditioning=sees)
    table, second = NETWORK.table(config), config.times.second
    module = qwen.oracle(config)
    base = oracles.converted(module, NETWORK, config)
    peft = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(qwen_image.RELEASED))
    module = inject_adapter_in_model(peft, module)
    for key, parameter in module.named_parameters():
        trains = config.times.suffix and f"time_text_embed{config.times.suffix}." in key
        parameter.requires_grad_(bool(trains) or "lora_" in key)

    whole = (f"{second}/.*",) if second else ()
    model = models.build(config, adapter=Adapter(RANK, ("released",), whole))

    def ours(module) -> dict:
        tensors = {k: p.detach().numpy() for k, p in module.named_parameters()}
        leaves = names.flatten(base)
        for path in filter(is_adapter, names.flatten(model.abstract_params())):
            leaves[path] = to_ours(path, table, tensors.__getitem__)
        return names.unflatten(jax.tree.map(jnp.asarray, leaves))

    student = moved_by(1, module)
    teacher = moved_by(2, module, fresh=fields["order"] == 1)
    objective = objectives.build(objectives.preset("released", **fields))
    rng = np.random.default_rng(0)
    cond = {
        "tokens": rng.normal(size=(PROMPTS, max(LENGTHS), config.text_width)).astype(np.float32),
        "mask": np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None],
    }
    there = jax.tree.map(torch.from_numpy, cond)
    there["tokens"] = there["tokens"].double()
    params, theirs = ours(student), ours(teacher)
    return (
        table, model, objective, params, theirs, cond,
        Network(student.double(), there), Network(teacher.double(), there),
    )


def to_torch(tree):
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a)).double(), tree)


def remembered(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, which also keeps the last gradient: first in its state."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, *_: (gradient,) * 2
    )
    return optax.chain(keep, optimizer)


def test_eight_optimizer_steps(case):
    table, model, objective, params, teacher, cond, student, theirs = case
    flat = names.flatten(state.trained(params, model.fixed))
    trained = {path for path, leaf in flat.items() if leaf is not None}
    settings = Train(seed=3, ema_decay=0.0)
    chosen = Optimizer(learning_rate=RATE, betas=BETAS)
    optimizer = remembered(optimizers.create(chosen, STEPS))

    def started(teacher):
        """Whose average is half way from this one to the student after a first update."""
        copied = jax.tree.map(jnp.copy, (params, state.trained(teacher, model.fixed)))
        first = state.create(
            copied[0], optimizer, objective.config.teacher_decay, 0.0, fixed=model.fixed,
            on_base=True,
        )
        return dataclasses.replace(first, teacher=ema.Average(copied[1], jnp.float32(0.5)))

    trainer = reference.Trainer(student, objective.config, RATE, BETAS)
    trainer.average.model, trainer.average.decay = theirs.requires_grad_(False), 0.5
    tensors = dict(student.module.named_parameters())
    # PyTorch gives those that nothing reaches no gradient.
    gradient_of = lambda key: (
        np.zeros(tensors[key].shape) if tensors[key].grad is None else tensors[key].grad.numpy()
    )

    current, compiled = started(teacher), None
    for number in range(STEPS):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(ROWS, *SMALL.sample_shape)).astype(np.float32)
        label, null = rng.integers(1, PROMPTS, ROWS), np.zeros(ROWS, int)
        data = {"x": x} | {
            name: jax.tree.map(lambda a: a[rows], cond)  # noqa: B023
            for name, rows in (("cond", label), ("null", null[:1]))
        }
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        draws = objective.draw(jax.random.split(key, 3)[0], ROWS, SMALL.sample_shape)
        if compiled is None:
            make = step.make_step(objective, model.apply, optimizer, settings)
            compiled = make.lower(current, data).compile(oracles.QUICK)
        current, metrics = compiled(current, data)
        labels = torch.from_numpy(label), torch.from_numpy(null)
        expected, _ = trainer.step(to_torch(x), *labels, to_torch(draws))
        if number:
            continue
        assert float(metrics["loss"]) == pytest.approx(expected.item(), rel=1e-5)
        swapped = compiled(started(params), data)[1]["loss"]
        assert abs(swapped / metrics["loss"] - 1) > 2e-4  # the teacher counts
        gradient = names.flatten(current.opt_state[0])
        assert {path for path, leaf in gradient.items() if leaf is not None} == trained
        for path in trained:
            wanted = to_ours(path, table, gradient_of)
            # E2's own feel how 1000 r rounds in float32.
            bound = (1e-4 if is_adapter(path) else 5e-4) * np.abs(wanted).max()
            assert np.abs(gradient[path] - wanted).max() <= bound, path

    before, after = names.flatten(params), names.flatten(current.params)
    for path in trained:
        there = to_ours(path, table, lambda key: tensors[key].detach().numpy())
        assert np.abs(after[path] - there).max() <= 1e-5, path
        moved = np.abs(after[path] - before[path])
        assert moved.max() > 2 * RATE and (not moved[-1].any()) == (path in DEAD), path
    for path in before.keys() - trained:
        np.testing.assert_array_equal(after[path], before[path], path)
