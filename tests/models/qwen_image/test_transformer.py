"""The Qwen-Image transformer against diffusers' module, with random weights."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from tests.models import oracles
from tests.models.oracles import BOUNDS, params_of, relative_error
from twinflow_jax.errors import UserError
from twinflow_jax.models import names, remat
from twinflow_jax.models.qwen_image import transformer
from twinflow_jax.models.qwen_image.transformer import Config, Transformer

SMALL = Config(
    sample_shape=(10, 6, 16), layers=2, heads=3, head_dim=32, text_width=48, rope_axes=(8, 12, 12)
)
PUBLISHED = {
    "_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False,
    "in_channels": 64, "joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 60,
    "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 768,
}
LENGTHS = (5, 3)


def oracle(config: Config) -> torch.nn.Module:
    """diffusers' module, every tensor random, which sees r as the config says."""
    torch.manual_seed(0)
    module = QwenImageTransformer2DModel(
        num_layers=config.layers, num_attention_heads=config.heads,
        attention_head_dim=config.head_dim, joint_attention_dim=config.text_width,
        axes_dims_rope=config.rope_axes, zero_cond_t=config.zero_cond_t,
    )
    if config.time_conditioning == "half_r":
        see = functools.partial(_see_half_r, module)
        module.time_text_embed.register_forward_pre_hook(see)
    else:
        second = "time_text_embed" + {"second_embedder": "_2", "gated": "_gated"}[
            config.time_conditioning
        ]
        setattr(module, second, type(module.time_text_embed)(config.width))
        hook = functools.partial(_add_second, module, second)
        module.time_text_embed.register_forward_hook(hook)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if p.ndim > 1:
                p.mul_(3**0.5)  # PyTorch's initialisation is uniform: up to unit variance
            else:
                p.normal_(1.0 if key.endswith("weight") else 0.0, 0.3)
    return module


def _see_half_r(module, _, args):
    """E1(t - r/2), by TwinFlow's LoRA code; the rows at t = 0 are at r = 0 too."""
    half = module.r / 2
    return args[0] - torch.cat([half, torch.zeros(len(args[0]) - len(half))]), *args[1:]


def _add_second(module, name, _, args, out):
    """E1(t) + (t - r) E2(r), by TwinFlow's definition, or E1(t) + r E2(r); the rows at t = 0 have
    no second term."""
    t, hidden = args[0], args[1]
    r = module.r
    weight = r if name.endswith("gated") else t[: len(r)] - r
    second = getattr(module, name)(r, hidden) * weight[:, None]
    return out + torch.cat([second, torch.zeros_like(out[len(r) :])])


def abstract(config: Config):
    """Boxed abstract parameters."""
    one = jnp.zeros((1, *config.sample_shape))
    cond = {"tokens": jnp.zeros((1, 1, config.text_width)), "mask": jnp.ones((1, 1), bool)}
    time = jnp.zeros(1)
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    return jax.eval_shape(init, one, time, time, cond)["params"]


def inputs(config: Config, references=(), seed: int = 1):
    """(x_t, t, r, cond), rows with texts of LENGTHS."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rows = len(LENGTHS)
    cond = {
        "tokens": normal(rows, max(LENGTHS), config.text_width),
        "mask": np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None],
        "references": tuple(normal(rows, *shape, 16) for shape in references),
    }
    t, r = np.array([0.83, -0.37], np.float32), np.array([0.21, 0.94], np.float32)
    return normal(rows, *config.sample_shape), t, r, cond


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Tokens of 2x2 patches, written as a loop over channels and offsets."""
    parts = [
        latents[:, y::2, x::2, c].flatten(1)
        for c in range(latents.shape[-1]) for y in (0, 1) for x in (0, 1)
    ]
    return torch.stack(parts, dim=-1)


def theirs(module, x_t, t, r, cond) -> torch.Tensor:
    """The oracle's packed velocity, row by row with unpadded text; tensors in and out."""
    images = (x_t, *cond["references"])
    shapes = [[(1, image.shape[1] // 2, image.shape[2] // 2) for image in images]]
    tokens = torch.cat([_packed(image) for image in images], dim=1)
    outs = []
    for i, length in enumerate(cond["mask"].sum(1)):
        module.r = r[i : i + 1]
        outs.append(module(
            hidden_states=tokens[i : i + 1], timestep=t[i : i + 1], img_shapes=shapes,
            encoder_hidden_states=cond["tokens"][i : i + 1, :length],
        ).sample[:, : x_t.shape[1] * x_t.shape[2] // 4])
    return torch.cat(outs)


def packed(latents) -> np.ndarray:
    return _packed(torch.from_numpy(np.array(latents))).numpy()


def pair(config: Config, references=()):
    """Our parameters, the oracle, our inputs and the oracle's."""
    module = oracle(config)
    params = params_of(module, transformer.table(config), flax.core.meta.unbox(abstract(config)))
    ours = inputs(config, references)
    return params, module, ours, jax.tree.map(torch.from_numpy, ours)


QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0)
def apply(config: Config, params, x_t, t, r, cond):
    return Transformer(config).apply({"params": params}, x_t, t, r, cond)


def error(config: Config, references=()) -> float:
    params, module, ours, others = pair(config, references)
    with torch.no_grad():
        expected = theirs(module, *others)
    return relative_error(packed(apply(config, params, *ours)), expected)


@pytest.mark.parametrize(
    ("changes", "references"),
    [
        ({}, ()),  # 5x3 tokens, t of both signs, r on both sides of it
        ({"time_conditioning": "half_r"}, ()),
        ({"time_conditioning": "gated"}, ()),
        ({"zero_cond_t": True}, ()),
        ({}, [(4, 14)]),  # the reference is the larger image: text starts after it
        ({"zero_cond_t": True}, [(4, 14), (6, 2)]),
        ({"zero_cond_t": True, "time_conditioning": "half_r"}, [(6, 2)]),
    ],
    ids=["odd", "half_r", "gated", "zero_cond_t alone", "reference", "zero_cond_t", "both"],
)
def test_parity(changes, references):
    assert error(dataclasses.replace(SMALL, **changes), references) <= 2e-5


def gates_as_the_targets(monkeypatch):
    whole = transformer.Stream.update
    monkeypatch.setattr(
        transformer.Stream, "update", lambda self, h, attended, gate_1, shift, scale, gate_2:
        whole(self, h, attended, gate_1[:, :1], shift, scale, gate_2[:, :1]),
    )


def placed_otherwise(change):
    def mutate(monkeypatch):
        whole = transformer.positions
        monkeypatch.setattr(
            transformer, "positions", lambda grids, length: change(whole, grids, length)
        )

    return mutate


def text_after_the_target(whole, grids, length):
    places = whole(grids, length)
    places[-length:] = whole(grids[:1], length)[-length:]
    return places


def one_frame(whole, grids, length):
    places = whole(grids, length)
    places[:-length, 0] = 0
    return places


@pytest.mark.parametrize("mutate", [
    gates_as_the_targets, placed_otherwise(text_after_the_target), placed_otherwise(one_frame),
    None,
], ids=["gate", "text", "frame", "zero_cond_t"])
def test_mistakes_with_references_show(mutate, monkeypatch):
    """Each is far beyond the bound of test_parity."""
    config = dataclasses.replace(SMALL, zero_cond_t=True)
    params, module, ours, others = pair(config, [(4, 14), (6, 2)])
    if mutate:
        mutate(monkeypatch)
    else:
        config = dataclasses.replace(config, zero_cond_t=False)
    velocity = jax.jit(Transformer(config).apply)({"params": params}, *ours)
    with torch.no_grad():
        assert relative_error(packed(velocity), theirs(module, *others)) > 1e-2


def test_a_block_at_full_width():
    config = dataclasses.replace(SMALL, layers=1, heads=24, head_dim=128, rope_axes=(16, 56, 56))
    params, module, ours, others = pair(config)
    params = jax.device_put(params)  # once: they are large
    with torch.no_grad():
        expected = theirs(module, *others)
    for dtype, bound in BOUNDS.items():
        velocity = apply(dataclasses.replace(config, dtype=dtype), params, *ours)
        assert relative_error(packed(velocity), expected) <= bound


def test_bfloat16():
    assert error(dataclasses.replace(SMALL, dtype="bfloat16"), [(4, 14)]) <= 2e-2


@functools.partial(jax.jit, static_argnums=0)
def gradients(config: Config, params, args, direction):
    """Of <velocity, direction>, with respect to parameters, x_t and cond's arrays."""
    def loss(params, x_t, tokens, references):
        cond = args[3] | {"tokens": tokens, "references": references}
        velocity = Transformer(config).apply({"params": params}, x_t, args[1], args[2], cond)
        return (velocity * direction).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3))(
        params, args[0], args[3]["tokens"], args[3]["references"]
    )


def test_gradients():
    config = dataclasses.replace(SMALL, zero_cond_t=True)
    params, module, ours, others = pair(config, [(4, 2)])
    direction = np.random.default_rng(2).normal(size=ours[0].shape).astype(np.float32)
    leaves = [others[0], others[3]["tokens"], *others[3]["references"]]
    for leaf in leaves:
        leaf.requires_grad_()
    (theirs(module, *others) * torch.from_numpy(packed(direction))).sum().backward()

    grads, *ours = gradients(config, params, ours, direction)
    for mine, leaf in zip(jax.tree.leaves(ours), leaves, strict=True):
        assert relative_error(mine, leaf.grad) <= 1e-4
    padding = ~others[3]["mask"].numpy()
    assert padding.any() and not np.asarray(ours[1])[padding].any()

    expected = dict(module.named_parameters())
    grads, blind = names.flatten(grads), set()
    names_ = transformer.table(config)
    for rule in names_.rules:
        leaves = grads[rule.path] if rule.stacked else grads[rule.path][None]
        for key, mine in zip(names_.keys(rule), np.asarray(leaves), strict=True):
            if expected[key].grad is None or not expected[key].grad.any():
                blind.add(key)
                assert not mine.any(), key
            else:
                assert relative_error(rule.theirs(mine), expected[key].grad) <= 1e-4, key
    text = ("attn.to_add_out", "attn.norm_added_q", "attn.add_q_proj", "txt_mlp")
    last = [key for key in expected if key.startswith("transformer_blocks.1.")]
    assert blind == {key for key in last if any(part in key for part in text)}


def test_remat():
    """Policies give equal gradients, and need less memory one after the other."""
    deep = dataclasses.replace(SMALL, layers=8, sample_shape=(16, 16, 16))
    params, _, ours, _ = pair(deep)
    results, memory = {}, {}
    for name in remat.POLICIES:
        config = dataclasses.replace(deep, remat=name)
        compiled = gradients.lower(config, params, ours, ours[0]).compile(QUICK)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        results[name] = compiled(params, ours, ours[0])
    for name in remat.POLICIES:
        for mine, want in zip(*map(jax.tree.leaves, (results[name], results["none"])), strict=True):
            assert np.linalg.norm(mine - want) <= 1e-5 * np.linalg.norm(want)
    assert list(remat.POLICIES) == sorted(memory, key=memory.get, reverse=True), memory


def test_unknown_remat():
    with pytest.raises(UserError, match="'some'; give one of none, dots, attention, full"):
        Config(remat="some")


def test_text_padding():
    params, _, ours, _ = pair(SMALL)
    oracles.assert_text_padding_is_not_seen(functools.partial(apply, SMALL, params), ours)


def test_equal_times_ignore_the_second_embedder():
    params, _, ours, _ = pair(SMALL)
    oracles.assert_equal_times_ignore_the_second_embedder(apply, SMALL, params, ours)


def test_gated_is_the_base_at_zero():
    config = dataclasses.replace(SMALL, time_conditioning="gated")
    params, _, ours, _ = pair(config)
    oracles.assert_gated_is_the_base_at_zero(apply, config, params, ours)
    drawn = jax.jit(Transformer(config).init)(jax.random.key(0), *ours)["params"]
    assert not np.any(flax.core.meta.unbox(drawn)["gated_time_embedder"]["out"]["kernel"])


def test_initialisation():
    """A fresh network is zero everywhere, but not blind: its output layer gets a gradient."""
    ours = inputs(SMALL)
    boxed = jax.jit(Transformer(SMALL).init)(jax.random.key(0), *ours)["params"]
    params = flax.core.meta.unbox(boxed)
    assert not np.asarray(apply(SMALL, params, *ours)).any()
    assert np.std(params["layers"]["image"]["query"]["kernel"]) > 0.5 * SMALL.width**-0.5
    layers = params["layers"]["text"]["mlp_hidden"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize(
    ("second", "keys", "count"), [(False, 1933, 20_430_401_088), (True, 1937, 20_440_630_848)]
)
def test_published_names(second, keys, count):
    sees = "second_embedder" if second else "half_r"
    config = dataclasses.replace(Config.from_published(PUBLISHED), time_conditioning=sees)
    leaves = names.flatten(flax.core.meta.unbox(abstract(config)))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
    shapes = transformer.table(config).shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert len(transformer.table(config).rules) == len(leaves)
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (keys, count)
    with torch.device("meta"):
        module = QwenImageTransformer2DModel()
        if second:
            module.time_text_embed_2 = type(module.time_text_embed)(config.width)
    assert shapes == {key: tuple(p.shape) for key, p in module.state_dict().items()}


def test_logical_axes():
    boxes = abstract(Config())
    for box in jax.tree.leaves(boxes, is_leaf=lambda x: isinstance(x, flax.core.meta.AxisMetadata)):
        assert len(box.names) == box.value.ndim
    block = boxes["layers"]["image"]
    assert block["query"]["kernel"].names == ("layers", "embed", "heads")
    assert block["query"]["bias"].names == ("layers", "heads")
    assert block["out"]["kernel"].names == ("layers", "heads", "embed")
    assert block["mlp_out"]["kernel"].names == ("layers", "mlp", "embed")
    assert block["mlp_out"]["bias"].names == ("layers", None)
    assert boxes["modulation"]["text"]["kernel"].names == (None, "embed", "modulation")
    assert boxes["text_in"]["kernel"].names == ("text", None)


def test_published_config():
    assert Config.from_published(PUBLISHED) == Config()
    edit = PUBLISHED | {"_class_name": "QwenImageTransformer2DModelWrapper", "zero_cond_t": True}
    assert Config.from_published(edit) == Config(zero_cond_t=True)
    wrong = PUBLISHED | {
        "_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "patch_size": 1,
        "out_channels": None, "num_layers": "60", "window": 3,
    }
    with pytest.raises(UserError) as error:
        Config.from_published(wrong)
    message = str(error.value)
    for part in ("Flux", "guidance_embeds", "patch_size", "in_channels 64", "num_layers", "window"):
        assert part in message
    with pytest.raises(UserError, match="sample_shape.*divisible by 2; num_classes.*; rope_axes"):
        Config(rope_axes=(16, 56, 58), sample_shape=(63, 64, 16), num_classes=3)
    with pytest.raises(UserError, match=r"model.sample_shape is \(0, .*; model.dtype is 'float16'"):
        Config(sample_shape=(0, 64, 16), dtype="float16")


def test_odd_latents():
    ours = inputs(dataclasses.replace(SMALL, sample_shape=(8, 8, 16)))
    with pytest.raises(UserError, match="7x8"):
        jax.eval_shape(Transformer(SMALL).init, jax.random.key(0), ours[0][:, 1:], *ours[1:])
