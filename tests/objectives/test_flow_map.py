"""The flow-map form: its identities, a flow that is known, each method as its paper writes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from twinflow_jax import objectives
from twinflow_jax.errors import UserError
from twinflow_jax.objectives import Batch, flow_map, path, rcgm

ROWS, WIDTH, HIDDEN, DONE = 16, 5, 7, 100


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"into": (WIDTH, HIDDEN), "t": (1, HIDDEN), "r": (1, HIDDEN), "cond": (1, HIDDEN),
              "out": (HIDDEN, WIDTH)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def network(tanh):
    """The same small network in JAX and in PyTorch."""
    def apply(params, x, t, r, cond):
        hidden = x @ params["into"] + t[:, None] * params["t"] + r[:, None] * params["r"]
        return tanh(hidden + cond[:, None] * params["cond"]) @ params["out"]

    return apply


apply = network(jnp.tanh)
single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
double = lambda tree: {name: torch.tensor(np.asarray(a, np.float64)) for name, a in tree.items()}


def example(preset: str, **fields):
    objective = objectives.build(objectives.preset(preset, **fields))
    rng = np.random.default_rng(3)
    cond = rng.normal(size=ROWS)
    batch = Batch(*map(single, (rng.normal(size=(ROWS, WIDTH)), cond, 0 * cond)),
                  jnp.full(ROWS, DONE))
    return objective, batch, objective.draw(jax.random.key(1), ROWS, (WIDTH,))


def delta(config, x_t, w, t, r, batch, params, second=None):
    """F and the residual of one Config at given points."""
    return flow_map.residual(
        apply, params, params if second is None else second, x_t, w, t, r, batch, config
    )


def points(seed: int = 5):
    keys = jax.random.split(jax.random.key(seed), 4)
    x, z = (jax.random.normal(key, (ROWS, WIDTH)) for key in keys[:2])
    t = jax.random.uniform(keys[2], (ROWS,), minval=0.2)
    r = t * jax.random.uniform(keys[3], (ROWS,), maxval=0.9)
    return path.interpolate(x, z, t), path.velocity(x, z), t, r


def test_a_whole_first_piece_is_flow_matching():
    x_t, w, t, r = points()
    _, batch, _ = example("meanflow")
    config = flow_map.Config(derivative="substeps", piece="ratio", step=1.0)
    v_pred, error = delta(config, x_t, w, t, r, batch, single(weights(0)))
    np.testing.assert_allclose(error, v_pred - w, rtol=1e-4, atol=1e-5)


def test_short_pieces_tend_to_the_derivative():
    """Linearly: a tenth of the piece is a tenth as far."""
    x_t, w, t, r = points()
    _, batch, _ = example("meanflow")
    _, exact = delta(flow_map.Config(), x_t, w, t, r, batch, single(weights(0)))
    far = []
    for alpha in (0.1, 0.01):
        config = flow_map.Config(derivative="substeps", piece="ratio", step=alpha)
        _, error = delta(config, x_t, w, t, r, batch, single(weights(0)))
        far.append(float(jnp.abs(error - exact).mean() / jnp.abs(exact).mean()))
    assert 6 < far[0] / far[1] < 16 and far[1] < 0.02


def test_rcgm_is_a_constant_piece():
    x_t, w, t, r = points()
    _, batch, _ = example("meanflow")
    params, second = single(weights(0)), single(weights(1))
    for order in (1, 2):
        config = flow_map.Config(
            derivative="substeps", step=0.01, order=order, teacher_decay=0.99, normaliser="clip"
        )
        v_pred, error = delta(config, x_t, w, t, r, batch, params, second)
        of_rcgm = objectives.PRESETS["rcgm"]
        target = rcgm.target(
            apply, second, v_pred, x_t, w, t, r, batch.cond,
            dataclasses.replace(of_rcgm, order=order),
        )
        np.testing.assert_allclose(v_pred - path.clip(error, 1.0), target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preset", [
    "consistency_training", "scm", "meanflow", "meanflow_difference", "improved_meanflow",
    "alphaflow", "shortcut",
])
def test_the_flow_of_a_gaussian_is_a_fixed_point(preset):
    """With the exact map of normal data and its exact velocity, nothing is left to learn: exactly
    for the derivative, to the order of the piece otherwise."""
    mean, deviation = 0.7, 0.5
    size = lambda t: jnp.sqrt((1 - t) ** 2 * deviation**2 + t**2)[:, None]

    def flow(params, x, t, r, cond):
        level, target = (1 - t)[:, None] * mean, (1 - r)[:, None] * mean
        ratio = size(r) / size(t)
        gone = (t - r)[:, None]
        rate = (t - (1 - t) * deviation**2)[:, None] / size(t) ** 2
        now = -mean + rate * (x - level)
        jump = x - target - ratio * (x - level)
        return jnp.where(gone > 1e-3, jump / jnp.maximum(gone, 1e-3), now)

    config = dataclasses.replace(
        objectives.PRESETS[preset], teacher_decay=0.0, anneal_steps=0, last_step=0.0, warmup=0
    )
    if config.derivative == "substeps":
        config = dataclasses.replace(config, piece="ratio", step=0.02, velocity="data")
    x_t, _, t, r = points()
    w = flow({}, x_t, t, t, None)
    batch = Batch(x_t, jnp.zeros(ROWS), jnp.zeros(ROWS), jnp.zeros(ROWS, jnp.int32))
    _, error = flow_map.residual(flow, {}, {}, x_t, w, t, r, batch, config)
    exact = config.derivative == "jvp"
    assert float(jnp.abs(error).mean()) < (2e-4 if exact else 0.02)
    _, wrong = flow_map.residual(flow, {}, {}, x_t, w + 0.3, t, r, batch, config)
    assert float(jnp.abs(wrong).mean()) > 0.1


@pytest.mark.parametrize("preset, fields", [
    ("consistency_training", {}), ("consistency_distillation", {"guidance": 1.0}), ("scm", {}),
    ("meanflow", {"guidance": 0.5}), ("meanflow_difference", {}), ("improved_meanflow", {}),
    ("alphaflow", {"anneal_steps": 200}), ("shortcut", {}),
    ("twin_meanflow", {"twin_share": 0.3}),
])
def test_methods_as_their_papers_write_them(preset, fields):
    """Loss and gradient against PyTorch, both in float64, from the same draws."""
    objective, batch, draws = example(preset, **fields)
    params = weights(0)
    teacher = weights(1) if objective.config.teacher_decay else None
    with jax.enable_x64(True):
        exact = lambda tree: jax.tree.map(
            lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
        )
        value, gradient = jax.value_and_grad(
            lambda given: objective.loss(
                apply, given, exact(teacher) if teacher else given, exact(batch), exact(draws)
            )[0]
        )(jax.tree.map(jnp.asarray, params))

    mine = {name: a.requires_grad_() for name, a in double(params).items()}
    theirs = double(teacher or params)
    total, offset = 0.0, 0
    for role in draws:
        held = double(draws[role])
        rows = slice(offset, offset := offset + held["z"].shape[0])
        x, cond = (torch.tensor(np.asarray(a, np.float64))[rows] for a in (batch.x, batch.cond))
        total = total + ORACLES[preset](Paper(mine, theirs, x, cond, objective.config), held, role)
    total = total / ROWS
    total.backward()
    assert float(value) == pytest.approx(total.item(), rel=1e-6)
    for name, leaf in mine.items():
        expected = leaf.grad.numpy()
        np.testing.assert_allclose(gradient[name], expected, atol=1e-6 * np.abs(expected).max())


class Paper:
    """What the papers' equations are written with: rows of one role, in float64."""

    def __init__(self, params, teacher, x, cond, config):
        self.params, self.ema, self.x, self.cond, self.config = params, teacher, x, cond, config
        self.fixed = {name: a.detach() for name, a in params.items()}

    def F(self, x, t, r, params, cond=None):
        return network(torch.tanh)(params, x, t, r, self.cond if cond is None else cond)

    def at(self, held):
        t = held["t"]
        r = t - held.get("u", torch.zeros_like(t)) * t
        along = held["z"] - self.x
        return self.x + t[:, None] * along, along, t, r

    def guided(self, x_t, t, start):
        """The released rule, with the network that stands for the teacher."""
        scale = self.config.guidance
        if not scale:
            return start
        gap = self.F(x_t, t, t, self.ema) - self.F(x_t, t, t, self.ema, 0 * self.cond)
        return start + scale * gap

    def slope(self, x_t, t, r, u):
        function = lambda x, time: self.F(x, time, r, self.fixed)
        return torch.func.jvp(function, (x_t, t), (u, torch.ones_like(t)))[1]

    def descend(self, prediction, error, weight=1.0):
        """Sum over rows of a loss whose gradient at the prediction is the error's."""
        per_row = ((prediction - (prediction - error).detach()) ** 2).mean(1)
        return (weight * per_row).sum()


def consistency(paper: Paper, held, role, velocity=None, step=None):
    """|f(x_t) - f(x_s)|, f(x, t) = x - t F(x, t, 0), per unit of time, clipped."""
    x_t, v, t, r = paper.at(held)
    w = paper.guided(x_t, t, v if velocity is None else velocity(paper, x_t, t))
    step = step or 0.1 * (1 / 128 / 0.1) ** (DONE / 5000)
    s = torch.clamp(t - step, min=0)
    f = lambda x, time: x - time[:, None] * paper.F(x, time, r, paper.params)
    f_t, f_s = f(x_t, t), f(x_t - (t - s)[:, None] * w, s)
    prediction = paper.F(x_t, t, r, paper.params)
    error = torch.where((t < step)[:, None], prediction - w, (f_s - f_t) / step)
    return paper.descend(prediction, error.clamp(-1, 1).detach())


def distillation(paper: Paper, held, role):
    of_teacher = lambda paper, x_t, t: paper.F(x_t, t, t, paper.ema)
    return consistency(paper, held, role, of_teacher, 1 / 64)


def trig_free_scm(paper: Paper, held, role):
    x_t, v, t, r = paper.at(held)
    prediction = paper.F(x_t, t, r, paper.params)
    g = prediction - v + DONE / 1000 * t[:, None] * paper.slope(x_t, t, r, v)
    g = g.detach()
    return paper.descend(prediction, g / ((g**2).mean(1, keepdim=True).sqrt() + 0.1))


def meanflow(paper: Paper, held, role, slope=None, tangent=None):
    """|u - sg(v - (t - r) du/dt)|^2, rows weighing 1 / (sum of squares + c)."""
    x_t, v, t, r = paper.at(held)
    v = paper.guided(x_t, t, v)
    u = paper.F(x_t, t, r, paper.params)
    along = v if tangent is None else tangent(paper, x_t, t)
    target = v
    if role == "jump":
        target = v - (t - r)[:, None] * (slope or Paper.slope)(paper, x_t, t, r, along)
    error = (u - target).detach()
    return paper.descend(u, error, ((error**2).sum(1) + 0.01) ** -paper.config.exponent)


def along_its_own(paper: Paper, held, role):
    """Improved MeanFlow's tangent."""
    return meanflow(
        paper, held, role, tangent=lambda paper, x_t, t: paper.F(x_t, t, t, paper.fixed)
    )


def with_twins(paper: Paper, held, role):
    """L_adv and L_rectify of TwinFlow's paper, rows weighing as the others do."""
    if role != "twin":
        return along_its_own(paper, held, role)
    z, t, s, one = held["z"], held["t_fake"], held["t_rectify"], torch.ones_like(held["t_fake"])
    jump = paper.F(z, one, 0 * one, paper.params)
    fake = (z - jump).detach()
    mixed = lambda noise, t: t[:, None] * noise + (1 - t[:, None]) * fake
    v_fake = paper.F(mixed(held["z_fake"], t), -t, -t, paper.params)
    at = mixed(held["z_rectify"], s)
    gap = paper.F(at, -s, -s, paper.fixed) - paper.F(at, s, s, paper.fixed)
    total = 0.0
    for prediction, error, weight in (
        (v_fake, v_fake - (held["z_fake"] - fake), 1.0), (jump, gap, 0.1),
    ):
        error = error.detach()
        total += paper.descend(prediction, error, weight * ((error**2).sum(1) + 0.01) ** -0.5)
    return total


def by_difference(paper: Paper, x_t, t, r, u):
    late, early = torch.clamp(t + 0.005, max=1), torch.maximum(t - 0.005, r)
    at = lambda time: paper.F(x_t + (time - t)[:, None] * u, time, r, paper.fixed)
    return (at(late) - at(early)) / (late - early)[:, None]


def alphaflow(paper: Paper, held, role):
    x_t, v, t, r = paper.at(held)
    u, target, alpha = paper.F(x_t, t, r, paper.params), v, 1.0
    if role == "jump":
        alpha = 1 - 1 / (1 + np.exp(-25 * (DONE / 200 - 0.5)))
        s = alpha * r + (1 - alpha) * t
        x_s = x_t - (t - s)[:, None] * v
        target = alpha * v + (1 - alpha) * paper.F(x_s, s, r, paper.fixed)
    error = ((u - target) / alpha).detach()
    return paper.descend(u, error, 1 / ((error**2).sum(1) + 0.01))


def shortcut(paper: Paper, held, role):
    x_t, v, t, r = paper.at(held)
    prediction, target = paper.F(x_t, t, r, paper.params), v
    if role == "jump":
        middle = (t + r) / 2
        first = paper.F(x_t, t, middle, paper.ema)
        second = paper.F(x_t - (t - middle)[:, None] * first, middle, r, paper.ema)
        target = prediction - 2 * (prediction - (first + second) / 2)  # per unit of alpha
    return paper.descend(prediction, (prediction - target).detach())


ORACLES = {
    "consistency_training": consistency,
    "consistency_distillation": distillation,
    "scm": trig_free_scm,
    "meanflow": meanflow,
    "meanflow_difference": lambda *given: meanflow(*given, slope=by_difference),
    "improved_meanflow": along_its_own,
    "twin_meanflow": with_twins,
    "alphaflow": alphaflow,
    "shortcut": shortcut,
}


def test_shortcut_times_lie_on_the_grid():
    _, _, draws = example("shortcut", diagonal=0.0)
    t, u = (np.asarray(draws["jump"][name], np.float64) for name in "tu")
    length = u * t
    np.testing.assert_allclose(np.abs((np.log2(length) + 0.5) % 1 - 0.5), 0, atol=1e-5)
    np.testing.assert_allclose(np.abs((t / length + 0.5) % 1 - 0.5), 0, atol=1e-4)
    assert (t <= 1).all() and (u <= 1).all()


def test_velocities_alone_are_no_jumps():
    assert not flow_map.Config(diagonal=1.0).learns_jumps
    assert flow_map.Config(diagonal=0.9).learns_jumps


@pytest.mark.parametrize("fields, words", [
    ({"logit_normal": (1.0,)}, "a mean and a deviation"),
    ({"last_step": 0.1}, "give both, or neither"),
    ({"derivative": "substeps", "warmup": 10}, "warmup is of a derivative"),
    ({"velocity": "jump"}, "derivative=substeps"),
    ({"velocity": "teacher"}, "teacher_decay=1"),
    ({"order": 2}, "which are of sub-steps"),
    ({"last_step": 0.1, "anneal_steps": 10}, "which are of sub-steps"),
    ({"velocity": "jump", "derivative": "substeps", "teacher_decay": 1.0}, "teacher_decay below 1"),
    ({"diagonal": 0.0, "target_time": "zero", "twin_share": 0.1}, "twin_share compares"),
])
def test_fields_that_do_not_go_together(fields, words):
    with pytest.raises(UserError, match=words):
        flow_map.Config(**fields)
