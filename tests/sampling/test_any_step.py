"""The any-step sampler against an oracle in float64 NumPy, and its time grids."""

import functools
import types
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from twinflow_jax import sampling
from twinflow_jax.errors import UserError
from twinflow_jax.sampling import any_step, batched

ROWS, WIDTH = 6, 3
MIX = np.array([[0.9, -0.4, 0.2], [0.3, 0.7, -0.5], [-0.6, 0.1, 0.8]])
KEY = jax.random.key(7)
NOISE = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
COND = {"shift": np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)}


def velocity(xp, x, t, r, shift):
    """A curved velocity that depends on everything; t and r of shape (rows, 1)."""
    return xp.tanh(x @ xp.asarray(MIX, x.dtype) + 1.1 * t - 0.7 * r) + x * xp.sin(
        2 * t - r + 0.3
    ) * 0.4 + xp.cos(shift * (1 + t * r))


def apply(params, x, t, r, cond):
    return params * velocity(jnp, x, t[:, None], r[:, None], cond["shift"])


class Oracle:
    """UCGM-S, one row set at a time, in float64; counts its network evaluations."""

    def __init__(self, style="few", share=0.0, ratio=0.0, order=1, fake=False, sde=None):
        self.style, self.share, self.ratio = style, share, ratio
        self.order, self.sign, self.sde = order, -1.0 if fake else 1.0, sde
        self.evaluations = 0

    def predict(self, x, t, following):
        """(x_hat, z_hat) at time t >= 0 of the chosen trajectory."""
        self.evaluations += 1
        r = {"few": 0.0, "any": following, "mul": t}[self.style]
        column = np.ones((len(x), 1))
        shift = COND["shift"].astype(np.float64)
        v = velocity(np, x, self.sign * t * column, self.sign * r * column, shift)
        return x - t * v, x + (1 - t) * v

    def fresh_share(self, t, following, first):
        if self.sde is None:
            return self.share
        if following == 0:
            return 0.0
        share = min(2 * t * abs(t - following) / following**2, 1.0)
        return first if self.sde == "released" and first is not None else share

    def run(self, noise, times):
        """(the last raw data prediction, the states visited)."""
        x, states = noise.astype(np.float64), [noise.astype(np.float64)]
        history, first = [], None
        for i, (t, following) in enumerate(zip(times[:-1], times[1:], strict=True)):
            after = times[i + 2] if i + 2 < len(times) else 0.0
            raw = self.predict(x, t, following)
            x_hat, z_hat = raw
            if i > 1:
                x_hat = x_hat + self.ratio * (raw[0] - history[-1][0])
                z_hat = z_hat + self.ratio * (raw[1] - history[-1][1])
            history.append(raw)
            share = self.fresh_share(t, following, first)
            first = share if first is None else first
            fresh = np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), x.shape), np.float64)
            z_next = np.sqrt(1 - share) * z_hat + np.sqrt(share) * fresh
            moved = (1 - following) * x_hat + following * z_next
            if self.order == 2 and following > 0:
                x_there, z_there = self.predict(moved, following, after)
                moved = self.correct(x, t, following, x_hat, z_hat, x_there, z_there)
            x = moved
            states.append(x)
        return raw[0], np.stack(states)

    @staticmethod
    def correct(x, t, following, x_hat, z_hat, x_there, z_there):
        return x + (following - t) * (z_hat - x_hat + z_there - x_there) / 2


def oracle_times(steps, order, gap, warp):
    points = (steps + 1) // 2 if order == 2 else steps
    if gap[1] == 0:
        u = np.linspace(gap[0], 1, points + 1)[:points]
    else:
        u = np.linspace(gap[0], 1 - gap[1], points)
    a, b, c = warp
    return np.append(1 - (1 - (1 - u**a) ** b) ** c, 0.0)


def quiet_grid(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sampling.make_grid(*args, **kwargs)


@functools.partial(jax.jit, static_argnames="grid")
def both(noise, grid):
    """(samples, states visited), compiled as one program."""
    cond = jax.tree.map(jnp.asarray, COND)
    return (
        sampling.sample(apply, jnp.float32(1), noise, cond, grid, KEY),
        sampling.trajectory(apply, jnp.float32(1), noise, cond, grid, KEY),
    )


def compare(
    steps, style="few", stochastic=0.0, gap=(0.0, 0.0), warp=(1.0, 1.0, 1.0), extrapolation=0.0,
    order=1, fake=False, released_sde=False, tolerance=1e-5,
):
    """Runs sampler and oracle; their samples and every state agree."""
    grid = quiet_grid(
        steps, style, stochastic, gap, warp, extrapolation, order, fake, released_sde=released_sde
    )
    times = oracle_times(steps, order, gap, warp)
    np.testing.assert_allclose(np.abs(grid.times), times, rtol=0, atol=1e-12)
    sde = None if stochastic != "SDE" else "released" if released_sde else "each"
    share = 0.0 if sde else stochastic
    oracle = Oracle(style, share, extrapolation, order, fake, sde)
    expected, states = oracle.run(NOISE, times)

    sampled, visited = both(jnp.asarray(NOISE), grid)
    assert relative(sampled, expected) < tolerance
    assert relative(visited, states) < tolerance
    assert visited.shape == (grid.steps + 1, ROWS, WIDTH)
    assert grid.nfe == oracle.evaluations


def relative(mine, expected):
    return np.abs(np.asarray(mine, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("style", ["few", "any", "mul"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_styles(style, steps):
    compare(steps, style)


@pytest.mark.parametrize(
    ("gap", "warp"),
    [((0.0, 0.0), (1.17, 0.8, 1.1)), ((0.001, 0.5), (0.5, 2.0, 1.0)),
     ((0.2, 0.1), (1.0, 1.0, 1.0))],
)
def test_gaps_and_warps(gap, warp):
    compare(4, "any", 0.0, gap, warp)


@pytest.mark.parametrize(("ratio", "stochastic"), [(0.2, 0.4), (1.0, 0.0)])
def test_extrapolation_starts_at_the_third_step(ratio, stochastic):
    compare(5, "any", stochastic, extrapolation=ratio)
    plain, extrapolated = (
        both(jnp.asarray(NOISE), quiet_grid(5, "any", stochastic, extrapolation=value))[1]
        for value in (0.0, ratio)
    )
    np.testing.assert_allclose(plain[:3], extrapolated[:3], atol=1e-6)
    assert not np.allclose(plain[3], extrapolated[3], atol=1e-3)


@pytest.mark.parametrize(("share", "style"), [(1.0, "few"), (0.3, "few"), (0.8, "mul")])
def test_stochastic_shares(share, style):
    compare(4, style, share, (0.001, 0.5))


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("gap", [(0.0, 0.0), (0.3, 0.1)])
def test_sde_shares(released, gap):
    compare(6, "mul", "SDE", gap, released_sde=released)


def test_sde_shares_vary_and_the_released_ones_do_not():
    each = quiet_grid(12, "mul", "SDE").stochastic
    kept = quiet_grid(12, "mul", "SDE", released_sde=True).stochastic
    assert len(set(each)) > 3
    assert set(kept[:-1]) == {each[0]}
    assert all(0 <= share <= 1 for share in each)


@pytest.mark.parametrize(
    ("style", "steps", "gap"),
    [("few", 1, (0.0, 0.0)), ("any", 2, (0.1, 0.0)), ("mul", 5, (0.0, 0.0)),
     ("any", 6, (0.0, 0.3)), ("few", 7, (0.1, 0.0)), ("any", 7, (0.1, 0.0)),
     ("mul", 8, (0.15, 0.2))],
)
def test_second_order(style, steps, gap):
    compare(steps, style, 0.0, gap, order=2)


def test_second_order_with_extrapolation_and_warp():
    compare(9, "any", 0.0, (0.1, 0.05), (1.17, 0.8, 1.1), 0.3, order=2)


@pytest.mark.parametrize("order", [1, 2])
def test_the_fake_trajectory_has_negative_times(order):
    compare(7, "mul", 0.0, (0.1, 0.0), order=order, fake=True)
    grid = quiet_grid(7, "mul", order=order, fake=True)
    assert max(grid.times) <= 0
    assert grid.times[0] == -1


GAUSSIAN = (1.0, 1.0)  # mean and standard deviation of data


def gaussian_velocity(params, x, t, r, cond):
    """The exact velocity where data is Gaussian; it takes noise z to mean + std z."""
    mean, std = params
    t = t[:, None]
    variance = t**2 + (1 - t) ** 2 * std**2
    centred = x - (1 - t) * mean
    return (t - (1 - t) * std**2) / variance * centred - mean


def gaussian_error(**grid):
    noise = jax.random.normal(jax.random.key(0), (2000, 1))
    x = sampling.sample(
        gaussian_velocity, GAUSSIAN, noise, {}, sampling.make_grid(style="mul", **grid), KEY
    )
    return float(jnp.sqrt(jnp.mean((x - GAUSSIAN[0] - GAUSSIAN[1] * noise) ** 2)))


def test_first_order_converges_on_gaussian_data():
    errors = [gaussian_error(steps=steps) for steps in (10, 20, 40)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.3)


def test_second_order_beats_first_order_at_the_same_cost():
    """Both grids of 33 evaluations, from t = 1 exactly."""
    assert sampling.make_grid(33, "mul", order=2).nfe == sampling.make_grid(33, "mul").nfe == 33
    assert gaussian_error(steps=33, order=2) < gaussian_error(steps=33) / 3


def test_second_order_survives_a_start_just_below_one():
    error = gaussian_error(steps=17, order=2, gap=(0.001, 0.0))
    assert error < gaussian_error(steps=17, gap=(0.001, 0.0))


def test_the_correction_at_one_uses_its_evaluation():
    plain, corrected = (
        both(jnp.asarray(NOISE), quiet_grid(steps, "mul", order=order))[1]
        for steps, order in ((3, 1), (5, 2))
    )
    assert plain.shape == corrected.shape
    assert not np.allclose(plain[1], corrected[1], atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "gap", "expected"),
    [(4, (0.001, 0.5), [1, 0.832, 0.664, 0.5]), (2, (0.001, 0.6), [1, 0.6016])],
)
def test_the_released_bfloat16_grids(steps, gap, expected):
    grid = quiet_grid(steps, gap=gap, dtype="bfloat16")
    np.testing.assert_allclose(grid.times, [*expected, 0], atol=5e-4)
    exact = quiet_grid(steps, gap=gap)
    assert exact.times[0] == 0.999
    assert grid.times[0] == 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_released_grids_are_those_of_torch(dtype):
    """The same arithmetic in torch: points in float64, everything after in the noise's type."""
    kind = getattr(torch, dtype)
    for steps, (low, high), (a, b, c) in (
        (4, (0.001, 0.5), (1.0, 1.0, 1.0)), (30, (0.001, 0.0), (1.17, 0.8, 1.1)),
    ):
        points = torch.linspace(low, 1 - high, steps + (high == 0), dtype=torch.float64)
        u = points[:steps].to(kind)
        times = 1 - (1 - (1 - u**a) ** b) ** c
        mine = quiet_grid(steps, gap=(low, high), warp=(a, b, c), dtype=dtype).times
        np.testing.assert_allclose(mine[:-1], times.double().numpy(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("gap", [(0.0, 0.0), (0.001, 0.0), (0.001, 0.5), (0.1, 0.7)])
@pytest.mark.parametrize("warp", [(1.0, 1.0, 1.0), (1.17, 0.8, 1.1), (2.0, 3.0, 0.5)])
def test_grids_fall_from_noise_to_data(gap, warp):
    for steps in range(1, 41):
        for order in (1, 2):
            times = quiet_grid(steps, "any", gap=gap, warp=warp, order=order).times
            assert all(0 <= t <= 1 for t in times)
            assert times[-1] == 0
            assert all(a > b for a, b in zip(times[:-1], times[1:], strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 20, 30, 50])
def test_recommended_grids_are_made_without_warning(steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = sampling.few_step(steps)
    assert grid.nfe == steps
    assert sampling.few_step(steps, style="mul", stochastic=0.0).style == "mul"


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_nfe_counts_the_evaluations_that_run(steps, order):
    """The network is a host function whose value is needed, so that each call is counted."""
    rows = []

    def host(x, t):
        rows.append(x.shape[0])
        return np.tanh(np.asarray(x)) * np.asarray(t)[:, None]

    def counted(params, x, t, r, cond):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, t)

    grid = quiet_grid(steps, "mul", order=order, gap=(0.1, 0.0))
    jax.block_until_ready(
        sampling.sample(counted, None, jnp.asarray(NOISE), {}, grid, KEY)
    )
    assert sum(rows) == grid.nfe * ROWS
    assert len(rows) == grid.nfe <= steps


def test_few_steps_without_noise_warn():
    with pytest.warns(UserWarning, match="without fresh noise"):
        sampling.make_grid(4, "few", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampling.make_grid(4, "few").stochastic == (1.0, 1.0, 1.0, 0.0)
        assert sampling.make_grid(1, "few").stochastic == (0.0,)
        assert not any(sampling.make_grid(4, "any").stochastic)


def test_order_2_says_which_evaluations_it_leaves_out():
    with pytest.warns(UserWarning, match="of 4 evaluations it takes 3"):
        assert sampling.make_grid(4, "mul", order=2).nfe == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampling.make_grid(3, "mul", order=2).nfe == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0}, {"steps": -3}, {"style": "many"}, {"order": 3}, {"order": 0},
        {"gap": (-0.1, 0.0)}, {"gap": (0.0, 1.0)}, {"gap": (0.6, 0.5)},
        {"stochastic": 1.5}, {"stochastic": -0.1}, {"stochastic": float("nan")},
        {"stochastic": "ode"}, {"order": 2, "stochastic": 0.5}, {"order": 2, "stochastic": "SDE"},
        {"warp": (0.0, 1.0, 1.0)}, {"warp": (-1.0, 1.0, 1.0)}, {"warp": (float("inf"), 1.0, 1.0)},
        {"extrapolation": float("nan")}, {"extrapolation": float("inf")}, {"steps": 10**9},
    ],
)
def test_bad_values_are_refused(fields):
    with pytest.raises(UserError):
        sampling.make_grid(**({"steps": 4} | fields))


def test_the_seed_decides_and_rows_are_independent():
    params, noise = jnp.float32(1), jnp.asarray(NOISE)

    def run(grid, seed=0, rows=slice(None)):
        cond = {"shift": jnp.asarray(COND["shift"])[rows]}
        return np.asarray(
            sampling.sample(apply, params, noise[rows], cond, grid, jax.random.key(seed))
        )

    random = sampling.make_grid(4, "few", gap=(0.001, 0.5))
    np.testing.assert_array_equal(run(random), run(random))
    assert not np.allclose(run(random), run(random, seed=1), atol=1e-3)

    fixed = sampling.make_grid(5, "any", extrapolation=0.2, order=2)
    whole = run(fixed)
    np.testing.assert_array_equal(whole, run(fixed, seed=1))
    parts = [run(fixed, rows=rows) for rows in (slice(0, 2), slice(2, 3), slice(3, None))]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=2e-6, atol=2e-6)


def test_images_and_low_precision_networks_sample_in_float32():
    def half(params, x, t, r, cond):
        assert t.dtype == r.dtype == jnp.float32
        return (x * t[:, None, None, None]).astype(jnp.bfloat16)

    noise = jnp.ones((2, 4, 4, 1), jnp.bfloat16)
    grid = sampling.make_grid(3, "any")
    assert sampling.sample(half, None, noise, {}, grid, KEY).dtype == jnp.float32
    assert sampling.trajectory(half, None, noise, {}, grid, KEY).shape == (4, 2, 4, 4, 1)


def test_batches_share_one_program(monkeypatch):
    """Ten samples, four at once: the last batch has fewer rows than the others."""
    model = types.SimpleNamespace(
        sample_shape=(WIDTH,), cond=lambda labels: {"shift": jnp.asarray(COND["shift"])[labels]},
        apply=functools.partial(apply),  # which nothing was compiled for before
    )
    monkeypatch.setattr(batched, "BATCH", 4)
    monkeypatch.setattr(any_step, "_run", chex.assert_max_traces(any_step._run, 1))
    labels, grid = np.arange(10) % ROWS, sampling.make_grid(3, "any")
    samples = sampling.generate(model, jnp.float32(1), labels, grid, 0, progress=False)
    assert samples.shape == (10, WIDTH)
