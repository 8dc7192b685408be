"""Parity with PyTorch modules: their random weights through our name table, and the error.

`network` is a family's Network.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from twinflow_jax.models import names, tiling
from twinflow_jax.models.family import Network

QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}  # of relative errors, by the dtype that we compute in


def params_of(module, table: names.NameTable, expected) -> dict:
    """Our parameters from a PyTorch module's weights.

    expected: our abstract parameters; the table has to reach each of their leaves, with its
    shape, and to use or carry every tensor of the module.
    """
    state = module.state_dict().items()
    tensors = {table.published(key): value.detach().float().numpy() for key, value in state}
    flat, used = {}, set()
    for rule in table.rules:
        keys = table.keys(rule)
        if rule.copy_of and keys[0] not in tensors:
            keys = [rule.copy_of]
        used |= set(keys)
        leaves = [rule.ours(tensors[key]) for key in keys]
        flat[rule.path] = np.stack(leaves) if rule.stacked else leaves[0]
    left = [key for key in tensors if key not in used and not table.is_carried(key)]
    assert not left, left
    shapes = {path: leaf.shape for path, leaf in names.flatten(expected).items()}
    assert {path: leaf.shape for path, leaf in flat.items()} == shapes
    return names.unflatten(flat)


def relative_error(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def converted(module, network: Network, config) -> dict:
    """`params_of` a whole network."""
    return params_of(module, network.table(config), network.abstract(config)[0])


@functools.cache
def compiled(network: Network, config, method: str | None = None) -> Callable:
    """`(params, *inputs)` through our network, or one of its methods."""
    module = network.module(config)
    apply = lambda params, *inputs: module.apply({"params": params}, *inputs, method=method)
    return jax.jit(apply, compiler_options=QUICK)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def gradients(network: Network, config, params, args: tuple, direction):
    """Of <velocity, direction> of a transformer, with respect to parameters, x_t and tokens."""
    def loss(params, x_t, tokens):
        inputs = x_t, *args[1:3], args[3] | {"tokens": tokens}
        velocity = network.module(config).apply({"params": params}, *inputs)
        return (velocity * direction).sum()

    return jax.grad(loss, (0, 1, 2))(params, args[0], args[3]["tokens"])


def published_gradients(table: names.NameTable, grads) -> dict[str, np.ndarray]:
    """Of our parameters, by the published keys and in their layout."""
    flat, found = names.flatten(grads), {}
    for rule in table.rules:
        leaves = flat[rule.path] if rule.stacked else flat[rule.path][None]
        for key, ours in zip(table.keys(rule), np.asarray(leaves), strict=True):
            found[key] = rule.theirs(ours)
    return found


def randoms(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def codec_errors(
    network: Network, encoded: Callable, decoded: Callable, made: tuple,
    places: tuple[int, int, int], dtype: str = "float32", stored: str = "float32",
) -> tuple[float, float]:
    """Of encoding and of decoding (rows, height, width) latents.

    encoded, decoded: `(module, x) -> y`, of PyTorch's. made: that module, our config and our
    parameters. dtype: of our computation; stored: of our weights.
    """
    module, config, params = made
    config = dataclasses.replace(config, dtype=dtype)
    params = jax.tree.map(lambda p: jnp.asarray(p, stored), params)
    rows, height, width = places
    images = np.tanh(randoms(rows, height * config.downscale, width * config.downscale, 3))
    latents = randoms(rows, height, width, config.latent_channels)
    errors = []
    for method, x, oracle in (("encode", images, encoded), ("decode", latents, decoded)):
        ours = np.asarray(compiled(network, config, method)(params, x))
        assert ours.dtype == np.float32
        errors.append(relative_error(ours, oracle(module, x)))
    assert 0 < (np.abs(ours) == 1).mean() < 0.5  # the clamp is met, and does not hide the rest
    return tuple(errors)


def assert_one_tile_changes_nothing(network: Network, config, params) -> None:
    """Of decoding, where a tile is the whole image."""
    latents = randoms(2, 4, 4, config.latent_channels)
    decode = functools.partial(compiled(network, config, "decode"), params)
    tiles = tiling.tiled(decode, latents, 8, 4, config.downscale)
    np.testing.assert_array_equal(tiles, decode(latents))


def prompts(
    vocab: int, lengths: tuple[int, ...], width: int
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """Random ids, and the mask of the first ones of each row."""
    ids = np.random.default_rng(1).integers(0, vocab, (len(lengths), width), np.int32)
    return ids, np.arange(width) < np.array(lengths)[:, None]


def assert_states(
    network: Network, config, params, ids, mask, expected: Float[np.ndarray, "B L D"]
) -> None:
    """A text encoder's states: as expected at the valid tokens, zero at the others."""
    stored = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    for dtype, weights in (("float32", params), ("bfloat16", params), ("bfloat16", stored)):
        states = np.asarray(
            compiled(network, dataclasses.replace(config, dtype=dtype))(weights, ids, mask)
        )
        assert states.dtype == dtype
        assert relative_error(states[mask], expected[mask]) < BOUNDS[dtype]
        assert not states[~mask].any()


def assert_padding_is_not_seen(network: Network, config, params, ids, mask) -> None:
    """Neither what it is nor how much of it there is matters to the second row."""
    length, run = mask[1].sum(), compiled(network, config)
    states = np.asarray(run(params, ids, mask))[1, :length]
    other = np.where(mask, ids, 7)
    np.testing.assert_array_equal(np.asarray(run(params, other, mask))[1, :length], states)
    shorter = run(params, other[1:2, : length + 1], mask[1:2, : length + 1])
    assert relative_error(shorter[0, :length], states) < 2e-6


def assert_text_padding_is_not_seen(apply: Callable, inputs: tuple) -> None:
    """`apply(x_t, t, r, cond)`: neither what is in the padding nor its length matters to a row."""
    x_t, t, r, cond = inputs
    velocity = apply(x_t, t, r, cond)
    rows, length, width = cond["tokens"].shape
    longer = np.random.default_rng(4).normal(size=(rows, length + 4, width)).astype(np.float32) * 9
    mask = np.pad(cond["mask"], [(0, 0), (0, 4)])
    longer[mask] = cond["tokens"][cond["mask"]]
    other = apply(x_t, t, r, cond | {"tokens": longer, "mask": mask.astype(int)})
    assert relative_error(other, velocity) <= 2e-6
    assert velocity.dtype == np.float32


def assert_equal_times_ignore_the_second_embedder(
    apply: Callable, config, params: dict, inputs: tuple
) -> None:
    """`apply(config, params, x_t, t, r, cond)`: at r = t it is the base network."""
    x_t, t, _, cond = inputs
    expected = base_velocity(apply, config, params, x_t, t, cond)
    assert relative_error(apply(config, params, x_t, t, t, cond), expected) <= 1e-6


def base_velocity(apply: Callable, config, params: dict, x_t, t, cond):
    """Of the network that knows no target time."""
    base = {key: leaf for key, leaf in params.items() if key != config.times.second}
    config = dataclasses.replace(config, time_conditioning="half_r")
    return apply(config, base, x_t, t, np.zeros_like(t), cond)


def assert_gated_is_the_base_at_zero(apply: Callable, config, params: dict, inputs: tuple) -> None:
    """With any weights where r = 0; where the gated embedder's last kernel is as drawn, at any r.

    params: with a gated embedder, all of it random.
    """
    x_t, t, r, cond = inputs
    expected = base_velocity(apply, config, params, x_t, t, cond)
    assert relative_error(apply(config, params, x_t, t, np.zeros_like(r), cond), expected) <= 1e-6
    moved = relative_error(apply(config, params, x_t, t, r, cond), expected)
    flat = names.flatten(params)
    drawn = names.unflatten({
        path: np.zeros_like(leaf) if re.search("gated_.*/(out/.*|bias)", path) else leaf
        for path, leaf in flat.items()
    })
    assert relative_error(apply(config, drawn, x_t, t, r, cond), expected) <= 1e-6 < 1e-2 < moved


def logical_axes(network: Network, config) -> dict[str, tuple[str | None, ...]]:
    """Of each leaf by its path; a name or None for each of its axes."""
    abstract, axes = (names.flatten(tree) for tree in network.abstract(config))
    assert all(len(axes[path]) == leaf.ndim for path, leaf in abstract.items())
    return axes
