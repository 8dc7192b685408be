"""The SANA transformer against diffusers' module, with random weights."""

import dataclasses
import functools
import types

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormSingle

from tests.models import oracles
from tests.models.oracles import params_of, relative_error
from twinflow_jax.errors import UserError
from twinflow_jax.models import names, remat
from twinflow_jax.models.linear_attention import linear_attention
from twinflow_jax.models.sana import NETWORKS, transformer
from twinflow_jax.models.sana.transformer import Config, Transformer

NETWORK = NETWORKS["transformer"]
SMALL = Config(
    sample_shape=(5, 3, 32), layers=2, heads=3, cross_heads=2, cross_head_dim=48, text_width=40
)
SPRINT = dataclasses.replace(SMALL, qk_norm=True, guidance_embeds=True)
LENGTHS = (5, 1)

PUBLISHED = {
    "_class_name": "SanaTransformer2DModel", "_diffusers_version": "0.32.0.dev0",
    "attention_bias": False, "attention_head_dim": 32, "caption_channels": 2304,
    "cross_attention_dim": 1152, "cross_attention_head_dim": 72, "dropout": 0.0,
    "in_channels": 32, "interpolation_scale": None, "mlp_ratio": 2.5,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "num_attention_heads": 36,
    "num_cross_attention_heads": 16, "num_layers": 28, "out_channels": 32, "patch_size": 1,
    "sample_size": 16,
}
WIDE = {
    "num_attention_heads": 70, "cross_attention_dim": 2240, "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112, "num_layers": 20, "sample_size": 32,
}
QK = {"qk_norm": "rms_norm_across_heads"}
GUIDED = QK | {"guidance_embeds": True, "guidance_embeds_scale": 0.1}


def published(config: Config) -> dict:
    """diffusers' arguments for a config of ours."""
    return {
        "num_layers": config.layers, "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim, "cross_attention_dim": config.width,
        "num_cross_attention_heads": config.cross_heads, "mlp_ratio": config.mlp_ratio,
        "cross_attention_head_dim": config.cross_head_dim, "caption_channels": config.text_width,
        "guidance_embeds": config.guidance_embeds, "sample_size": config.sample_shape[0],
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
    }


def oracle(config: Config) -> torch.nn.Module:
    """diffusers' module, every tensor random, which sees r as the config says."""
    torch.manual_seed(0)
    module = SanaTransformer2DModel(**published(config))
    if config.time_conditioning == "half_r":
        see = lambda _, args: (args[0] - module.scaled_r / 2, *args[1:])
        module.time_embed.register_forward_pre_hook(see)
    else:
        second = "time_embed" + {"second_embedder": "_2", "gated": "_gated"}[
            config.time_conditioning
        ]
        setattr(module, second, AdaLayerNormSingle(config.width))
        hook = functools.partial(_add_second, module, second)
        module.time_embed.register_forward_hook(hook)
    with torch.no_grad():
        for key, p in module.named_parameters():
            if key.endswith("scale_shift_table"):
                p.normal_(0.0, 0.3)
            elif p.ndim > 1:
                p.mul_(3**0.5)  # PyTorch's initialisation is uniform: up to unit variance
            else:
                p.normal_(1.0 if key.endswith("weight") else 0.0, 0.3)
    return module


def _add_second(module, name, _, args, outputs):
    """m1(t) + (t - r) m2(r) for both outputs, by TwinFlow's definition, or m1(t) + r m2(r)."""
    seconds = getattr(module, name)(module.scaled_r, hidden_dtype=torch.float32)
    weight = module.r if name.endswith("gated") else module.interval
    return tuple(
        out + second * weight[:, None]
        for out, second in zip(outputs, seconds, strict=True)
    )


def abstract(config: Config):
    """Boxed abstract parameters."""
    one, time = jnp.zeros((1, *config.sample_shape)), jnp.zeros(1)
    cond = {
        "tokens": jnp.zeros((1, 1, config.text_width)), "mask": jnp.ones((1, 1), bool),
        "guidance": time,
    }
    init = functools.partial(Transformer(config).init, jax.random.key(0))
    return jax.eval_shape(init, one, time, time, cond)["params"]


def inputs(config: Config, seed: int = 1):
    """(x_t, t, r, cond): t of both signs, r on both sides of it, texts of LENGTHS."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rows = len(LENGTHS)
    cond = {
        "tokens": normal(rows, max(LENGTHS), config.text_width),
        "mask": np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None],
    }
    if config.guidance_embeds:
        cond["guidance"] = np.array([4.5, 1.2], np.float32)
    t, r = np.array([0.83, -0.37], np.float32), np.array([0.21, 0.94], np.float32)
    return normal(rows, *config.sample_shape), t, r, cond


def theirs(config: Config, module, x_t, t, r, cond) -> torch.Tensor:
    """The oracle's velocity, channels last; tensors in and out."""
    scale = 1.0 if config.guidance_embeds else 1000.0
    module.scaled_r, module.r, module.interval = scale * r, r, t - r
    guidance = {"guidance": 0.1 * cond["guidance"]} if config.guidance_embeds else {}
    return module(
        x_t.permute(0, 3, 1, 2), cond["tokens"], scale * t,
        encoder_attention_mask=cond["mask"].float(), **guidance,
    ).sample.permute(0, 2, 3, 1)


def pair(config: Config):
    """Our parameters, the oracle, our inputs and the oracle's."""
    module = oracle(config)
    params = params_of(module, transformer.table(config), flax.core.meta.unbox(abstract(config)))
    ours = inputs(config)
    return params, module, ours, jax.tree.map(torch.from_numpy, ours)


# Compiling takes longer than running.
quick = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)


@quick
def apply(config: Config, params, x_t, t, r, cond):
    return Transformer(config).apply({"params": params}, x_t, t, r, cond)


def error(config: Config) -> float:
    params, module, ours, others = pair(config)
    with torch.no_grad():
        expected = theirs(config, module, *others)
    return relative_error(apply(config, params, *ours), expected)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (SMALL, {}),
        (SMALL, {"qk_norm": True}),
        (SPRINT, {}),
        (SPRINT, {"time_conditioning": "half_r"}),
        (SPRINT, {"time_conditioning": "gated"}),
        (Config(sample_shape=(5, 3, 32), layers=1), {}),
        (SPRINT, {"layers": 1, "heads": 70, "cross_heads": 20, "cross_head_dim": 112}),
    ],
    ids=["1.0", "1.5", "Sprint", "half_r", "gated", "0.6B width", "1.6B width"],
)
def test_parity(config, changes):
    assert error(dataclasses.replace(config, **changes)) <= 2e-5


@pytest.mark.parametrize("config", [SMALL, SPRINT], ids=["1.0", "Sprint"])
def test_bfloat16(config):
    assert error(dataclasses.replace(config, dtype="bfloat16")) <= 2e-2


def test_gradients():
    params, module, ours, others = pair(SPRINT)
    direction = np.random.default_rng(2).normal(size=ours[0].shape).astype(np.float32)
    leaves = [others[0], others[3]["tokens"]]
    for leaf in leaves:
        leaf.requires_grad_()
    (theirs(SPRINT, module, *others) * torch.from_numpy(direction)).sum().backward()

    grads, *mine = oracles.gradients(NETWORK, SPRINT, params, ours, direction)
    for our, leaf in zip(mine, leaves, strict=True):
        assert relative_error(our, leaf.grad) <= 1e-4
    assert not np.asarray(mine[1])[~ours[3]["mask"]].any()

    expected = dict(module.named_parameters())
    for key, our in oracles.published_gradients(transformer.table(SPRINT), grads).items():
        assert relative_error(our, expected[key].grad) <= 1e-4, key


def reference_attention(query, key, value):
    """diffusers' processor on queries, keys and values as they are."""
    same = lambda x: x
    flat = lambda x: x.flatten(2)
    attn = types.SimpleNamespace(
        to_q=lambda _: flat(query), to_k=lambda _: flat(key), to_v=lambda _: flat(value),
        norm_q=None, norm_k=None, heads=query.shape[2], to_out=(same, same),
    )
    return SanaLinearAttnProcessor2_0()(attn, query).unflatten(2, query.shape[2:])


@jax.jit
def attention_and_gradients(query, key, value, direction):
    mean, pullback = jax.vjp(linear_attention, query, key, value)
    return mean, pullback(direction)


def attention_inputs(query_scale=1.0, key_scale=1.0):
    rng = np.random.default_rng(0)
    query, key, value, direction = rng.normal(size=(4, 2, 6, 3, 8)).astype(np.float32)
    return query * np.float32(query_scale), key * np.float32(key_scale), value, direction


@pytest.mark.parametrize("query_scale", [1e-9, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("key_scale", [1e-9, 1.0, 1e6])
def test_linear_attention(query_scale, key_scale):
    arrays = attention_inputs(query_scale, key_scale)
    tensors = [torch.from_numpy(a).requires_grad_() for a in arrays[:3]]
    expected = reference_attention(*tensors)
    mean, mine = attention_and_gradients(*arrays)
    assert relative_error(mean, expected.detach()) <= 2e-6
    if query_scale * key_scale > 1e-6:
        (expected * torch.from_numpy(arrays[3])).sum().backward()
        for our, tensor in zip(mine, tensors, strict=True):
            assert relative_error(our, tensor.grad) <= 1e-5
    else:
        assert not any(np.asarray(our).any() for our in mine)


@pytest.mark.parametrize("dead", ["queries", "keys", "one query", "no common channel"])
def test_linear_attention_of_zero_sums(dead):
    """Sums of zero, and those next to it, have the reference's value and no gradient."""
    for scale in (0.0, 1e-30, 1e-14):  # of what is left of the dead ones
        query, key, value, direction = attention_inputs()
        tiny = lambda x: np.where(x > 0, x * scale, x).astype(np.float32)  # noqa: B023
        if dead == "queries":
            query = tiny(query)
        elif dead == "keys":
            key = tiny(key)
        elif dead == "one query":
            query[1, 2] = tiny(query[1, 2])
        else:
            query[..., ::2], key[..., 1::2] = tiny(query[..., ::2]), tiny(key[..., 1::2])
        expected = reference_attention(*map(torch.from_numpy, (query, key, value)))
        mean, grads = attention_and_gradients(query, key, value, direction)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
        for grad in grads:
            assert np.abs(grad).max() < 1e3
        assert not np.asarray(grads[0][1, 2]).any()
        if dead != "one query":
            assert not any(np.asarray(grad).any() for grad in grads)


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_gradients_are_finite(scale):
    """Through blocks whose queries are dead, or as good as dead."""
    params, _, ours, _ = pair(SPRINT)
    query = params["layers"]["self_attention"]["query"]
    query["kernel"] = query["kernel"] * scale
    grads = oracles.gradients(NETWORK, SPRINT, params, ours, ours[0])
    chex.assert_tree_all_finite(grads)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) < 1e4


def test_remat():
    """Each policy keeps less for the backward pass than the one before it; "offload" keeps what
    "full" does, elsewhere."""
    def kept(name):
        config = dataclasses.replace(SPRINT, sample_shape=(16, 16, 32), remat=name)
        given = jax.tree.map(jnp.asarray, inputs(config))
        apply = lambda params: Transformer(config).apply({"params": params}, *given)
        params = flax.core.meta.unbox(abstract(config))
        _, pullback = jax.eval_shape(functools.partial(jax.vjp, apply), params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    kept_by = {name: kept(name) for name in remat.POLICIES}
    assert kept_by.pop("offload") == kept_by["full"]
    assert list(kept_by) == sorted(kept_by, key=kept_by.get, reverse=True), kept_by
    assert len(set(kept_by.values())) == len(kept_by)


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
    init = quick(lambda config, *args: Transformer(config).init(*args))
    drawn = flax.core.meta.unbox(init(config, jax.random.key(0), *ours)["params"])
    assert not np.any(drawn["gated_time_embedder"]["time"]["out"]["kernel"])


def test_initialisation():
    """A fresh network is zero everywhere, and each part has its own scale."""
    ours = inputs(SMALL)
    init = quick(lambda config, *args: Transformer(config).init(*args))
    params = init(SMALL, jax.random.key(0), *ours)["params"]
    params = flax.core.meta.unbox(params)
    assert not np.asarray(apply(SMALL, params, *ours)).any()
    query = params["layers"]["self_attention"]["query"]["kernel"]
    assert np.std(query) > 0.5 * SMALL.width**-0.5
    assert not np.array_equal(query[0], query[1])
    second = names.flatten(params["second_time_embedder"])
    for path, leaf in second.items():
        std = 0.02 if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "keys", "count"),
    [
        ({}, 548, 591_747_872),
        (WIDE, 396, 1_604_462_752),
        (WIDE | QK, 476, 1_604_641_952),
        (WIDE | QK | {"num_layers": 60}, 1396, 4_721_825_952),
        (GUIDED, 664, 593_501_216),
        (WIDE | GUIDED, 480, 1_610_237_472),
    ],
    ids=["0.6B", "1.6B", "1.5 1.6B", "1.5 4.8B", "Sprint 0.6B", "Sprint 1.6B"],
)
@pytest.mark.parametrize("second", [False, True])
def test_published_names(changes, keys, count, second):
    config = Config.from_published(PUBLISHED | changes)
    sees = "second_embedder" if second else "half_r"
    config = dataclasses.replace(config, time_conditioning=sees)
    extra = {1152: 9_593_856, 2240: 35_714_560}[config.width] if second else 0
    leaves = names.flatten(flax.core.meta.unbox(abstract(config)))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
    table = transformer.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert len(table.rules) == len(leaves)
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (keys + 6 * second, count + extra)
    with torch.device("meta"):
        module = SanaTransformer2DModel(**{
            key: value for key, value in (PUBLISHED | changes).items() if key[0] != "_"
        })
        if second:
            module.time_embed_2 = AdaLayerNormSingle(config.width)
    assert shapes == {key: tuple(p.shape) for key, p in module.state_dict().items()}
    optional = {key for key in shapes if key.startswith("time_embed_2.")}
    assert table.group(names.KNOWS_R) == optional and len(optional) == 6 * second


def test_logical_axes():
    boxes = abstract(SPRINT)
    for box in jax.tree.leaves(boxes, is_leaf=lambda x: isinstance(x, flax.core.meta.AxisMetadata)):
        assert len(box.names) == box.value.ndim
    block = boxes["layers"]
    for attention in (block["self_attention"], block["cross_attention"]):
        assert attention["query"]["kernel"].names == ("layers", "embed", "heads")
        assert attention["out"]["kernel"].names == ("layers", "heads", "embed")
        assert attention["out"]["bias"].names == ("layers", None)
    assert block["mlp"]["depthwise"]["kernel"].names == ("layers", None, None, None, "mlp")
    assert block["mlp"]["out"]["kernel"].names == ("layers", "mlp", "embed")
    assert block["modulation"].names == ("layers", None, None)
    assert boxes["text_hidden"]["kernel"].names == ("text", None)
    assert boxes["time_embedder"]["modulation"]["kernel"].names == ("embed", "modulation")


def test_published_config():
    assert Config.from_published(PUBLISHED) == Config()
    wide = Config.from_published({"_class_name": "SanaTransformer2DModelWrapper"})
    assert wide == Config.from_published(PUBLISHED | WIDE) == Config(
        sample_shape=(32, 32, 32), layers=20, heads=70, cross_heads=20, cross_head_dim=112
    )
    teacher = Config.from_published(PUBLISHED | QK | {"timestep_scale": 0.001})
    sprint = Config.from_published(PUBLISHED | GUIDED | {"mlp_ratio": 3})
    assert (Config().time_scale, teacher.time_scale, sprint.time_scale) == (1000.0, 1.0, 1.0)
    assert (teacher.qk_norm, teacher.guidance_embeds, sprint.mlp_width) == (True, False, 3456)

    wrong = PUBLISHED | {
        "_class_name": "PixArtTransformer2DModel", "interpolation_scale": 2.0, "patch_size": 2,
        "attention_bias": True, "dropout": 0.1, "norm_elementwise_affine": True, "norm_eps": 1e-5,
        "qk_norm": "layer_norm", "out_channels": 64, "cross_attention_dim": 1024,
        "num_layers": "28", "sample_size": None, "window": 3,
    }
    with pytest.raises(UserError) as error:
        Config.from_published(wrong)
    message = str(error.value)
    assert message.count(";") == len(wrong.keys() - PUBLISHED.keys()) + 11 - 1
    for part in (*(wrong.keys() - PUBLISHED.keys()), "PixArt", "interpolation_scale is 2.0"):
        assert part in message
    with pytest.raises(UserError, match="mlp_width.*; sample_shape.*; num_classes"):
        Config(mlp_ratio=0.001, heads=1, sample_shape=(16, 16, 4), num_classes=3)
    with pytest.raises(UserError, match="model.dtype is 'float16'.*; model.mlp_ratio is 0"):
        Config(mlp_ratio=0, dtype="float16")


def test_missing_guidance():
    x_t, t, r, cond = inputs(SMALL)
    with pytest.raises(UserError, match="no 'guidance'"):
        jax.eval_shape(Transformer(SPRINT).init, jax.random.key(0), x_t, t, r, cond)
