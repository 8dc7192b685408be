"""The Z-Image transformer against diffusers' module, with random weights; the twin's properties."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

from tests.models import oracles
from tests.models.oracles import BOUNDS, QUICK, relative_error
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.zimage import NETWORKS, transformer
from twinflow_jax.models.zimage.transformer import Config, Transformer

NETWORK = NETWORKS["transformer"]
SMALL = Config(  # 5 x 7 patches, filled up to 64
    sample_shape=(10, 14, 16), layers=2, refiners=2, heads=3, head_dim=32, text_width=48,
    rope_axes=(8, 12, 12),
)
PUBLISHED = {  # transformer/config.json of Tongyi-MAI/Z-Image-Turbo, and of Z-Image
    "_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0.dev0",
    "all_f_patch_size": [1], "all_patch_size": [2], "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "cap_feat_dim": 2560, "dim": 3840, "in_channels": 16,
    "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2, "norm_eps": 1e-05,
    "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0,
}
LENGTHS = (37, 3, 32)  # of texts: filled up to 64, 32 and not at all
SECOND, TWIN = "second_time_embedder", "twin_time_embedder"


def module_of(config: Config) -> torch.nn.Module:
    return ZImageTransformer2DModel(
        dim=config.width, n_layers=config.layers, n_refiner_layers=config.refiners,
        n_heads=config.heads, n_kv_heads=config.heads, cap_feat_dim=config.text_width,
        axes_dims=list(config.rope_axes), axes_lens=[1536, 512, 512],
    )


def oracle(config: Config) -> torch.nn.Module:
    """diffusers' module with TwinFlow's second embedder and our third, every tensor random."""
    torch.manual_seed(0)
    module = module_of(config)
    embedder = type(module.t_embedder)
    for name in ("t_embedder_2", "t_embedder_3"):
        setattr(module, name, embedder(module.t_embedder.mlp[2].out_features, 1024))
    with torch.no_grad():
        for key, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 1.0 if "pad_token" in key else p.shape[1] ** -0.5)
            else:
                p.normal_(1.0 if "norm" in key else 0.0, 0.3)
    module.t_embedder.register_forward_hook(functools.partial(_add_others, module))
    return module


def _add_others(module, embedder, _, out):
    """The time embedding of (t, r), row by row, by TwinFlow's definition and ours."""
    t, r, zero = module.t, module.r, module.zero
    native = lambda a: (zero if a == 0 else np.sign(a)) * (1 - abs(a))
    parts = []
    for now, then in zip(t, r, strict=True):
        u, v = native(now), native(then)
        at = lambda value: torch.tensor([1000 * value], dtype=torch.float32)
        parts.append(embedder.forward(at(abs(u))) + abs(u - v) * module.t_embedder_2(at(v - u))
                     + (module.t_embedder_3(at(abs(u))) if now < 0 else 0))
    return torch.cat(parts)


def inputs(config: Config, seed: int = 1):
    """(x_t, t, r, cond); texts of LENGTHS, t of both signs, r on both sides of it and of it."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rows, longest = len(LENGTHS), max(LENGTHS)
    cond = {
        "tokens": normal(rows, longest, config.text_width),
        "mask": np.arange(longest) < np.array(LENGTHS)[:, None],
    }
    t, r = np.array([0.83, -0.37, 0.55], np.float32), np.array([0.21, -0.94, -0.7], np.float32)
    return normal(rows, *config.sample_shape), t, r, cond


def theirs(module, x_t, t, r, cond, zero: float = 1.0) -> torch.Tensor:
    """The oracle's velocity; tensors in and out."""
    module.t, module.r, module.zero = (np.asarray(a) for a in (t, r, zero))
    images = list(x_t.permute(0, 3, 1, 2)[:, :, None])
    lengths = cond["mask"].sum(1).tolist()
    texts = [tokens[:length] for tokens, length in zip(cond["tokens"], lengths, strict=True)]
    out = module(images, torch.zeros(len(images)), texts).sample
    return -torch.stack(out)[:, :, 0].permute(0, 2, 3, 1)


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


def test_parity():
    assert error(SMALL) <= BOUNDS["float32"]
    assert error(SMALL, "bfloat16") <= BOUNDS["bfloat16"]


@torch.no_grad()
def test_a_block_at_full_width():
    config, width = Config(), Config().width
    module = ZImageTransformerBlock(0, width, config.heads, config.heads, 1e-5, True)
    for key, p in module.named_parameters():
        one = 1.0 if "norm" in key else 0.0
        p.uniform_(-0.3, 0.3).add_(one) if p.ndim == 1 else p.uniform_(-1, 1).mul_(
            (3 / p.shape[1]) ** 0.5
        )
    state = module.state_dict()
    rules = names.stack("layers", transformer._block(True), "", 1)
    params = names.unflatten({
        rule.path[1:]: rule.ours(state[rule.key.removeprefix("layers.{}.")].numpy())
        for rule in rules
    })
    rng = np.random.default_rng(0)
    h, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 9, width), (2, 256)))
    lengths, turns = np.array([9, 5]), transformer.angles(np.arange(9), 128)
    # As published, adjacent channels turn together; the table pairs those of the two halves.
    for name in ("query", "key"):
        part = params["attention"][name]["kernel"]
        params["attention"][name]["kernel"] = names.Rule("", "", pairs=128).ours(part)
        norm = params["attention"][f"{name}_norm"]
        norm["scale"] = names.Rule("", "", pairs=128).ours(norm["scale"])
    expected = module(
        torch.from_numpy(h), torch.from_numpy(np.arange(9) < lengths[:, None]),
        torch.polar(torch.ones(1, 9, 64), torch.from_numpy(turns)[None]),
        torch.from_numpy(context),
    )
    inputs = h, context, lengths, np.cos(turns)[None], np.sin(turns)[None]
    for dtype, bound in BOUNDS.items():
        block = transformer.Block(dataclasses.replace(config, dtype=dtype))
        run = jax.jit(lambda params, *a: block.apply({"params": params}, *a)[0])  # noqa: B023
        ours = np.asarray(run(params, *inputs), np.float32)
        for row, length in enumerate(lengths):
            assert relative_error(ours[row, :length], expected[row, :length]) <= bound


@pytest.mark.parametrize("zero", [0, 1])
def test_times_of_zero(zero):
    """TwinFlow's released convention, in which the target time 0 is noise, and ours."""
    params, module, (x_t, t, _, cond), others = pair(SMALL)
    config, r = dataclasses.replace(SMALL, sign_of_zero=zero), np.zeros(3, np.float32)
    with torch.no_grad():
        expected = theirs(module, others[0], t, r, others[3], zero)
    assert relative_error(apply(config, params, x_t, t, r, cond), expected) <= 2e-5
    near = apply(config, params, x_t, np.abs(t), r + 1e-6, cond)
    moved = relative_error(apply(config, params, x_t, np.abs(t), r, cond), near)
    assert moved < 1e-3 if zero else moved > 1e-2  # a jump, where it is noise
    if not zero:
        ones = np.ones(3, np.float32)
        np.testing.assert_array_equal(
            apply(config, params, x_t, ones, r, cond), apply(config, params, x_t, ones, ones, cond)
        )


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
    for key, mine in oracles.published_gradients(NETWORK.table(SMALL), grads).items():
        assert relative_error(mine, expected[key].grad) <= 1e-4, key
    module.zero_grad()


def test_text_padding():
    params, _, ours, _ = pair(SMALL)
    oracles.assert_text_padding_is_not_seen(functools.partial(apply, SMALL, params), ours)
    alone = jax.tree.map(lambda a: a[1:2], ours)  # its 3 tokens without the others' 37
    alone = *alone[:3], {name: leaf[:, :3] for name, leaf in alone[3].items()}
    whole = apply(SMALL, params, *ours)[1:2]
    assert relative_error(apply(SMALL, params, *alone), whole) <= 2e-6


def test_a_text_of_no_tokens():
    """32 that are learned; nothing undefined."""
    params, _, (x_t, t, r, cond), _ = pair(SMALL)
    none = cond | {"mask": np.zeros_like(cond["mask"])}
    velocity = apply(SMALL, params, x_t, t, r, none)
    other = apply(SMALL, params, x_t, t, r, none | {"tokens": 9 * cond["tokens"]})
    np.testing.assert_array_equal(velocity, other)
    assert np.isfinite(velocity).all()


# The twin.


def fresh(params: dict, config: Config = SMALL) -> dict:
    """Embedders that a base checkpoint lacks as an import makes them."""
    flat = names.flatten(params)
    for rule in NETWORK.table(config).rules:
        if rule.copy_of:
            flat[rule.path] = flat[rule.path.replace(SECOND, "time_embedder").replace(
                TWIN, "time_embedder")]
        elif rule.normal is not None:
            flat[rule.path] = np.zeros_like(flat[rule.path])
    return names.unflatten(flat)


TIMES = [(0.7, 0.7), (0.7, 0.2), (1.0, 0.0), (-0.7, -0.7), (-0.4, -0.9), (0.0, 0.0), (-0.3, 0.8)]


def test_at_first_it_is_the_base_at_every_time():
    params, module, (x_t, *_, cond), others = pair(SMALL)
    start = fresh(params)
    for t, r in TIMES:
        t, r = (np.full(3, a, np.float32) for a in (t, r))
        base = oracles.base_velocity(apply, SMALL, start, x_t, np.abs(t), cond)
        assert relative_error(apply(SMALL, start, x_t, t, r, cond), base) <= 1e-6, (t, r)


def test_after_a_step_the_twin_is_apart():
    """Its own weights move it and nothing else: not one bit at t >= 0."""
    params, _, (x_t, t, _, cond), _ = pair(SMALL)
    start, t = fresh(params), np.abs(t)
    grads = oracles.gradients(NETWORK, SMALL, start, (x_t, -t, -t, cond), x_t)[0]
    assert np.abs(grads[TWIN]["out"]["kernel"]).max() > 0
    step = lambda a, g: a - 0.1 * g / np.abs(grads[TWIN]["out"]["kernel"]).max()
    moved = start | {TWIN: jax.tree.map(step, start[TWIN], grads[TWIN])}
    real, twin = (apply(SMALL, moved, x_t, s * t, s * t, cond) for s in (1, -1))
    assert relative_error(twin, real) > 1e-3
    for r in (t, 0.3 * t, np.zeros_like(t)):
        np.testing.assert_array_equal(
            apply(SMALL, moved, x_t, t, r, cond), apply(SMALL, start, x_t, t, r, cond)
        )


def test_released_weights_cannot_tell_it():
    """TwinFlow's four tensors alone: exactly its network, and the reason for ours."""
    params, module, (x_t, t, r, cond), others = pair(SMALL)
    released = params | {TWIN: fresh(params)[TWIN]}
    config = dataclasses.replace(SMALL, sign_of_zero=0)
    third = copy.deepcopy(module.t_embedder_3.state_dict())
    torch.nn.init.zeros_(module.t_embedder_3.mlp[2].weight)
    torch.nn.init.zeros_(module.t_embedder_3.mlp[2].bias)
    with torch.no_grad():
        expected = theirs(module, others[0], t, r, others[3], 0)
    module.t_embedder_3.load_state_dict(third)
    assert relative_error(apply(config, released, x_t, t, r, cond), expected) <= 2e-5
    np.testing.assert_array_equal(
        apply(config, released, x_t, t, t, cond), apply(config, released, x_t, -t, -t, cond)
    )


def test_what_a_folder_lacks_says_whose_it_is():
    table, config = NETWORK.table(SMALL), SMALL
    second, third = (table.group(name) for name in (names.KNOWS_R, TWIN))
    assert len(second) == len(third) == 4
    for lacking, zero in ((second | third, 1), (third, 0), ((), 1)):
        assert transformer.found(config, lacking).sign_of_zero == zero


def test_other_ways_to_see_r():
    gated = dataclasses.replace(SMALL, time_conditioning="gated")
    params, _, ours, _ = pair(SMALL)
    params = {{SECOND: "gated_time_embedder"}.get(k, k): v for k, v in params.items()}
    flat = names.flatten(params)
    flat |= {k: a for k, a in names.flatten(fresh(params, gated)).items() if k.startswith(TWIN)}
    oracles.assert_gated_is_the_base_at_zero(apply, gated, names.unflatten(flat), ours)
    drawn = jax.eval_shape(Transformer(gated).init, jax.random.key(0), *ours)["params"]
    assert names.flatten(drawn).keys() == flat.keys()


def test_equal_times_ignore_the_second_embedder():
    params, _, ours, _ = pair(SMALL)
    oracles.assert_equal_times_ignore_the_second_embedder(apply, SMALL, params, ours)


# Names.


@pytest.mark.parametrize(
    ("second", "keys", "count"), [(False, 525, 6_155_434_304), (True, 529, 6_155_959_872)]
)
def test_published_names(second, keys, count):
    """521 keys and 6,154,908,736 parameters are the base's; each embedder has 525,568."""
    sees = "second_embedder" if second else "half_r"
    config = dataclasses.replace(Config.from_published(PUBLISHED), time_conditioning=sees)
    leaves = names.flatten(NETWORK.abstract(config)[0])
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
    table = NETWORK.table(config)
    shapes = table.shapes({path: leaf.shape for path, leaf in leaves.items()})
    assert (len(shapes), sum(map(np.prod, shapes.values()))) == (keys, count)
    with torch.device("meta"):
        module = ZImageTransformer2DModel()
    base = {key: tuple(p.shape) for key, p in module.state_dict().items()}
    assert (len(base), sum(map(np.prod, base.values()))) == (521, 6_154_908_736)
    added = table.added(base)
    assert {key: shape for key, shape in shapes.items() if key not in added} == base
    assert len(added) == (8 if second else 4)


def test_logical_axes():
    axes = oracles.logical_axes(NETWORK, Config())
    assert axes["layers/attention/query/kernel"] == ("layers", "embed", "heads")
    assert axes["text_refiner/attention/out/kernel"] == ("layers", "heads", "embed")
    assert axes["image_refiner/mlp/gate/kernel"] == ("layers", "embed", "mlp")
    assert axes["layers/modulation/kernel"] == ("layers", None, "modulation")
    assert axes["text_in/kernel"] == ("text", None)
    assert axes["text_padding"] == (None, None)


def test_published_config():
    assert Config.from_published(PUBLISHED) == Config()
    wrapped = PUBLISHED | {"_class_name": "ZImageTransformer2DModelWrapper"}
    assert Config.from_published(wrapped) == Config()
    wrong = PUBLISHED | {
        "_class_name": "FluxTransformer2DModel", "siglip_feat_dim": 1152, "qk_norm": False,
        "dim": 3841, "n_kv_heads": 10, "n_layers": "30", "window": 3, "all_patch_size": [2, 4],
    }
    with pytest.raises(UserError) as failure:
        Config.from_published(wrong)
    for part in ("Flux", "siglip_feat_dim", "qk_norm", "n_kv_heads 10", "n_layers", "window",
                 "all_patch_size"):
        assert part in str(failure.value)
    with pytest.raises(UserError, match="dim 3841 is no multiple of n_heads 30"):
        Config.from_published(PUBLISHED | {"dim": 3841})
    with pytest.raises(UserError, match="sample_shape.*divisible by 2; num_classes.*; rope_axes"):
        Config(rope_axes=(32, 48, 50), sample_shape=(63, 64, 16), num_classes=3)


def test_odd_latents():
    ours = inputs(SMALL)
    with pytest.raises(UserError, match="9x14"):
        jax.eval_shape(Transformer(SMALL).init, jax.random.key(0), ours[0][:, 1:], *ours[1:])
