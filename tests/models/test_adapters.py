"""Adapters: what they compute, which projections have one, and how they start."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.oracles import QUICK
from twinflow_jax import models
from twinflow_jax.errors import UserError
from twinflow_jax.models import mlp, names, qwen_image, remat, sana, sd35
from twinflow_jax.models.adapters import Adapter, is_adapter
from twinflow_jax.models.settings import Settings

SECOND = ("second_time_embedder/.*",)
SMALL = {
    "mlp": {"sample_shape": (3,), "width": 16, "depth": 2, "num_classes": 4},
    "dit": {"sample_shape": (8, 8, 3), "width": 32, "depth": 2, "heads": 4, "num_classes": 4},
    "minilm_dit": {"sample_shape": (8, 8, 3), "width": 32, "depth": 2, "heads": 4,
                   "text_width": 24},
    "qwen_image": {"sample_shape": (4, 4, 16), "layers": 2, "heads": 2, "head_dim": 32,
                   "text_width": 24, "rope_axes": (8, 12, 12)},
    "sana": {"sample_shape": (4, 4, 32), "layers": 2, "heads": 2, "cross_heads": 2,
             "cross_head_dim": 32, "text_width": 24},
    "sd35": {"sample_shape": (4, 4, 16), "layers": 2, "dual_layers": 1, "heads": 2, "head_dim": 32,
             "text_width": 24, "pooled_width": 16, "positions": 8},
    "minilm_edit": {"sample_shape": (8, 8, 3), "layers": 2, "heads": 2, "text_width": 24},
}


def inputs(config: Settings) -> tuple:
    """Fresh random x_t, t, r and cond of three rows."""
    rng = np.random.default_rng()
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    cond = {"label": np.array([0, 1, 3])} if config.num_classes else {
        "tokens": normal(3, 5, config.text_width), "mask": np.arange(5) < np.array([[5], [2], [4]])
    }
    times = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
    given = normal(3, *config.sample_shape), times[0], times[0] * times[1], cond
    return jax.tree.map(jnp.asarray, given)


def merged(params: dict) -> dict:
    """The same network without adapters: each in its kernel, in float64."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in names.flatten(params).items()}
    for path in [path for path in flat if path.endswith("lora_a")]:
        a, b = flat.pop(path), flat.pop(path[:-1] + "b")
        kernel = path.replace("lora_a", "kernel")
        flat[kernel] = flat[kernel] + (a @ b).reshape(flat[kernel].shape)
    return names.unflatten({path: jnp.asarray(leaf, jnp.float32) for path, leaf in flat.items()})


@pytest.mark.parametrize("name", SMALL)
def test_an_adapter_is_a_kernel_of_low_rank(name):
    config = models.config_of(name).of({"name": name, **SMALL[name]})
    plain, with_one = models.build(config), models.build(config, adapter=Adapter(rank=3))
    given = inputs(config)

    fresh = with_one.init(jax.random.key(0))
    base = jax.tree.map(lambda a: a + 0.05, plain.init(jax.random.key(0)))  # no gate is zero
    flat = names.flatten(fresh)
    adapters = {path for path in flat if is_adapter(path)}
    assert not any(np.any(flat[path]) for path in adapters if path.endswith("b"))
    fresh = names.unflatten(names.flatten(base) | {path: flat[path] for path in adapters})
    of_base, of_both = jax.jit(plain.apply), jax.jit(with_one.apply)
    before = of_base(base, *given)
    apart = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    assert apart(of_both(fresh, *given), before) < 1e-5

    rng = np.random.default_rng()
    for path in adapters:  # all at once, and each must count
        flat[path] = rng.standard_normal(flat[path].shape).astype(np.float32) * 0.3
    moved = names.unflatten(names.flatten(base) | {path: flat[path] for path in adapters})
    after = of_both(moved, *given)
    assert apart(after, of_base(merged(moved), *given)) < 1e-4
    assert apart(after, before) > 1e-2
    for path, leaf in names.flatten(with_one.abstract_params()).items():
        axes = names.flatten(with_one.axes())[path]
        assert len(axes) in (0, leaf.ndim), path


def test_the_released_lists_have_as_many_parameters_as_peft_counts():
    for config, modules, count in (
        (qwen_image.transformer.Config(), 722, 425_279_488),
        (qwen_image.transformer.Config(time_conditioning="half_r"), 722, 425_279_488),
        (sana.transformer.Config(), 227, 33_783_808),
        (sd35.transformer.Config(), 193, 37_863_424),
    ):
        whole = SECOND if config.times.second else ()
        adapter = Adapter(rank=64, targets=("released",), whole=whole)
        leaves = names.flatten(models.build(config, adapter=adapter).abstract_params())
        made = {path: leaf for path, leaf in leaves.items() if is_adapter(path)}
        assert sum(leaf.size for leaf in made.values()) == count
        first = [leaf.shape for path, leaf in made.items() if path.endswith("a")]
        assert sum(shape[0] if len(shape) == 3 else 1 for shape in first) == modules


def test_peft_gaussian_and_its_spread():
    model = models.build(qwen_image.transformer.Config(layers=1), adapter=Adapter(rank=4))
    one = jax.jit(lambda key: names.flatten(model.init(key))["layers/image/out/lora_a"])
    a = one(jax.random.key(1))
    assert abs(a.std() * 4 - 1) < 0.02


def test_convolutions_take_none():
    config = models.config_of("unet").of({"name": "unet", "sample_shape": (8, 8, 3), "hidden": 8})
    leaves = names.flatten(models.build(config, adapter=Adapter(rank=2)).abstract_params())
    adapted = {path.rpartition("/")[0] for path in leaves if is_adapter(path)}
    assert "Dense_0" in adapted and not any("Conv" in path for path in adapted)


def test_only_adapters_and_what_trains_whole_is_trained():
    config = models.config_of("sana").of({"name": "sana", **SMALL["sana"]})
    model = models.build(config, adapter=Adapter(rank=2, targets=("attn2.to_q",), whole=SECOND))
    frozen = re.compile("|".join(model.fixed))
    free = [path for path in names.flatten(model.abstract_params()) if not frozen.fullmatch(path)]
    query = "layers/cross_attention/query/"
    assert [path for path in free if "second_time_embedder" not in path] == [
        f"{query}lora_a", f"{query}lora_b"
    ]
    assert any(path == "second_time_embedder/time/out/kernel" for path in free)


@pytest.mark.parametrize("targets, says", [
    (("to_qq", "mlp.net.9"), r"to_qq \(near: .*attn.to_q.*; mlp.net.9 \(near.*presets: all"),
    (("ff.conv_depth",), "ff.conv_depth"),
])
def test_targets_that_are_no_projections_are_named_together(targets, says):
    name = "sana" if "ff.conv_depth" in targets else "qwen_image"
    config = models.config_of(name).of({"name": name, **SMALL[name]})
    with pytest.raises(UserError, match=says):
        models.build(config, adapter=Adapter(rank=2, targets=targets))


@pytest.mark.parametrize("whole, says", [("(", "no pattern"), ("third/.*", "no weights: third")])
def test_patterns_that_stand_for_nothing_are_refused(whole, says):
    config = mlp.Config(sample_shape=(3,), width=8, depth=1)
    with pytest.raises(UserError, match=says):
        models.build(config, adapter=Adapter(rank=2, whole=(whole,)))


def test_a_network_without_adapters_is_as_it_was():
    config = mlp.Config(sample_shape=(3,), width=8, depth=1)
    plain, none = models.build(config), models.build(config, adapter=Adapter())
    chex.assert_trees_all_equal(plain.init(jax.random.key(3)), none.init(jax.random.key(3)))
    assert none.fixed == plain.fixed == ()


@pytest.mark.parametrize("name", ["dit", "qwen_image"])
def test_recomputing_layers_changes_no_gradient(name):
    """Of adapters, whose products policies do not name."""
    def gradient(policy: str):
        config = models.config_of(name).of({"name": name, "remat": policy, **SMALL[name]})
        model = models.build(config, adapter=Adapter(rank=3))

        def loss(low):
            return (model.apply(names.unflatten(flat | low), *given) ** 2).mean()

        low = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
        return jax.jit(jax.grad(loss), compiler_options=QUICK)(low)

    config = models.config_of(name).of({"name": name, **SMALL[name]})
    given, rng = inputs(config), np.random.default_rng()
    flat = names.flatten(jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.3, a.dtype),
        models.build(config, adapter=Adapter(rank=3)).abstract_params(),
    ))
    kept = gradient("none")
    assert all(np.any(leaf) for leaf in kept.values())
    largest = max(np.abs(leaf).max() for leaf in kept.values())
    for policy in remat.POLICIES.keys() - {"none"}:
        for path, leaf in gradient(policy).items():
            np.testing.assert_allclose(leaf, kept[path], atol=1e-5 * largest, err_msg=policy)
