"""Euler and Heun for multi-step base models: exactness, order, guidance, cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinflow_jax import sampling
from twinflow_jax.errors import UserError

RATE = np.array([[0.8, -1.5], [1.2, 0.3]])
NOISE = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)


def linear(params, x, t, r, cond):
    """dx/dt = x A, whose solution is x(0) = x(1) expm(-A)."""
    return x @ params


def curved(params, x, t, r, cond):
    return jnp.tanh(2 * x) * (1 + t[:, None]) + cond["shift"] + 0.5 * (t - r)[:, None]


def curved_numpy(x, t, shift):
    return np.tanh(2 * x) * (1 + t) + shift


def integrate(field, x, times, method):
    """Reference integrator; the last step of Heun's method is Euler's."""
    x = x.astype(np.float64)
    for i, (now, then) in enumerate(zip(times[:-1], times[1:], strict=True)):
        slope = field(x, now)
        if method == "heun" and i < len(times) - 2:
            slope = (slope + field(x + (then - now) * slope, then)) / 2
        x = x + (then - now) * slope
    return x


def spaced(steps):
    return tuple(np.linspace(1, 0, steps + 1).tolist())


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("times", [spaced(1), spaced(2), spaced(7), (1.0, 0.7, 0.65, 0.1, 0.0)])
@pytest.mark.parametrize("guidance", [1.0, 0.0, 2.5])
def test_matches_numpy(method, times, guidance):
    shift, none = np.float32(0.3), np.float32(-0.2)

    def field(x, t):
        without = curved_numpy(x, t, none)
        return without + guidance * (curved_numpy(x, t, shift) - without)

    cond = {"shift": jnp.full((5, 2), shift)}
    null = {"shift": jnp.full((5, 2), none)}
    mine = sampling.solve(curved, None, jnp.asarray(NOISE), cond, null, times, guidance, method)
    expected = integrate(field, NOISE, times, method)
    assert np.abs(mine - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    values, vectors = np.linalg.eig(-RATE)
    exact = NOISE @ (vectors @ np.diag(np.exp(values)) @ np.linalg.inv(vectors)).real
    errors = [
        np.abs(
            sampling.solve(
                linear, jnp.asarray(RATE, jnp.float32), jnp.asarray(NOISE), {}, {}, spaced(steps),
                method=method,
            )
            - exact
        ).max()
        for steps in (16, 32, 64)
    ]
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 6), ("heun", 11)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_cost(method, evaluations, guidance):
    """Rows through the network; without guidance the null condition is not evaluated."""
    rows, seen = [], set()

    def host(x, label):
        rows.append(x.shape[0])
        seen.update(np.asarray(label).tolist())
        return np.asarray(x) * 0.5

    def counted(params, x, t, r, cond):
        return jax.pure_callback(
            host, jax.ShapeDtypeStruct(x.shape, x.dtype), x, cond["label"]
        )

    cond, null = {"label": jnp.zeros(5, jnp.int32)}, {"label": jnp.ones(5, jnp.int32)}
    jax.block_until_ready(
        sampling.solve(counted, None, jnp.asarray(NOISE), cond, null, spaced(6), guidance, method)
    )
    assert sum(rows) == evaluations * 5 * (1 if guidance == 1 else 2)
    assert seen == ({0} if guidance == 1 else {0, 1})


def test_times_are_told_to_the_network_as_r_equal_to_t():
    def check(params, x, t, r, cond):
        return jnp.where(t == r, 1.0, jnp.nan)[:, None] * jnp.ones_like(x)

    out = sampling.solve(check, None, jnp.asarray(NOISE), {}, {}, spaced(3), method="heun")
    np.testing.assert_allclose(out, NOISE - 1, atol=1e-6)


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match="method"):
        sampling.solve(linear, None, jnp.asarray(NOISE), {}, {}, spaced(2), method="rk4")
