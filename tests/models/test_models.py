"""The small networks: what their outputs depend on, and parity with independent references."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from twinflow_jax import models
from twinflow_jax.errors import UserError
from twinflow_jax.models import dit

IMAGE, ROWS, CLASSES = (8, 8, 1), 3, 4
QUICK = {"xla_backend_optimization_level": 0}
CONFIGS = {
    "mlp raw": {"name": "mlp", "sample_shape": IMAGE, "width": 16, "depth": 2, "times": "raw"},
    "mlp picture": {
        "name": "mlp", "sample_shape": IMAGE, "width": 16, "depth": 2, "times": "sinusoid",
        "estimates": "picture",
    },
    "mlp sinusoid": {
        "name": "mlp", "sample_shape": IMAGE, "width": 16, "depth": 2, "times": "sinusoid"
    },
    "unet": {
        "name": "unet", "sample_shape": IMAGE, "hidden": 4, "time_width": 6, "label_width": 5
    },
    "dit": {"name": "dit", "sample_shape": IMAGE, "width": 16, "depth": 3, "heads": 2},
}
TEXT = {"tokens": jnp.zeros((1, 5, 7)), "mask": jnp.ones((1, 5), bool)}


def weights(model: models.Model, scale: float = 0.4):
    """Random parameters: a fresh network's zeros and ones would hide dependences."""
    leaves, tree = jax.tree.flatten(model.abstract_params())
    rng = np.random.default_rng(3)
    return tree.unflatten(
        jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves
    )


@functools.cache
def network(name: str):
    """(model, random parameters, compiled apply) of a family, with classes."""
    model = models.create(CONFIGS[name] | {"num_classes": CLASSES})
    return model, weights(model), jax.jit(model.apply, compiler_options=QUICK)


def inputs(shape=IMAGE, t=0.7, r=0.2, label=1):
    x = jax.random.normal(jax.random.key(1), (ROWS, *shape))
    return x, jnp.full(ROWS, t), jnp.full(ROWS, r), {"label": jnp.full(ROWS, label)}


def change(a, b):
    """Mean difference relative to the mean size."""
    return float(jnp.abs(a - b).mean() / jnp.abs(a).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_output_has_the_shape_and_type_of_the_sample(name):
    model, params, apply = network(name)
    out = apply(params, *inputs())
    chex.assert_shape(out, (ROWS, *IMAGE))
    chex.assert_type([out, *jax.tree.leaves(params)], jnp.float32)
    chex.assert_tree_all_finite(out)
    assert model.sample_shape == IMAGE


def test_a_seed_fixes_the_fresh_parameters():
    model = network("mlp sinusoid")[0]
    init = jax.jit(model.init, compiler_options=QUICK)
    one, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal_shapes_and_dtypes(one, model.abstract_params())
    chex.assert_trees_all_equal(one, same)
    assert not np.array_equal(one["Dense_0"]["kernel"], other["Dense_0"]["kernel"])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "changed", [{"t": 0.5}, {"t": -0.7}, {"r": 0.1}, {"r": -0.2}, {"label": 2}, {"label": CLASSES}]
)
def test_output_depends_on_times_their_signs_and_the_class(name, changed):
    _, params, apply = network(name)
    assert change(apply(params, *inputs()), apply(params, *inputs(**changed))) > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_both_signs_differ_at_equal_times(name):
    """The twin losses need F(x, -t, -t) apart from F(x, t, t)."""
    _, params, apply = network(name)
    real, fake = (apply(params, *inputs(t=t, r=t)) for t in (0.4, -0.4))
    assert change(real, fake) > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_the_null_condition_is_the_class_after_the_last(name):
    model, params, apply = network(name)
    np.testing.assert_array_equal(model.null["label"], [CLASSES])
    assert model.cond([0, 2])["label"].dtype == jnp.int32
    x, t, r, _ = inputs()
    np.testing.assert_array_equal(
        apply(params, x, t, r, {"label": np.repeat(model.null["label"], ROWS)}),
        apply(params, *inputs(label=CLASSES)),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_do_not_see_each_other(name):
    _, params, apply = network(name)
    x, t, r, cond = inputs()
    t, cond = jnp.array([0.7, -0.3, 1.0]), {"label": jnp.array([0, 3, 4])}
    whole = apply(params, x, t, r, cond)
    order = jnp.array([2, 0, 1])
    moved = apply(params, x[order], t[order], r[order], {"label": cond["label"][order]})
    np.testing.assert_allclose(whole[order], moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_classes_the_condition_is_empty(name):
    model = models.create(CONFIGS[name] | {"num_classes": 0})
    assert model.cond(jnp.zeros(2)) == model.null == {}
    x, t, r, _ = inputs()
    out = jax.eval_shape(model.apply, model.abstract_params(), x, t, r, {})
    assert out.shape == x.shape


def test_an_estimated_picture_is_where_the_velocity_leads():
    """x - t F is what the last layer gives, down to a time; no noise is in it, down to another."""
    (_, params, offset), (_, _, picture) = network("mlp sinusoid"), network("mlp picture")
    for time, of_noise, of_picture in (
        (1.0, 1.0, 1.0), (0.7, 0.7, 0.7), (-0.8, 0.8, 0.8), (0.5, 0.5, 0.6), (0.1, 0.5, 0.6)
    ):
        x, t, r, cond = inputs(t=time)
        estimate = x - offset(params, x, t, r, cond)  # of the same weights
        found = of_picture * (x / of_noise - picture(params, x, t, r, cond))
        np.testing.assert_allclose(found, estimate, atol=1e-5)


@pytest.mark.parametrize("times", ["raw", "sinusoid"])
@pytest.mark.parametrize("shape", [(2,), (3, 5), (4, 4, 2)])
def test_the_mlp_takes_samples_of_any_rank(times, shape):
    model = models.create(
        {"name": "mlp", "sample_shape": shape, "width": 8, "depth": 1, "times": times}
    )
    x, t, r, _ = inputs(shape)
    assert jax.eval_shape(model.apply, model.abstract_params(), x, t, r, {}).shape == x.shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "unet", "sample_shape": (30, 28, 1)}, "divide by 4"),
        ({"name": "unet", "sample_shape": (28, 26, 1)}, "divide by 4"),
        ({"name": "unet", "sample_shape": (784,)}, "divide by 4"),
        ({"name": "dit", "sample_shape": (28, 30, 1)}, "model.patch"),
        ({"name": "dit", "sample_shape": (28, 28)}, "model.patch"),
        ({"name": "dit", "width": 40, "heads": 4}, "model.heads"),
        ({"name": "mlp", "times": "cosine"}, "model.times"),
        ({"name": "mlp", "witdh": 3}, "witdh"),
        ({"name": "resnet"}, "resnet"),
        ({}, "model.name"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        models.create(fields)


def test_lists_from_config_files_are_taken_as_shapes():
    assert models.create({"name": "unet", "sample_shape": [8, 8, 3]}).sample_shape == (8, 8, 3)


# DiT


def text_network():
    config = CONFIGS["dit"] | {"num_classes": 0}
    model = models.create(config, TEXT)
    return model, weights(model)


def test_padding_tokens_change_nothing():
    model, params = text_network()
    apply = jax.jit(model.apply, compiler_options=QUICK)
    x, t, r, _ = inputs()
    tokens = jax.random.normal(jax.random.key(5), (ROWS, 5, 7))
    mask = jnp.arange(5)[None] < jnp.array([5, 3, 1])[:, None]
    out = apply(params, x, t, r, {"tokens": tokens, "mask": mask})
    noisy = jnp.where(mask[..., None], tokens, 100.0)
    np.testing.assert_allclose(
        out, apply(params, x, t, r, {"tokens": noisy, "mask": mask}), rtol=1e-5, atol=1e-5
    )
    shorter = {"tokens": tokens[1:2, :3], "mask": jnp.ones((1, 3), bool)}
    np.testing.assert_allclose(
        out[1:2], apply(params, x[1:2], t[1:2], r[1:2], shorter), rtol=1e-5, atol=1e-5
    )
    other = {"tokens": tokens.at[:, 0].add(1.0), "mask": mask}
    assert change(out, apply(params, x, t, r, other)) > 1e-3


def scanned(params, depth: int) -> tuple[str, dict]:
    """The entry that holds the stacked layers: all of its leaves lead with the depth."""
    (found,) = [
        item for item in params.items()
        if len(jax.tree.leaves(item[1])) > 4
        and all(leaf.shape[0] == depth for leaf in jax.tree.leaves(item[1]))
    ]
    return found


def dense(weights, x):
    return x @ weights["kernel"] + jax.lax.broadcast_to_rank(weights["bias"], x.ndim)


def standardised(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def block_by_hand(layer, h, context, text, keep):
    """One transformer block written out; keep (B, L + S): which of text and h may be attended."""
    modulation = dense(layer["Dense_0"], context)[:, None]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, -1)
    weights = layer["MultiHeadDotProductAttention_0"]
    project = lambda name, x: (
        jnp.einsum("bsd,dhk->bhsk", x, weights[name]["kernel"]) + weights[name]["bias"][:, None]
    )
    inner = standardised(h) * (1 + scale_1) + shift_1
    query, (key, value) = project("query", inner), (
        project(name, jnp.concatenate([text, inner], axis=1)) for name in ("key", "value")
    )
    scores = jnp.einsum("bhsk,bhuk->bhsu", query, key) / jnp.sqrt(query.shape[-1])
    scores = jax.nn.softmax(jnp.where(keep[:, None, None], scores, -jnp.inf), -1)
    mixed = jnp.einsum("bhsu,bhuk->bshk", scores, value)
    out = jnp.einsum("bshk,hkd->bsd", mixed, weights["out"]["kernel"]) + weights["out"]["bias"]
    h = h + gate_1 * out
    inner = jax.nn.gelu(dense(layer["Dense_1"], standardised(h) * (1 + scale_2) + shift_2))
    return h + gate_2 * dense(layer["Dense_2"], inner)


def time_by_hand(weights, t):
    angles = np.pi / 2 * t[:, None] * np.array([1, 2])
    features = jnp.concatenate([t[:, None], jnp.cos(angles), jnp.sin(angles)], -1)
    return dense(weights["Dense_1"], jax.nn.silu(dense(weights["Dense_0"], features)))


@pytest.mark.parametrize("text", [False, True])
def test_scanned_layers_equal_a_loop_over_their_parameters(text):
    """The whole network written out, with a Python loop over the stacked layers."""
    model, params = text_network() if text else network("dit")[:2]
    x, t, r, cond = inputs(label=2)
    if text:
        cond = {"tokens": jax.random.normal(jax.random.key(5), (ROWS, 5, 7)),
                "mask": jnp.arange(5)[None] < jnp.array([5, 3, 1])[:, None]}
    c = model.config

    @functools.partial(jax.jit, compiler_options=QUICK)
    def by_hand(params):
        width, patch, side = c.width, c.patch, IMAGE[0] // c.patch
        patches = jnp.stack(
            [
                x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(ROWS, -1)
                for i in range(side) for j in range(side)
            ],
            axis=1,
        )
        h = dense(params["Dense_0"], patches) + dit.position_features(side, side, width)
        times = time_by_hand(params["SinusoidTime_0"], t)
        times = times + time_by_hand(params["SinusoidTime_1"], t - r)
        if text:
            kept = cond["mask"][..., None]
            mean = jnp.where(kept, cond["tokens"], 0).sum(1) / kept.sum(1)
            context = times + dense(params["Condition_0"]["Dense_0"], mean)
            norm = params["text_norm"]
            tokens = standardised(dense(params["text"], cond["tokens"]))
            tokens = tokens * norm["scale"] + norm["bias"]
            keep = jnp.concatenate([cond["mask"], jnp.ones((ROWS, side**2), bool)], axis=1)
        else:
            context = times + params["Condition_0"]["Embed_0"]["embedding"][cond["label"]]
            tokens, keep = jnp.zeros((ROWS, 0, width)), jnp.ones((ROWS, side**2), bool)
        stacked = scanned(params, c.depth)[1]
        for i in range(c.depth):
            layer = jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
            h = block_by_hand(layer, h, jax.nn.silu(context), tokens, keep)
        norm = params["LayerNorm_0"]
        h = standardised(h) * norm["scale"] + norm["bias"]
        out = dense(params["Dense_1"], h).reshape(ROWS, side, side, -1)
        image = jnp.zeros_like(x)
        for i in range(side):
            for j in range(side):
                image = image.at[
                    :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch
                ].set(out[:, i, j].reshape(ROWS, patch, patch, -1))
        return (x - image) / jnp.maximum(jnp.abs(t), 0.3)[:, None, None, None]

    mine = jax.jit(model.apply, compiler_options=QUICK)(params, x, t, r, cond)
    with jax.numpy_rank_promotion("allow"):  # as one writes it by hand
        expected = by_hand(params)
    np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-5)


def test_remat_keeps_value_and_gradient():
    plain, params, _ = network("dit")
    remat = models.create(CONFIGS["dit"] | {"num_classes": CLASSES, "remat": "full"})
    theirs = {
        scanned(remat.abstract_params(), 3)[0] if name == scanned(params, 3)[0] else name: leaf
        for name, leaf in params.items()
    }

    def value_and_gradient(model, params):
        loss = lambda p: (model.apply(p, *inputs()) ** 2).mean()
        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)

    value, gradient = value_and_gradient(plain, params)
    again, remat_gradient = value_and_gradient(remat, theirs)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    remat_gradient = {
        name: remat_gradient[key] for name, key in zip(params, theirs, strict=True)
    }
    chex.assert_trees_all_close(gradient, remat_gradient, rtol=1e-4, atol=1e-6)


def test_remat_keeps_the_parameter_tree():
    """A checkpoint trained with remat loads without it, and the other way round."""
    plain, remat = (
        models.create(CONFIGS["dit"] | {"remat": remat}).abstract_params()
        for remat in ("none", "full")
    )
    assert jax.tree.structure(plain) == jax.tree.structure(remat)


# U-Net


class TorchUNet(torch.nn.Module):
    """The tutorial's architecture in PyTorch, for comparison: two levels down, two up."""

    def __init__(self, hidden: int, times: int, labels: int, classes: int):
        super().__init__()
        nn = torch.nn
        embedding = lambda: nn.Sequential(
            nn.Linear(1, times), nn.ReLU(), nn.Linear(times, times)
        )
        same = lambda a, b: nn.Conv2d(a, b, 3, padding=1)
        half = lambda n: nn.Conv2d(n, n, 4, stride=2, padding=1)
        double = lambda a, b: nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)
        self.time, self.target, self.label = (
            embedding(), embedding(), nn.Embedding(classes, labels)
        )
        self.bias = nn.Linear(2 * times + labels, 4 * hidden)
        self.in_1, self.down_1 = same(1, hidden), half(hidden)
        self.in_2, self.down_2 = same(hidden, 2 * hidden), half(2 * hidden)
        self.middle = same(2 * hidden, 4 * hidden)
        self.up_1, self.out_1 = double(6 * hidden, 2 * hidden), same(2 * hidden, 2 * hidden)
        self.up_2, self.out_2 = double(3 * hidden, hidden), same(hidden, hidden)
        self.last = same(hidden, 1)

    def forward(self, x, t, r, label):
        relu, join = torch.relu, lambda *parts: torch.cat(parts, dim=1)
        context = join(self.time(t[:, None]), self.target(r[:, None]), self.label(label))
        one = self.down_1(relu(self.in_1(x)))
        two = self.down_2(relu(self.in_2(relu(one))))
        middle = self.middle(relu(two)) + self.bias(context)[:, :, None, None]
        up = self.out_1(relu(self.up_1(join(middle, two))))
        up = self.out_2(relu(self.up_2(relu(join(up, one)))))
        return x - self.last(up)


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def load(network: TorchUNet, params):
    """Copies our weights: torch kernels lead with channels, and transposed ones are flipped."""
    modules = {
        "Conv_0": "down_1", "Conv_1": "in_1", "Conv_2": "down_2", "Conv_3": "in_2",
        "Conv_4": "middle", "Conv_5": "out_1", "Conv_6": "out_2", "Conv_7": "last",
        "ConvTranspose_0": "up_1", "ConvTranspose_1": "up_2", "Dense_0": "bias",
    }
    state = {"label.weight": tensor(params["Condition_0"]["Embed_0"]["embedding"])}
    for mine, theirs in modules.items():
        kernel = np.asarray(params[mine]["kernel"])
        if mine.startswith("ConvTranspose"):
            kernel = kernel[::-1, ::-1].transpose(2, 3, 0, 1)
        elif kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        else:
            kernel = kernel.T
        state[f"{theirs}.weight"] = tensor(kernel)
        state[f"{theirs}.bias"] = tensor(params[mine]["bias"])
    for mine, theirs in (("RawTime_0", "time"), ("RawTime_1", "target")):
        for layer, place in (("Dense_0", 0), ("Dense_1", 2)):
            state[f"{theirs}.{place}.weight"] = tensor(params[mine][layer]["kernel"].T)
            state[f"{theirs}.{place}.bias"] = tensor(params[mine][layer]["bias"])
    network.load_state_dict(state)
    return network


def test_the_unet_has_the_tutorials_size():
    """1,924,481 parameters there, and one label row of 64 more here, for no class."""
    params = models.create({"name": "unet"}).abstract_params()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    with torch.device("meta"):
        assert sum(p.numel() for p in TorchUNet(64, 64, 64, 10).parameters()) == 1_924_481
    assert count == 1_924_481 + 64


@pytest.mark.parametrize(("hidden", "side"), [(4, 8), (16, 28)])
def test_the_unet_equals_its_torch_twin(hidden, side):
    model = models.create(
        {"name": "unet", "sample_shape": (side, side, 1), "hidden": hidden, "time_width": 12,
         "label_width": 9}
    )
    params = weights(model, 0.1)
    x, _, _, _ = inputs((side, side, 1))
    t, r = jnp.array([0.9, -0.4, 0.3]), jnp.array([0.1, -0.4, 0.0])
    label = jnp.array([0, 7, 10])
    mine = jax.jit(model.apply)(params, x, t, r, {"label": label})

    torch_network = load(TorchUNet(hidden, 12, 9, 11), params)
    with torch.no_grad():
        theirs = torch_network(
            tensor(x.transpose(0, 3, 1, 2)), tensor(t), tensor(r), tensor(label).long()
        )
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    assert np.abs(mine - theirs).max() / np.abs(theirs).max() < 2e-5
