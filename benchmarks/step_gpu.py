"""The TwinFlow train step on one GPU, side by side with the same arithmetic in plain PyTorch.

    pip install -e ".[test]" -c constraints.txt && pip install -U "jax[cuda12]"
    python benchmarks/step_gpu.py --model sana --json step_sana.json
    python benchmarks/step_gpu.py --model qwen --json step_qwen.json

The released objective with teacher = student at 512x512 pixels, all parameters: SANA-0.6B with
RAdam, or four layers of Qwen-Image with AdamW. Ours is the product's own compiled step. The other
is diffusers' network with a second embedder under torch.compile, SDPA and bfloat16 autocast, with
PyTorch's own optimizers: the same passes over the same rows, with float32 weights in both. Said is
the largest of --batches that fits in both; PyTorch compiles for minutes. `--tiny` compares losses
of small networks in float32 on a CPU instead, step by step, from the same weights, data and draws.
"""

import argparse
import json
import sys

import side_by_side
import torch_reference as reference

CONFIGS = {"sana": "configs/sana06b_tpu.py:bench", "qwen": "configs/qwen20b_tpu.py:bench"}
LAYERS = {"sana": 28, "qwen": 4}
SMALL = {
    "sana": {"sample_shape": (4, 4, 32), "heads": 2, "cross_heads": 2, "cross_head_dim": 32,
             "text_width": 48},
    "qwen": {"sample_shape": (4, 4, 16), "heads": 2, "head_dim": 32, "text_width": 48,
             "rope_axes": (8, 12, 12)},
}
STEPS = 3  # that --tiny compares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="sana")
    parser.add_argument("--batches", default="64", help="all that fit are measured")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--system", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        compare(args.model)
        return
    batches = [int(batch) for batch in args.batches.split(",")]
    if args.system:
        system = {"jax": jax_step, "torch": torch_step}[args.system]
        print(json.dumps(measure(lambda batch: system(settings(args.model, batch)), batches)))
        return
    found = side_by_side.run_each(("jax", "torch"), __file__)
    both = found["jax"].keys() & found["torch"].keys()
    if not both:
        raise SystemExit("no batch fits in both: give smaller --batches")
    batch = max(both, key=int)
    ours, theirs = (found[system][batch]["seconds"] for system in ("jax", "torch"))
    work, peak = found["jax"][batch]["model_flops"], found["jax"][batch]["peak_flops"]
    for name, seconds in (("ours", ours), ("PyTorch", theirs)):
        used = f", {work / seconds / peak:.1%} of peak" if peak else ""
        print(f"{name}: batch {batch}, {int(batch) / seconds:.2f} images/s{used}")
    print(f"ours / PyTorch = {theirs / ours:.3f} in images/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


def measure(build, batches: list[int]) -> dict[str, dict[str, float]]:
    """By batch, of those that fit; `build(batch)` gives (step, what else to say of it)."""
    def of(batch: int) -> dict[str, float]:  # what it holds goes when it returns
        step, more = build(batch)
        return side_by_side.measure(step) | more()

    found = {}
    for batch in batches:
        try:
            found[str(batch)] = of(batch)
        except Exception as error:
            if not side_by_side.is_full(error):
                raise
            print(f"batch {batch} does not fit", file=sys.stderr)
    return found


def settings(model: str, rows: int, tiny: bool = False):
    """The run's config, whose passes are not merged: on one device that only adds rows."""
    from twinflow_jax import config as configs

    fields = configs.load(CONFIGS[model]).to_dict()
    fields["data"]["batch_size"] = rows
    fields["objective"]["merge_passes"] = False
    fields["model"] |= {"remat": "none", "layers": 2 if tiny else LAYERS[model]}
    if tiny:
        fields["model"] |= {"dtype": "float32", **SMALL[model]}
        fields["data"]["text_tokens"] = 6
    return configs.Run.of(fields)


def random_batch(prepared, seed: int = 0) -> dict:
    """Normal rows and text, all tokens valid, as NumPy arrays."""
    import jax
    import numpy as np

    rng = np.random.default_rng(seed)

    def one(leaf):
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    return jax.tree.map(one, prepared.abstract_batch())


# Ours


def jax_step(config):
    import jax

    from twinflow_jax.parallel.peaks import PEAKS
    from twinflow_jax.training import setup

    prepared = setup.prepare(config)
    step = prepared.lower("objective").compile()
    state = [prepared.initial()()]
    batch = jax.device_put(random_batch(prepared))

    def run() -> None:
        state[0], metrics = step(state[0], batch)
        metrics["loss"].block_until_ready()

    return run, lambda: {
        "peak_gib": side_by_side.jax_peak_gib(),
        "model_flops": prepared.step_flops("objective"),
        "peak_flops": PEAKS.get(jax.devices()[0].device_kind),
    }


# The same in PyTorch


def network(model: str, config):
    """diffusers' module with TwinFlow's second embedder, as `(x, t, r, tokens) -> velocity`, where
    x and velocity are (B, C, H, W) for SANA and (B, tokens, channels of a patch) for Qwen-Image."""
    import copy

    import torch
    from diffusers import QwenImageTransformer2DModel, SanaTransformer2DModel
    from torch import nn

    class TwoTimes(nn.Module):
        """E1(t) + (t - r) E2(r) of a time (B, 2) that holds both; scale: of what they see."""

        def __init__(self, first: nn.Module, scale: float):
            super().__init__()
            self.first, self.second, self.scale = first, copy.deepcopy(first), scale

        def forward(self, times, *inputs, **options):
            t, r = times.float().unbind(1)
            first = self.first(self.scale * t, *inputs, **options)
            second = self.second(self.scale * r, *inputs, **options)
            add = lambda a, b: a.float() + (t - r)[:, None] * b.float()
            if isinstance(first, tuple):
                return tuple(add(a, b) for a, b in zip(first, second, strict=True))
            return add(first, second)

    class Velocity(nn.Module):
        def __init__(self, net: nn.Module, grid: tuple[int, int]):
            super().__init__()
            self.net, self.grid = net, grid

        def forward(self, x, t, r, tokens):
            inputs = {"timestep": torch.stack((t, r), 1), "encoder_hidden_states": tokens}
            if model == "qwen":
                inputs["img_shapes"] = [[(1, *self.grid)]] * len(x)
            return self.net(x, return_dict=False, **inputs)[0].float()

    c = config
    if model == "sana":
        net = SanaTransformer2DModel(
            num_layers=c.layers, num_attention_heads=c.heads, attention_head_dim=c.head_dim,
            cross_attention_dim=c.width, num_cross_attention_heads=c.cross_heads,
            cross_attention_head_dim=c.cross_head_dim, caption_channels=c.text_width,
            sample_size=c.sample_shape[0],
        )
        net.time_embed = TwoTimes(net.time_embed, 1000.0)
    else:
        net = QwenImageTransformer2DModel(
            num_layers=c.layers, num_attention_heads=c.heads, attention_head_dim=c.head_dim,
            joint_attention_dim=c.text_width, axes_dims_rope=c.rope_axes,
        )
        net.time_text_embed = TwoTimes(net.time_text_embed, 1.0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Velocity(net, tuple(side // c.patch for side in c.sample_shape[:2]))


def images(model: str, x):
    """Our (B, H, W, C) as the PyTorch network takes it, float32."""
    import numpy as np
    import torch

    x = torch.tensor(np.asarray(x, np.float32))
    if model == "sana":
        return x.permute(0, 3, 1, 2).contiguous()
    rows, height, width, channels = x.shape
    patches = x.reshape(rows, height // 2, 2, width // 2, 2, channels)
    return patches.permute(0, 1, 3, 5, 2, 4).reshape(rows, height * width // 4, -1)


def loss(model, x, tokens, null, draws, config):
    """The released loss of rows in role order, each pass over the rows that use it, as
    `twinflow_jax.objectives.twinflow` with teacher = student."""
    import torch

    rows = [len(draws[role]["z"]) for role in reference.ROLES]
    ends = [sum(rows[: i + 1]) for i in range(4)]
    one, guided, real, fake = (
        slice(ends[0]), slice(ends[0], ends[2]), slice(ends[2]), slice(ends[2], ends[3])
    )
    z = torch.cat([draws[role]["z"] for role in reference.ROLES])
    t, r = reference.one_and_zero(z)
    for role, begin, end, share in (
        ("multi_step", ends[0], ends[1], 0.05), ("any_step", ends[1], ends[2], 1.0)
    ):
        t[begin:end] = draws[role]["t"]
        r[begin:end] = t[begin:end] * (1 - share * draws[role]["u"])
    t[fake] = -draws["adversarial"]["t"]
    r[fake] = t[fake]
    with torch.no_grad():
        start = draws["adversarial"]["z_generator"]
        made = start - model(start, *reference.one_and_zero(start), tokens[fake])
    x = torch.cat([x[real], made])
    x_t, v = reference.mix(x, z, t), z - x

    v_pred = model(x_t, t, r, tokens)
    with torch.no_grad():
        at = x_t[guided], t[guided], t[guided]
        v[guided] += config.guidance * (model(*at, tokens[guided]) - model(*at, null[guided]))
        jump = reference.rcgm_target(
            model, v_pred.detach()[real], x_t[real], v[real], t[real], r[real], tokens[real],
            config,
        )
        target = torch.cat([jump, v[fake]])
    metric = lambda p, q: reference.barron(p, q, config.barron_alpha, config.barron_scale)
    per_row = metric(v_pred, target)
    weight = 1 + torch.tan((1 - t.abs() + r.abs()) * torch.pi / 2.5)
    weight[fake] = 1.0
    draw, v_one = draws["one_step"], v_pred[one]
    x_fake = (z[one] - v_one).detach()
    gap = reference.fake_minus_real(
        model, x_fake, draw["z_rectify"], draw["t_rectify"], tokens[one]
    )
    straight = v_one.detach() - reference.clip(gap, config.rectify_clip)
    return (per_row * weight).mean() + config.rectify_weight * metric(v_one, straight).mean()


def torch_train(model: str, config, velocity, device: str, autocast: bool):
    """`step(x, tokens, null, draws) -> loss`, a tensor."""
    import torch

    objective = config.objective
    c, parameters = config.optimizer, list(velocity.parameters())
    rate = {"lr": c.learning_rate, "betas": tuple(c.betas), "eps": c.eps}
    optimizer = {
        "radam": lambda: torch.optim.RAdam(parameters, foreach=True, **rate),
        "adamw": lambda: torch.optim.AdamW(
            parameters, fused=True, weight_decay=c.weight_decay, **rate
        ),
    }[c.name]()

    def step(x, tokens, null, draws):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(velocity, x, tokens, null, draws, objective)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if c.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, c.clip_norm)
        optimizer.step()
        return value.detach()

    return step


def torch_step(config):
    import jax
    import torch

    jax.config.update("jax_platforms", "cpu")  # only shapes come from it
    from twinflow_jax.training import setup

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    name = "sana" if config.model.name == "sana" else "qwen"
    with torch.device(device):
        made = network(name, config.model)
    step = torch_train(name, config, torch.compile(made, dynamic=False), device, autocast=True)
    batch = random_batch(setup.prepare(config))
    x = images(name, batch["x"]).to(device)
    text = lambda a: torch.tensor(a.astype("float32")).to(device)
    tokens, null = text(batch["cond"]["tokens"]), text(batch["null"]["tokens"])
    objective, rows = config.bound_objective, len(x)
    shapes = jax.eval_shape(
        lambda key: objective.draw(key, rows, batch["x"].shape[1:]), jax.random.key(0)
    )

    def drawn(field: str, leaf):
        if field.startswith("z"):
            return torch.randn(leaf.shape[0], *x.shape[1:], device=device)
        return torch.rand(leaf.shape, device=device)

    def run() -> None:
        draws = {
            role: {field: drawn(field, leaf) for field, leaf in fields.items()}
            for role, fields in shapes.items()
        }
        step(x, tokens, null.expand(rows, -1, -1), draws).item()

    return run, lambda: {"peak_gib": side_by_side.torch_peak_gib()}


# Small networks: the same losses


def converted(model: str, prepared, velocity):
    """The PyTorch network's weights as our parameters."""
    import jax.numpy as jnp
    import numpy as np

    from twinflow_jax import models
    from twinflow_jax.models import names

    embedder = {"sana": "time_embed", "qwen": "time_text_embed"}[model]
    state = {
        key.replace(f"{embedder}.first.", f"{embedder}.")
        .replace(f"{embedder}.second.", f"{embedder}_2."): value.detach().numpy()
        for key, value in velocity.net.state_dict().items()
    }
    family = models.FAMILIES[prepared.run.model.name].text_to_image
    table = family.networks["transformer"].table(prepared.model.config)
    flat = {}
    for rule in table.rules:
        leaves = [rule.ours(state[key]) for key in table.keys(rule)]
        flat[rule.path] = jnp.asarray(np.stack(leaves) if rule.stacked else leaves[0])
    return names.unflatten(flat)


def compare(model: str) -> None:
    """Prints both losses at each step and their relative difference.

    Raises:
      SystemExit: it is above 1e-4.
    """
    import jax
    import numpy as np
    import torch

    from twinflow_jax.training import setup

    torch.manual_seed(0)
    config = settings(model, 8, tiny=True)
    prepared = setup.prepare(config)
    velocity = network(model, prepared.model.config)
    params = converted(model, prepared, velocity)
    batch = random_batch(prepared)
    ours = prepared.lower("objective").compile()
    state = prepared.placing(prepared.fresh)(params)
    theirs = torch_train(model, config, velocity, "cpu", autocast=False)
    x, text = images(model, batch["x"]), lambda a: torch.tensor(np.array(a, np.float32))
    null = np.broadcast_to(batch["null"]["tokens"], batch["cond"]["tokens"].shape)
    objective = config.bound_objective
    for number in range(STEPS):
        key = jax.random.fold_in(jax.random.key(config.train.seed), number)
        drawn = objective.draw(jax.random.split(key, 3)[0], len(x), batch["x"].shape[1:])
        draws = {
            role: {
                field: images(model, leaf) if field.startswith("z") else text(leaf)
                for field, leaf in fields.items()
            }
            for role, fields in drawn.items()
        }
        state, metrics = ours(state, batch)
        one, other = float(metrics["loss"]), theirs(
            x, text(batch["cond"]["tokens"]), text(null), draws
        ).item()
        apart = abs(one - other) / abs(other)
        print(f"{model}, step {number + 1}: ours {one:.7f}, PyTorch {other:.7f}, apart {apart:.1e}")
        if not apart < 1e-4:
            raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
