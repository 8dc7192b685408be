"""Distribution matching: its rules against their papers, a Gaussian, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from twinflow_jax import objectives
from twinflow_jax.errors import UserError
from twinflow_jax.objectives import STUDENT, Batch, matching
from twinflow_jax.objectives.direction import direction

PRESETS = [name for name, config in objectives.PRESETS.items() if config.form == "matching"]
G, F = (STUDENT,), ("fake",)
BOTH = (STUDENT, "fake")


@pytest.mark.parametrize(("fields", "cycle"), [
    ({"turns": "together", "every": 1}, [BOTH, BOTH, BOTH]),
    ({"turns": "together", "every": 3}, [BOTH, F, F, BOTH, F, F, BOTH]),
    ({"turns": "exclusive", "every": 3}, [G, F, F, G, F, F, G]),
    ({"turns": "fake_first", "every": 2}, [F, G, F, G]),
    ({"turns": "fake_first", "every": 3}, [F, F, G, F, F, G]),
])
def test_turns(fields, cycle):
    config = matching.Config(**fields)
    assert [config.cycle[step % len(config.cycle)] for step in range(len(cycle))] == cycle


def test_published_turns():
    """Updates of fake and student over 10 steps: 1 : 1, but 5 : 1 in DMD2; SiD in alternation."""
    def updates(preset):
        cycle = objectives.PRESETS[preset].cycle
        turns = [cycle[step % len(cycle)] for step in range(10)]
        return tuple(sum(name in turn for turn in turns) for name in BOTH)

    assert {name: updates(name) for name in PRESETS} == {
        "vsd": (10, 10), "dmd": (10, 10), "dmd2": (2, 10), "sid": (5, 5)
    }
    assert objectives.PRESETS["sid"].cycle[0] == F


@pytest.mark.parametrize(("fields", "message"), [
    ({"teacher_decay": 0.99}, "objective.teacher_decay is 0.99, but the real score is a frozen"),
    ({"tau": (0.5, 0.5)}, "objective.tau is .* give low < high"),
    ({"turns": "exclusive", "every": 1}, "turns=exclusive never trains the fake: give 2 or more"),
    ({"fake_learning_rate": 0.0}, "objective.fake_learning_rate is 0.0; give more than 0"),
])
def test_what_cannot_be_trained_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        objectives.build(objectives.preset("dmd2", **fields))


# Gaussians, whose velocities are known: the data's and, exactly, those of the student's samples

MEAN, STD = 0.7, 0.3


def gaussian(mean, std, x_t, t):
    """The velocity at (x_t, t) of data N(mean, std^2)."""
    t = t.reshape(-1, *[1] * (x_t.ndim - 1))
    variance = t**2 + (1 - t) ** 2 * std**2
    away = x_t - (1 - t) * mean
    return (t - (1 - t) * std**2) / variance * away - mean


def exact(params, x_t, t, r, cond):
    """A generator z -> mean + std z, or the velocity of its samples; of many dimensions."""
    mean, std = params
    jump = (t == 1) & (r == 0)
    v = gaussian(mean, std, x_t, t)
    return jnp.where(jump.reshape(-1, *[1] * (x_t.ndim - 1)), x_t - (mean + std * x_t), v)


@pytest.mark.parametrize("fields", [
    {"rule": "vsd"}, {"rule": "dmd"}, *({"rule": "sid", "alpha": a} for a in (0.5, 1.0, 1.2)),
], ids=str)
def test_every_rule_reaches_a_gaussian(fields):
    """With the exact fake score at each step."""
    objective = objectives.build(objectives.preset("dmd2", **fields))

    def loss(params, batch, draws):
        networks = {STUDENT: params, "fake": jax.lax.stop_gradient(params)}
        return objective.loss(exact, networks, (MEAN, STD), batch, draws)[0]

    assert trained(objective, loss) == pytest.approx((MEAN, STD), abs=0.02)


@pytest.mark.parametrize("preset", ["released", "tutorial", "paper", "twin_meanflow"])
def test_rectification_reaches_a_gaussian(preset):
    """TwinFlow's, alone: one network, which knows the velocity of its own samples at t < 0."""
    objective = objectives.build(objectives.preset(preset))

    def twin(params, x_t, t, r, cond):
        own = ((t < 0) | ((t == 1) & (r == 0))).reshape(-1, 1)
        return jnp.where(own, exact(params, x_t, abs(t), r, cond), gaussian(MEAN, STD, x_t, t))

    def loss(params, batch, draws):
        return objective.loss(twin, params, params, batch, draws)[1]["rectify"]

    assert trained(objective, loss) == pytest.approx((MEAN, STD), abs=0.02)


def trained(objective, loss):
    """What N(-1, .8^2) becomes in 500 steps of `loss(params, batch, draws)`. A sample is of 16
    numbers of the same Gaussian, so that their mean distance is no single number's."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 500))
    batch = Batch(jnp.zeros((64, 16)), {}, {})

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(loss)(params, batch, objective.draw(key, 64, (16,)))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.float32(-1), jnp.float32(0.8)
    keys = jax.random.split(jax.random.key(0), 500)
    (found, _), _ = jax.jit(lambda s: jax.lax.scan(step, (s, optimizer.init(s)), keys))(start)
    return np.array(found)


# The losses of the papers, in float64

ROWS, DIMENSIONS = 6, 3


@functools.cache
def case(seed: int = 0):
    """Weights (a, b, c) of networks a x + b t + c cond, a batch, and draws."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=3) for name in ("student", "fake", "real")}
    normal = lambda *shape: rng.normal(size=(ROWS, *shape))
    batch = Batch(normal(DIMENSIONS), {"c": normal(1)}, {"c": normal(1)}, noise=normal(DIMENSIONS))
    times = lambda: rng.uniform(0.1, 0.9, ROWS)
    draws = {
        "z": normal(DIMENSIONS), "z_score": normal(DIMENSIONS), "tau": times(),
        "z_fake": normal(DIMENSIONS), "t_fake": times(),
    }
    return params, batch, draws


def linear(params, x_t, t, r, cond):
    a, b, c = params
    return a * x_t + b * (t - r / 2).reshape(-1, 1) + c * cond["c"] * x_t


def oracle(rule, alpha, guidance, regression=0.0):
    """(loss, gradient) of the student and of the fake, as the papers write them: with predicted
    samples x_real, x_fake and the weights of their code."""
    numbers, batch, draws = case()
    tensor = lambda a: torch.tensor(np.asarray(a), dtype=torch.float64)
    params = {name: tensor(a).requires_grad_() for name, a in numbers.items()}
    draws, c, null = {k: tensor(a) for k, a in draws.items()}, *map(
        tensor, (batch.cond["c"], batch.null_cond["c"])
    )

    def network(params, x, t, r, c):
        return params[0] * x + params[1] * (t - r / 2)[:, None] + params[2] * c * x

    def x_hat(params, x_t, t, c):  # the sample that a score at x_t means
        return x_t - t[:, None] * network(params, x_t, t, t, c)

    one = torch.ones(ROWS, dtype=torch.float64)
    x = draws["z"] - network(params["student"], draws["z"], one, 0 * one, c)
    tau = draws["tau"]
    x_t = tau[:, None] * draws["z_score"] + (1 - tau[:, None]) * x
    frozen = {name: p.detach() for name, p in params.items()}
    x_null = x_hat(frozen["real"], x_t, tau, null)
    x_real = x_null + guidance * (x_hat(frozen["real"], x_t, tau, c) - x_null)
    x_fake = x_hat(frozen["fake"], x_t, tau, c)
    omega = 1 / (x - x_real).abs().mean(1, keepdim=True).detach()
    if rule == "sid":
        each = omega * (x_real - x_fake) * ((x_real - x) - alpha * (x_real - x_fake))
        generator = each.mean()
    else:
        gradient = (x_fake - x_real) * (omega if rule == "dmd" else 1)
        generator = 0.5 * torch.nn.functional.mse_loss(x, (x - gradient).detach())
    pair = tensor(batch.noise)
    away = pair - network(params["student"], pair, one, 0 * one, c) - tensor(batch.x)
    generator = generator + regression * away.square().mean()
    t = draws["t_fake"]
    x_fixed = x.detach()
    at = t[:, None] * draws["z_fake"] + (1 - t[:, None]) * x_fixed
    fake = (network(params["fake"], at, t, t, c) - (draws["z_fake"] - x_fixed)).square().mean()
    (generator + fake).backward()
    assert params["real"].grad is None
    return {
        STUDENT: (generator.item(), params["student"].grad.numpy()),
        "fake": (fake.item(), params["fake"].grad.numpy()),
    }


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("rule", "alpha", "regression"), [
    ("vsd", 1.0, 0.0), ("dmd", 1.0, 0.0), ("dmd", 1.0, 0.25), ("sid", 1.2, 0.0)
])
@pytest.mark.parametrize("learns", [BOTH, G, F], ids=" and ".join)
def test_losses_are_those_of_the_papers(rule, alpha, regression, guidance, learns):
    config = matching.Config(
        rule=rule, alpha=alpha, real_guidance=guidance, regression_weight=regression
    )

    def loss(networks):
        return matching.loss(
            linear, networks, numbers["real"], batch, {"all": draws}, config, learns=learns
        )

    with jax.enable_x64(True):
        numbers, batch, draws = jax.tree.map(jnp.asarray, case())
        networks = {name: numbers[name] for name in BOTH}
        (_, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(networks)
    expected = oracle(rule, alpha, guidance, regression)
    names = {STUDENT: {"matching", "regression"} if regression else {"matching"}, "fake": {"fake"}}
    assert terms.keys() == set().union(*(names[name] for name in learns))
    for name in BOTH:
        value, wanted = expected[name]
        if name not in learns:
            assert not np.any(gradient[name])
            continue
        assert sum(float(terms[term]) for term in names[name]) == pytest.approx(value, rel=1e-5)
        np.testing.assert_allclose(gradient[name], wanted, rtol=1e-5, atol=1e-6)


def bent(params, x_t, t, r, cond):
    """A network that is not linear in its sample."""
    return jnp.sin(params[0] * x_t + params[1] * t.reshape(-1, 1)) + params[2] * x_t


def test_sids_gradient_goes_through_both_scores():
    """Central differences of the student's own loss, whose only weight without a gradient, omega,
    is held; in float64."""
    config = matching.Config(rule="sid", alpha=1.2)
    with jax.enable_x64(True):
        numbers, batch, draws = jax.tree.map(jnp.asarray, case(3))

        def terms(student):
            x = draws["z"] - bent(student, draws["z"], jnp.ones(ROWS), jnp.zeros(ROWS), {})
            tau = draws["tau"].reshape(-1, 1)
            x_t = tau * draws["z_score"] + (1 - tau) * x
            x_hat = lambda name: x_t - tau * bent(numbers[name], x_t, draws["tau"], 0, {})
            return x, x_hat("real"), x_hat("fake")

        x, x_real, _ = terms(numbers[STUDENT])
        omega = 1 / jnp.abs(x - x_real).mean(1, keepdims=True)

        def expected(student):
            x, x_real, x_fake = terms(student)
            gap = x_real - x_fake
            return jnp.mean(omega * gap * ((x_real - x) - config.alpha * gap))

        def loss(student):
            networks = {STUDENT: student, "fake": numbers["fake"]}
            return matching.loss(
                bent, networks, numbers["real"], batch, {"all": draws}, config, learns=G
            )[0]

        gradient, step = jax.grad(loss)(numbers[STUDENT]), 1e-5
        differences = [
            (expected(numbers[STUDENT] + step * unit) - expected(numbers[STUDENT] - step * unit))
            / (2 * step)
            for unit in np.eye(3)
        ]
    np.testing.assert_allclose(gradient, differences, rtol=1e-5)


def test_equal_scores_give_no_move():
    """Where nothing is left to move, nothing divides by zero: v = v_real = v_fake."""
    v, tau = jnp.ones((2, 3)), jnp.array([0.02, 0.98])
    for rule in ("twin", "vsd", "dmd", "sid"):
        assert not np.any(direction(rule, v, v, v, tau))
