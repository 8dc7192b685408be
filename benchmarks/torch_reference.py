"""The same mathematics in plain PyTorch: an oracle for tests, and the other side of benchmarks.

Everything here is ordinary eager PyTorch with autograd, written the way the authors' PyTorch
code works: one network call after another, roles as boolean masks over the whole batch, the
teacher as a second module. No row is skipped and no calls are merged beyond that. It shares no
code with `twinflow_jax`; configs are read by attribute, so `twinflow_jax.objectives` Configs fit.

Randomness comes in as `draws`, the structure that `twinflow_jax.objectives` draws, with tensors
for arrays. Conditions are class labels (B,) of int64, where num_classes stands for no class.
Networks are modules `model(x_t, t, r, labels) -> velocity`, times (B,).

Sources: the released tutorials/mnist/methodes.py (tutorial form) and
src/methodes/twinflow/twinflow.py (role form); the TwinFlow paper, equation 1, L_adv and L_rectify
(paper form).
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Draws = Mapping[str, Mapping[str, Tensor]]
Terms = dict[str, Tensor]
Loss = Callable[..., tuple[Tensor, Terms]]

ROLES = ("one_step", "multi_step", "any_step", "adversarial")


# The network


class RawTime(nn.Module):
    """Times (B,) to features (B, width) through two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Linear(1, width)
        self.second = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(t.unsqueeze(1))))


class Block(nn.Module):
    """One residual block: h (B, width) moved by what h and the context say together."""

    def __init__(self, width: int):
        super().__init__()
        self.from_h = nn.Linear(width, width)
        self.from_context = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        return h + self.out(torch.relu(self.from_h(torch.relu(h)) + self.from_context(context)))


class MLP(nn.Module):
    """The residual network of `twinflow_jax.models.mlp` with times="raw".

    Takes x_t (B, *sample_shape), t and r (B,), labels (B,) or None; returns x_t's shape.
    """

    def __init__(
        self, sample_shape: tuple[int, ...], width: int = 256, depth: int = 3, num_classes: int = 0
    ):
        super().__init__()
        size = math.prod(sample_shape)
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.first = nn.Linear(size, width)
        self.time_t = RawTime(width)
        self.time_r = RawTime(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, size)

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, labels: Tensor | None = None) -> Tensor:
        context = self.time_t(t) + self.time_r(r)
        if self.label is not None:
            context = context + self.label(labels)
        context = torch.relu(context)
        h = self.first(x_t.flatten(1))
        for block in self.blocks:
            h = block(h, context)
        return x_t - self.last(nn.functional.silu(h)).view_as(x_t)

    def flax_names(self) -> dict[str, nn.Module]:
        """The module behind each of Flax's automatic names, e.g. "RawTime_0/Dense_1"."""
        names: dict[str, nn.Module] = {"Dense_0": self.first}
        if self.label is not None:
            names["Condition_0/Embed_0"] = self.label
        for i, time in enumerate((self.time_t, self.time_r)):
            names[f"RawTime_{i}/Dense_0"] = time.first
            names[f"RawTime_{i}/Dense_1"] = time.second
        dense = [layer for b in self.blocks for layer in (b.from_h, b.from_context, b.out)]
        names |= {f"Dense_{i}": layer for i, layer in enumerate([*dense, self.last], start=1)}
        return names


def _leaf(tree: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for name in path.split("/"):
        tree = tree[name]
    return tree


@torch.no_grad()
def load_flax(model: MLP, params: Mapping[str, Any]) -> MLP:
    """Copies a Flax parameter tree of the same network into the model, and returns the model."""
    for path, module in model.flax_names().items():
        leaves = _leaf(params, path)
        if isinstance(module, nn.Embedding):
            module.weight.copy_(torch.tensor(np.asarray(leaves["embedding"])))
        else:
            module.weight.copy_(torch.tensor(np.asarray(leaves["kernel"])).T)
            module.bias.copy_(torch.tensor(np.asarray(leaves["bias"])))
    return model


def to_flax(model: MLP, gradient: bool = False) -> dict[str, np.ndarray]:
    """Weights, or their gradients, as `{"Dense_0/kernel": array}` in Flax's layout."""

    def array(parameter: nn.Parameter) -> np.ndarray:
        if not gradient:
            return parameter.detach().numpy()
        return np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()

    flat = {}
    for path, module in model.flax_names().items():
        if isinstance(module, nn.Embedding):
            flat[f"{path}/embedding"] = array(module.weight)
        else:
            flat[f"{path}/kernel"] = array(module.weight).T
            flat[f"{path}/bias"] = array(module.bias)
    return flat


# The path and the distances


def column(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) shaped to broadcast over x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def mix(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The point at |t| between data x (|t| = 0) and noise z (|t| = 1)."""
    return torch.lerp(x, z, column(t.abs(), x))


def l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference per row, (B,)."""
    return (prediction - target).square().flatten(1).mean(1)


def barron(prediction: Tensor, target: Tensor, alpha: float, scale: float) -> Tensor:
    """The released reweighted L2 per row, (B,): its weight carries no gradient."""
    mse = l2(prediction, target)
    weight = torch.ones_like(mse)
    if abs(alpha - 2) >= 1e-5:
        ratio = mse.detach() / (scale**2 + 1e-8)
        weight = (ratio / abs(alpha - 2) + 1) ** (alpha / 2 - 1)
    return weight * mse / scale


def clip(v: Tensor, limit: float) -> Tensor:
    return v.clamp(-limit, limit) if limit else v


# Pieces that every form uses


def one_and_zero(z: Tensor) -> tuple[Tensor, Tensor]:
    """The times (1, 0) of one-step generation for the rows of z."""
    return z.new_ones(len(z)), z.new_zeros(len(z))


@torch.no_grad()
def fake_minus_real(
    model: nn.Module, x_fake: Tensor, z: Tensor, t: Tensor, labels: Tensor | None
) -> Tensor:
    """Velocity on the fake trajectory minus on the real one, between x_fake and noise z."""
    x_t = mix(x_fake, z, t)
    return model(x_t, -t, -t, labels) - model(x_t, t, t, labels)


@torch.no_grad()
def rcgm_target(
    network: nn.Module, v_pred: Tensor, x_t: Tensor, v: Tensor, t: Tensor, r: Tensor,
    labels: Tensor | None, config: Any,
) -> Tensor:
    """What F(x_t, t, r) is regressed on: v_pred minus the clipped RCGM error.

    One step of dt along v, then `config.order` equal sub-steps of the network to r, each from
    the data and noise that its velocity implies. Every row takes them, those too that lie
    within dt of r, where the error is v_pred - v.
    """
    start = torch.maximum(t - config.dt, r)
    x, total = x_t - config.dt * v, torch.zeros_like(v)
    for i in range(config.order):
        now = start + (r - start) * (i / config.order)
        then = start + (r - start) * ((i + 1) / config.order)
        f = network(x, now, then, labels)
        data, noise = x - column(now.abs(), x) * f, x + column(1 - now.abs(), x) * f
        x = torch.lerp(data, noise, column(then, x))
        total += column(now - then, x) * f
    near = column(t < r + config.dt, v)
    error = torch.where(near, v_pred, (column(t - r, v) * v_pred - total) / config.dt) - v
    return v_pred - clip(error, config.clip)


# The three forms


def tutorial_loss(
    model: nn.Module, teacher: nn.Module, x: Tensor, labels: Tensor, null_labels: Tensor | None,
    draws: Draws, config: Any,
) -> tuple[Tensor, Terms]:
    """The tutorial's five full-batch losses; only the first with config.twin off.

    x (B, ...), labels and null_labels (B,); returns the scalar loss and its terms by name.
    """
    d = draws["all"]
    z, t = d["z"], d["t"]
    r = t - d["u"] * t
    x_t, v = mix(x, z, t), z - x

    v_jump = model(x_t, t, r, labels)
    if config.guidance:
        with torch.no_grad():
            without = teacher(x_t, t, t, null_labels)
            v = v + config.guidance * (teacher(x_t, t, t, labels) - without)
    target = rcgm_target(teacher, v_jump.detach(), x_t, v, t, r, labels, config)
    terms = {"rcgm": l2(v_jump, target).mean()}
    if not config.twin:
        return terms["rcgm"], terms

    terms["velocity"] = l2(model(x_t, t, t, labels), v).mean()

    one, zero = one_and_zero(z)
    v_one = model(z, one, zero, labels)
    x_fake = z - v_one.detach()
    v_fake = model(mix(x_fake, z, t), -t, -t, labels)
    terms["adversarial"] = l2(v_fake, z - x_fake).mean()

    gap = fake_minus_real(model, x_fake, d["z_rectify"], d["t_rectify"], labels)
    terms["rectify"] = config.rectify_weight * l2(v_one, v_one.detach() - gap).mean()

    target = rcgm_target(teacher, v_one.detach(), z, v, one, zero, labels, config)
    terms["one_step"] = l2(v_one, target).mean()
    return torch.stack(list(terms.values())).sum(), terms


def released_loss(
    model: nn.Module, teacher: nn.Module, x: Tensor, labels: Tensor, null_labels: Tensor | None,
    draws: Draws, config: Any,
) -> tuple[Tensor, Terms]:
    """The released form: roles as masks over the batch (rows in ROLES order), every pass of
    guidance and sub-steps over all rows.

    x (B, ...), labels and null_labels (B,); returns the scalar loss and its terms by name.
    """
    present = [role for role in ROLES if role in draws]
    mask, first = {}, 0
    for role in ROLES:
        rows = len(draws[role]["z"]) if role in draws else 0
        mask[role] = torch.zeros(len(x), dtype=torch.bool)
        mask[role][first : first + rows] = True
        first += rows
    e2e, adversarial = mask["one_step"], mask["adversarial"]

    kappa = config.consistency_ratio
    t, r = one_and_zero(x)
    for role in present:
        if role != "one_step":
            t[mask[role]] = draws[role]["t"]
    if "multi_step" in draws:
        m = mask["multi_step"]
        r[m] = t[m] - draws["multi_step"]["u"] * t[m] * min(0.05, kappa)
    if "any_step" in draws:
        m = mask["any_step"]
        sampled = t[m] - draws["any_step"]["u"] * t[m] * kappa
        r[m] = sampled if config.target_time == "sampled" else torch.zeros_like(sampled)

    generated = torch.ones_like(adversarial) if config.image_free else adversarial
    if generated.any():
        with torch.no_grad():
            z = torch.cat(
                [draws[role]["z_generator"] for role in present if generated[mask[role]].any()]
            )
            x = x.clone()
            x[generated] = z - model(z, *one_and_zero(z), labels[generated])
    z = torch.cat([draws[role]["z"] for role in present])
    x_t, v = mix(x, z, t), z - x
    t = torch.where(adversarial, -t, t)
    r = torch.where(adversarial, t, r)

    v_pred = model(x_t, t, r, labels)
    with torch.no_grad():
        if config.guidance:
            without = teacher(x_t, t, t, null_labels)
            difference = teacher(x_t, t, t, labels) - without
            low, high = config.guidance_range
            inside = (t > low) & (t < high) & ~adversarial
            start = without if config.image_free else v
            v = torch.where(column(inside, v), start + config.guidance * difference, v)
        target = v
        if config.order >= 1 and kappa > 0 and (e2e | mask["any_step"]).any():
            network = model if config.teacher_decay == 1 else teacher
            jump = rcgm_target(network, v_pred.detach(), x_t, v, t, r, labels, config)
            target = torch.where(column(adversarial, v), v, jump)

    if config.distance == "barron":
        metric = lambda p, q: barron(p, q, config.barron_alpha, config.barron_scale)
    else:
        metric = l2
    per_row = metric(v_pred, target)
    if config.sample_weight:
        weight = 1 + torch.tan((1 - t.abs() + r.abs()) * math.pi / 2.5)
        per_row = per_row * torch.where(adversarial, 1.0, weight)
    trained = mask["multi_step"] | adversarial
    if config.order >= 1:
        trained = torch.ones_like(trained)
    loss = per_row[trained].mean() if trained.any() else per_row.new_zeros(())
    terms = {
        role: per_row[mask[role]].sum() / trained.sum()
        for role in present
        if trained[mask[role]].any()
    }

    if config.rectify_weight > 0 and kappa == 1 and e2e.any():
        d, v_one = draws["one_step"], v_pred[e2e]
        x_fake = (z[e2e] - v_one).detach()
        gap = fake_minus_real(model, x_fake, d["z_rectify"], d["t_rectify"], labels[e2e])
        straight = v_one.detach() - clip(gap, config.rectify_clip)
        terms["rectify"] = config.rectify_weight * metric(v_one, straight).mean()
        loss = loss + terms["rectify"]
    return loss, terms


def paper_loss(
    model: nn.Module, teacher: nn.Module, x: Tensor, labels: Tensor, null_labels: Tensor | None,
    draws: Draws, config: Any,
) -> tuple[Tensor, Terms]:
    """The paper's equations on two subsets of the batch, twin rows first.

    Where the paper leaves a choice, that of `twinflow_jax.objectives.paper` is taken.
    x (B, ...), labels (B,), null_labels unused; returns the scalar loss and its terms by name.
    """
    first = len(draws["twin"]["z"]) if "twin" in draws else 0
    terms = {}
    if "twin" in draws:
        d, c = draws["twin"], labels[:first]
        v_one = model(d["z"], *one_and_zero(d["z"]), c)
        x_fake = (d["z"] - v_one).detach()
        z, t = d["z_fake"], d["t_fake"]
        v_fake = model(mix(x_fake, z, t), -t, -t, c)
        terms["adversarial"] = l2(v_fake, z - x_fake).sum() / len(x)
        gap = fake_minus_real(model, x_fake, d["z_rectify"], d["t_rectify"], c)
        straight = v_one.detach() - clip(gap, config.rectify_clip)
        terms["rectify"] = config.rectify_weight * l2(v_one, straight).sum() / len(x)
    if "base" in draws:
        d, c = draws["base"], labels[first:]
        z, t = d["z"], d["t"]
        r = t - d["u"] * t
        x_t, v = mix(x[first:], z, t), z - x[first:]
        v_pred = model(x_t, t, r, c)
        far = t >= r + config.dt
        with torch.no_grad():
            now, point, total = torch.maximum(t - config.dt, r), x_t - config.dt * v, 0.0
            for i in range(config.order):
                left = d["fractions"][:, i] if i < config.order - 1 else torch.zeros_like(t)
                then = r + left * (now - r)
                jump = column(now - then, x) * teacher(point, now, then, c)
                total, point, now = total + jump, point - jump, then
        # The error itself, with its gradient: literally equation 1, a norm of one difference.
        gradient_factor = torch.where(far, (t - r) / config.dt, 1.0)
        constant = torch.where(column(far, x), total / config.dt, 0.0) + v
        error = column(gradient_factor, x) * v_pred - constant
        if config.clip:  # the value is bounded, the gradient keeps its factor
            scaled = column(gradient_factor, x) * v_pred
            error = scaled - scaled.detach() + clip(error.detach(), config.clip)
        terms["base"] = error.square().flatten(1).mean(1).sum() / len(x)
    return torch.stack(list(terms.values())).sum(), terms


LOSSES: dict[str, Loss] = {
    "tutorial": tutorial_loss, "twinflow": released_loss, "paper": paper_loss,
}


# Training


def draw_tutorial(
    generator: torch.Generator, batch_size: int, sample_shape: tuple[int, ...], config: Any
) -> Draws:
    """Everything random in one step of the tutorial form, from a PyTorch generator."""
    normal = lambda: torch.randn(batch_size, *sample_shape, generator=generator)
    uniform = lambda: torch.rand(batch_size, generator=generator)
    draws = {"z": normal(), "t": uniform(), "u": uniform()}
    if config.twin:
        draws |= {"z_rectify": normal(), "t_rectify": uniform()}
    return {"all": draws}


class Average:
    """A moving average of a model's weights, `.model`, whose decay warms up from 0.

    The first update copies the weights; the decay then goes 0, .495, .62, .69 ... for .99.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        torch._foreach_lerp_(
            list(self.model.parameters()), list(model.parameters()), 1 - self.decay
        )
        self.decay += (1 - self.decay) * (decay - self.decay) / 2


class Trainer:
    """Adam on one of the losses, with the teacher that config.teacher_decay asks for.

    The teacher takes in the weights from before a step's update, as released.
    """

    def __init__(
        self, model: nn.Module, config: Any, learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        self.model, self.config, self.loss = model, config, LOSSES[config.form]
        self.optimizer = torch.optim.Adam(model.parameters(), learning_rate, betas, fused=True)
        self.average = Average(model) if config.teacher_decay > 0 else None

    @property
    def teacher(self) -> nn.Module:
        return self.model if self.average is None else self.average.model

    def step(
        self, x: Tensor, labels: Tensor, null_labels: Tensor | None, draws: Draws
    ) -> tuple[Tensor, Terms]:
        """One optimizer step; returns the loss and its terms, detached."""
        if self.average is not None and self.config.teacher_decay < 1:
            self.average.update(self.model, self.config.teacher_decay)
        loss, terms = self.loss(
            self.model, self.teacher, x, labels, null_labels, draws, self.config
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), {name: term.detach() for name, term in terms.items()}
