"""SD3's transformer against diffusers' module, with random weights."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock

from tests.models import oracles
from tests.models.oracles import BOUNDS, QUICK, relative_error
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.sd35 import NETWORKS, transformer
from twinflow_jax.models.sd35.transformer import Config, Transformer

NETWORK = NETWORKS["transformer"]
SMALL = Config(  # 5 x 7 patches, of a table that has an odd and an even rest on each side
    sample_shape=(10, 14, 16), layers=5, dual_layers=2, heads=2, head_dim=32, text_width=48,
    pooled_width=40, positions=12,
)
SD3 = dataclasses.replace(SMALL, layers=3, dual_layers=0, qk_norm=False)
PUBLISHED = {  # transformer/config.json of stabilityai/stable-diffusion-3.5-medium
    "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.31.0.dev0",
    "attention_head_dim": 64, "caption_projection_dim": 1536,
    "dual_attention_layers": list(range(13)), "in_channels": 16, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "sample_size": 128,
}
SD3_PUBLISHED = {  # of stabilityai/stable-diffusion-3-medium-diffusers, before there was the rest
    k: v for k, v in PUBLISHED.items() if k not in ("dual_attention_layers", "qk_norm")
} | {"pos_embed_max_size": 192}
LENGTHS = (9, 2, 6)  # of texts, the vector of all of it included
SECOND = "second_time_embedder"


def module_of(config: Config) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16, num_layers=config.layers, attention_head_dim=config.head_dim,
        num_attention_heads=config.heads, joint_attention_dim=config.text_width,
        caption_projection_dim=config.width, pooled_projection_dim=config.pooled_width,
        pos_embed_max_size=config.positions, qk_norm="rms_norm" if config.qk_norm else None,
        dual_attention_layers=tuple(range(config.dual_layers)),
    )


def oracle(config: Config) -> torch.nn.Module:
    """diffusers' module with TwinFlow's second embedder, every tensor random, the table too."""
    torch.manual_seed(0)
    module = module_of(config)
    module.time_text_embed_2 = copy.deepcopy(module.time_text_embed)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5)
            else:
                p.normal_(1.0 if "norm_" in key and key.endswith("weight") else 0.0, 0.3)
        module.pos_embed.pos_embed.normal_()
    module.time_text_embed.register_forward_hook(
        lambda _, inputs, first: first
        + (module.t - module.r)[:, None] * module.time_text_embed_2(1000 * module.r, inputs[1])
    )
    return module


def inputs(config: Config):
    """(x_t, t, r, cond); texts of LENGTHS, t of both signs, r on both sides of it and of it."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rows, longest = len(LENGTHS), max(LENGTHS)
    cond = {
        "tokens": normal(rows, longest, config.text_width),
        "mask": np.arange(longest) < np.array(LENGTHS)[:, None],
    }
    t, r = np.array([0.83, -0.37, 0.55], np.float32), np.array([0.21, -0.94, -0.7], np.float32)
    return normal(rows, *config.sample_shape), t, r, cond


def theirs(module, x_t, t, r, cond) -> torch.Tensor:
    """The oracle's velocity, row by row; tensors in and out."""
    rows, width = [], module.config.pooled_projection_dim
    for i, length in enumerate(cond["mask"].sum(1).tolist()):
        module.t, module.r = t[i : i + 1], r[i : i + 1]
        text = cond["tokens"][i : i + 1, :length]
        rows.append(module(
            x_t[i : i + 1].permute(0, 3, 1, 2), text[:, 1:], text[:, 0, :width], 1000 * module.t
        ).sample)
    return torch.cat(rows).permute(0, 2, 3, 1)


@functools.cache
def pair(config: Config):
    """Our parameters, the oracle, our inputs and the oracle's."""
    module = oracle(config)
    params = oracles.converted(module, NETWORK, config)
    ours = inputs(config)
    return params, module, ours, jax.tree.map(torch.from_numpy, ours)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def apply(config: Config, params, x_t, t, r, cond):
    return Transformer(config).apply({"params": params}, x_t, t, r, cond)


@torch.no_grad()
def error(config: Config, dtype: str = "float32") -> float:
    params, module, ours, others = pair(config)
    velocity = apply(dataclasses.replace(config, dtype=dtype), params, *ours)
    return relative_error(velocity, theirs(module, *others))


@pytest.mark.parametrize(
    "config", [SMALL, pytest.param(SD3, marks=pytest.mark.slow)], ids=["3.5", "3"]
)
def test_parity(config):
    assert error(config) <= BOUNDS["float32"]
    assert error(config, "bfloat16") <= BOUNDS["bfloat16"]


@pytest.mark.slow
@torch.no_grad()
def test_a_block_at_full_width():
    config, width = Config(), Config().width
    group = config.groups[0]._replace(layers=1)
    module = JointTransformerBlock(width, 24, 64, qk_norm="rms_norm", use_dual_attention=True)
    for key, p in module.named_parameters():
        one = 1.0 if "norm_" in key and key.endswith("weight") else 0.0
        p.uniform_(-0.3, 0.3).add_(one) if p.ndim == 1 else p.uniform_(-1, 1).mul_(
            (3 / p.shape[1]) ** 0.5
        )
    state, params = module.state_dict(), {}
    for rule in transformer._group(config, group):
        tensor = state[rule.key.removeprefix("transformer_blocks.{}.")]
        params[rule.path] = rule.ours(tensor.numpy())
    params = names.unflatten(params)
    rng = np.random.default_rng(0)
    image, text, context = (
        rng.normal(size=(2, *tokens, width)).astype(np.float32) for tokens in ((9,), (5,), ())
    )
    expected = module(*map(torch.from_numpy, (image, text, context)))
    silu = context / (1 + np.exp(-context))
    modulations = [
        (silu @ part["kernel"] + part["bias"])[:, None] for part in
        (params["dual_modulation"][stream] for stream in ("image", "text"))
    ]
    for dtype, bound in BOUNDS.items():
        block = transformer.Block(dataclasses.replace(config, dtype=dtype))
        run = jax.jit(lambda params, *a: block.apply({"params": params}, *a)[0])  # noqa: B023
        given = [jnp.asarray(a, dtype) for a in (image, text, *modulations)]
        ours = run(params["dual"], tuple(given[:2]), *given[2:], np.array([14, 14]))
        for mine, other in zip(ours, expected[::-1], strict=True):
            assert relative_error(np.asarray(mine, np.float32), other) <= bound


def test_gradients():
    params, module, ours, others = pair(SMALL)
    others = copy.deepcopy(others)
    direction = np.random.default_rng(2).normal(size=ours[0].shape).astype(np.float32)
    leaves = [others[0].requires_grad_(), others[3]["tokens"].requires_grad_()]
    (theirs(module, *others) * torch.from_numpy(direction)).sum().backward()

    grads, *of_inputs = oracles.gradients(NETWORK, SMALL, params, ours, direction)
    for mine, leaf in zip(of_inputs, leaves, strict=True):
        assert relative_error(mine, leaf.grad) <= 1e-4
    assert not np.asarray(of_inputs[1])[~ours[3]["mask"]].any()
    expected = dict(module.named_parameters())
    ours = oracles.published_gradients(NETWORK.table(SMALL), grads)
    assert ours.keys() - expected.keys() == {"pos_embed.pos_embed"}  # a buffer, never trained
    for key in ours.keys() & expected.keys():
        if not expected[key].grad.any():  # the last text's queries are nobody's
            assert "blocks.4.attn" in key and "add" in key and not ours[key].any(), key
        else:
            assert relative_error(ours[key], expected[key].grad) <= 1e-4, key
    module.zero_grad()


def test_text_padding():
    params, _, ours, _ = pair(SMALL)
    oracles.assert_text_padding_is_not_seen(functools.partial(apply, SMALL, params), ours)


@pytest.mark.slow
def test_a_text_of_no_tokens():
    """Nothing undefined, and nothing seen of what is there."""
    params, _, (x_t, t, r, cond), _ = pair(SMALL)
    only = {"tokens": cond["tokens"][:, :1], "mask": np.zeros((len(x_t), 1), bool)}
    none = cond | {"mask": np.zeros_like(cond["mask"])}
    velocity = apply(SMALL, params, x_t, t, r, only)
    assert np.isfinite(velocity).all()
    assert relative_error(apply(SMALL, params, x_t, t, r, none), velocity) <= 2e-6


@pytest.mark.slow
def test_how_it_sees_r():
    params, _, ours, _ = pair(SMALL)
    oracles.assert_equal_times_ignore_the_second_embedder(apply, SMALL, params, ours)
    gated = dataclasses.replace(SMALL, time_conditioning="gated")
    params = {{SECOND: "gated_time_embedder"}.get(k, k): v for k, v in params.items()}
    oracles.assert_gated_is_the_base_at_zero(apply, gated, params, ours)


# Names.


@pytest.mark.parametrize(
    ("published", "keys", "count"),
    [(PUBLISHED, 917, 2_251_435_200), (SD3_PUBLISHED, 691, 2_036_591_680)], ids=["3.5", "3"],
)
def test_published_names(published, keys, count):
    """909 keys and 2,243,171,520 parameters are the base's of 3.5, beside its table of positions;
    the second embedder has 8 and 8,263,680."""
    config = Config.from_published(published)
    leaves = names.flatten(NETWORK.abstract(config)[0])
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
    table = NETWORK.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    with torch.device("meta"):
        module = SD3Transformer2DModel(
            **{key: value for key, value in published.items() if not key.startswith("_")}
        )
    base = {key: tuple(p.shape) for key, p in module.state_dict().items()}
    added = table.added(base)
    assert {key: shape for key, shape in shapes.items() if key not in added} == base
    assert len(added) == 8
    total = sum(map(np.prod, shapes.values())) - config.positions**2 * config.width
    assert (len(shapes), total) == (keys, count)


def test_logical_axes():
    axes = oracles.logical_axes(NETWORK, Config())
    assert axes["dual/second/query/kernel"] == ("layers", "embed", "heads")
    assert axes["layers/text/mlp_hidden/kernel"] == ("layers", "embed", "mlp")
    assert axes["last/image/out/kernel"] == ("layers", "heads", "embed")
    assert axes["dual_modulation/image/kernel"] == (None, "embed", "modulation")
    assert axes["text_in/kernel"] == ("text", None)
    assert axes["positions"] == (None, None, "embed")


def test_published_config():
    assert Config.from_published(PUBLISHED) == Config()
    sd3 = Config.from_published(SD3_PUBLISHED)
    assert sd3 == Config(dual_layers=0, qk_norm=False, positions=192)
    wrong = PUBLISHED | {
        "_class_name": "FluxTransformer2DModel", "qk_norm": "layer_norm", "out_channels": 32,
        "dual_attention_layers": [1, 2], "caption_projection_dim": 1152, "window": 3,
        "num_layers": 24,
    }
    with pytest.raises(UserError) as failure:
        Config.from_published(wrong)
    for part in ("Flux", "qk_norm", "out_channels", r"[1, 2] are not the first", "1536", "window"):
        assert part in str(failure.value)
    with pytest.raises(UserError, match="num_layers is '24'"):
        Config.from_published(PUBLISHED | {"num_layers": "24"})
    with pytest.raises(UserError, match="larger than 12 positions.*pooled_width"):
        dataclasses.replace(SMALL, sample_shape=(26, 14, 16), pooled_width=49)
    with pytest.raises(UserError, match="dual_layers 3 must be less than layers 3"):
        dataclasses.replace(SMALL, layers=3, dual_layers=3)


def test_sides():
    ours = inputs(SMALL)
    init = functools.partial(jax.eval_shape, Transformer(SMALL).init, jax.random.key(0))
    with pytest.raises(UserError, match="9x14.*multiples of 2"):
        init(ours[0][:, 1:], *ours[1:])
    with pytest.raises(UserError, match="26x14.*12 positions"):
        init(np.zeros((3, 26, 14, 16), np.float32), *ours[1:])
