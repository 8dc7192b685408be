"""Properties of the objectives that hold whatever the network is."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twinflow_jax import models, objectives
from twinflow_jax.errors import UserError
from twinflow_jax.objectives import STUDENT, Batch, distances, rcgm
from twinflow_jax.objectives.draws import allocate
from twinflow_jax.training import ema
from twinflow_jax.training.step import loss_and_gradient

SHAPE = (2, 2, 1)
MODEL = models.create(
    {"name": "mlp", "sample_shape": SHAPE, "width": 8, "depth": 1, "num_classes": 3}
)
QUICK = {"xla_backend_optimization_level": 0}


def build(preset: str, **fields):
    """The preset's objective, where all its networks learn."""
    objective = objectives.build(objectives.preset(preset, **fields))
    everyone = (STUDENT, *objective.config.auxiliary)
    return dataclasses.replace(objective, learns=everyone)


def example(objective, rows: int, seed: int = 0):
    """(batch, draws) of the given size."""
    keys = jax.random.split(jax.random.key(seed), 3)
    label = jax.random.randint(keys[0], (rows,), 0, 3)
    x = jax.random.uniform(keys[1], (rows, *SHAPE), minval=-1.0)
    null = MODEL.cond(np.full(rows, MODEL.config.num_classes))
    batch = Batch(x, MODEL.cond(label), null, jnp.full(rows, 100), jnp.sin(9 * x))
    return batch, objective.draw(keys[2], rows, SHAPE)


@functools.cache
def weights(seed: int = 1):
    return MODEL.init(jax.random.key(seed))


def networks(objective):
    """The student's weights and those of networks beside it."""
    names = (STUDENT, *objective.config.auxiliary)
    return {name: weights(1 + 2 * number) for number, name in enumerate(names)}


def evaluate(objective, batch, draws, micro_steps: int = 1):
    """((loss, terms), gradients) at the example weights."""
    run = functools.partial(loss_and_gradient, objective, MODEL.apply, micro_steps=micro_steps)
    return jax.jit(run, compiler_options=QUICK)(networks(objective), weights(2), batch, draws)


# Cost


@pytest.mark.parametrize(
    "preset, fields, rows_per_batch",
    [
        ("released", {}, 4.25),
        ("released", {"merge_passes": True}, 4.5),
        ("released", {"order": 0}, 2.75),
        ("released", {"order": 3}, 5.0),
        ("released", {"guidance": 0.0}, 3.25),
        ("released", {"rectify_weight": 0.0}, 3.75),
        ("rcgm", {}, 1 + 4 / 3 + 2),
        ("rcgm", {"guidance": 0.0}, 3.0),
        ("flow_matching", {}, 1.0),
        ("image_free", {}, 5.0),
        ("tutorial", {}, 12.0),
        ("tutorial", {"guidance": 0.0}, 10.0),
        ("tutorial", {"twin": False}, 5.0),
        ("paper", {}, 10 / 3),
        ("paper", {"twin_share": 0.0}, 3.0),
        ("consistency_training", {}, 2.0),
        ("consistency_distillation", {"guidance": 1.0}, 4.0),
        ("scm", {}, 1.0),
        ("meanflow", {"guidance": 0.5}, 3.0),
        ("meanflow_difference", {}, 2.0),
        ("improved_meanflow", {}, 1.5),
        ("twin_meanflow", {"twin_share": 1 / 3}, 1 + 4 / 3),
        ("alphaflow", {}, 1.5),
        ("shortcut", {}, 1.25),
        ("dmd", {}, 5.0),  # generator, regression, two scores, the fake's own loss
        ("dmd2", {"real_guidance": 2.0}, 5.0),
    ],
)
def test_rows_that_the_network_sees(preset, fields, rows_per_batch):
    objective, seen = build(preset, **fields), []

    def apply(params, x_t, t, r, cond):
        seen.append(x_t.shape[0])
        return MODEL.apply(params, x_t, t, r, cond)

    batch, draws = example(objective, 48)
    given = networks(objective) if objective.config.auxiliary else weights(1)
    jax.eval_shape(functools.partial(objective.loss, apply), given, weights(2), batch, draws)
    assert sum(seen) == pytest.approx(rows_per_batch * 48)


def test_merged_passes_make_fewer_calls():
    """With teacher = student: {generator, guidance, one_step}, the pass with gradient, and one
    call for each RCGM step, which takes half of the rectification along."""
    objective, calls = build("released", teacher_decay=0.0, merge_passes=True), []
    params = weights(1)

    def apply(given, x_t, t, r, cond):
        calls.append((x_t.shape[0], given is params))
        return jnp.zeros_like(x_t)

    batch, draws = example(objective, 128)
    jax.eval_shape(lambda: objective.loss(apply, params, params, batch, draws))
    assert calls == [(192, False), (128, True), (128, False), (128, False)]


# Values and gradients


@pytest.mark.parametrize("fields", [
    {}, {"teacher_decay": 0.0}, {"order": 1}, {"order": 0}, {"guidance": 0.0},
    {"ratios": (1.0, 0.0, 1.0, 1.0)}, {"image_free": True, "teacher_decay": 1.0},
])
def test_merged_passes_change_nothing(fields):
    apart, merged = build("released", **fields), build("released", **fields, merge_passes=True)
    batch, draws = example(apart, 12)
    (loss, terms), gradient = evaluate(apart, batch, draws)
    (other, other_terms), other_gradient = evaluate(merged, batch, draws)
    assert other_terms.keys() == terms.keys()
    for name, term in terms.items():
        assert float(other_terms[name]) == pytest.approx(float(term), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (gradient, other_gradient)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("preset", list(objectives.PRESETS))
def test_terms_add_up_and_are_finite_at_the_ends_of_time(preset):
    objective = build(preset)
    batch, draws = example(objective, 12)
    draws = jax.tree.map(jnp.array, draws)
    for role in draws.values():
        if "u" in role:  # rows with t = r, then rows that reach down to r = 0
            role["u"] = role["u"].at[::2].set(0.0).at[1::2].set(1.0)
        for name in ("t", "t_fake", "t_rectify", "tau"):
            if name in role:
                role[name] = role[name].at[:1].set(0.0).at[-1:].set(1.0)
    (loss, terms), gradient = evaluate(objective, batch, draws)
    chex.assert_tree_all_finite((loss, gradient))
    assert float(loss) == pytest.approx(sum(float(term) for term in terms.values()), rel=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0


@pytest.mark.parametrize("preset", objectives.PRESETS)
def test_micro_steps_do_not_change_the_gradient(preset):
    objective, numbers = build(preset), {"released": (2, 4, 8), "paper": (8,)}.get(preset, (4,))
    batch, draws = example(objective, 8)
    (loss, terms), gradient = evaluate(objective, batch, draws)
    whole = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
    for micro_steps in numbers:  # 8: one row in each part
        (part_loss, part_terms), parts = evaluate(objective, batch, draws, micro_steps)
        parts = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(parts)])
        assert float(part_loss) == pytest.approx(float(loss), rel=1e-5)
        assert part_terms.keys() == terms.keys()
        for name, term in terms.items():
            assert float(part_terms[name]) == pytest.approx(float(term), rel=1e-5)
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("wrong", [
    lambda draws: draws.pop("base"),
    lambda draws: draws["twin"].update(t_fake=draws["twin"]["t_fake"][1:]),
    lambda draws: draws.update(other=draws["twin"]),
])
def test_draws_of_other_rows_than_counted_are_told(wrong, monkeypatch):
    """They would train on less than the batch without a word."""
    form, objective = objectives.FORMS["paper"], build("paper")
    whole = form.draw

    def draw(*given):
        draws = whole(*given)
        wrong(draws)
        return draws

    monkeypatch.setattr(form, "draw", draw)
    with pytest.raises(TypeError, match="paper: draw gives rows .* counts"):
        objective.draw(jax.random.key(0), 8, SHAPE)


@pytest.mark.parametrize("preset", ["released", "tutorial", "paper"])
def test_no_gradient_reaches_the_teacher(preset):
    objective = build(preset)
    batch, draws = example(objective, 8)
    params = weights(1)  # not in `loss`: the first call would keep what is traced

    def loss(teacher):
        return objective.loss(MODEL.apply, params, teacher, batch, draws)[0]

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(weights(2))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


# The recursion


def single_point(x_0):
    """The exact velocity of data that are one point, shifted by `params`: any jump is exact."""

    def apply(params, x_t, t, r, cond):
        t = jnp.maximum(t, 1e-6).reshape(-1, 1)
        return (x_t - x_0) / t + params

    return apply


@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_velocity_is_the_fixed_point_of_rcgm(order):
    x_0 = jnp.array([[0.5, -0.25]])
    apply, config = single_point(x_0), build("tutorial", order=order, clip=0.0).config
    rng = np.random.default_rng(order)
    z = jnp.asarray(rng.normal(size=(64, 2)), jnp.float32)
    t = jnp.asarray(rng.uniform(0.02, 1, 64), jnp.float32)
    r = t * jnp.asarray(rng.uniform(0, 0.999, 64), jnp.float32)
    x_t = t[:, None] * z + (1 - t[:, None]) * x_0
    exact = apply(0.0, x_t, t, r, {})

    target = rcgm.target(apply, 0.0, exact, x_t, z - x_0, t, r, {}, config)
    np.testing.assert_allclose(target, exact, atol=2e-3)

    off = rcgm.target(apply, 0.0, exact + 0.1, x_t, z - x_0, t, r, {}, config)
    span = jnp.where(t - r < config.dt, 1.0, (t - r) / config.dt)[:, None]
    np.testing.assert_allclose(exact + 0.1 - off, 0.1 * span * np.ones((1, 2)), atol=3e-3)


@pytest.mark.parametrize("preset", ["tutorial", "paper", "rcgm"])
def test_exact_velocity_has_no_base_loss(preset):
    fields = {"tutorial": {"guidance": 0.0, "twin": False}, "paper": {"twin_share": 0.0}}.get(
        preset, {"guidance": 0.0, "distance": "l2"}
    )
    objective = build(preset, **fields)
    x_0 = jnp.array([[0.5, -0.25]])
    draws = objective.draw(jax.random.key(0), 96, (2,))
    batch = Batch(jnp.tile(x_0, (96, 1)), {}, {})
    run = lambda shift: float(objective.loss(single_point(x_0), shift, 0.0, batch, draws)[0])
    assert run(0.0) < 1e-5
    assert run(0.1) > 1e-3


def test_random_times_descend_from_t_to_r():
    t, r = jnp.array([0.9, 0.5]), jnp.array([0.1, 0.5])
    times = rcgm.random_times(t, r, jnp.array([[0.5, 0.5], [0.2, 0.7]]))
    np.testing.assert_allclose(np.stack(times, 1), [[0.9, 0.5, 0.3, 0.1], [0.5] * 4], rtol=1e-6)


# Distances, averages


def test_barron_gradients_do_not_depend_on_the_distance():
    direction = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
    far = 10.0 ** np.arange(-1, 5, dtype=np.float32)[:, None, None] * direction
    gradient = jax.grad(lambda p: distances.barron(p, jnp.zeros_like(p)).sum())(jnp.asarray(far))
    norms = np.linalg.norm(np.asarray(gradient).reshape(6, -1), axis=1)
    np.testing.assert_allclose(norms, 2 * np.sqrt(1.01 / 12), rtol=1e-3)


def test_barron_near_its_target_and_as_l2():
    p = jnp.asarray(np.random.default_rng(1).normal(size=(5, 7)), jnp.float32)
    zero = jnp.zeros_like(p)
    np.testing.assert_allclose(
        distances.barron(p, zero, alpha=2.0), distances.l2(p, zero) / 1e-3, rtol=1e-6
    )
    np.testing.assert_array_equal(distances.barron(zero, zero), np.zeros(5))
    np.testing.assert_allclose(
        distances.barron(p, zero), 1.005 * jnp.sqrt(distances.l2(p, zero)), rtol=1e-3
    )


def test_average_warms_up():
    decays, values = [], []
    average = ema.start({"w": jnp.float32(-7.0)})
    for value in (1.0, 2.0, 3.0, 4.0):
        decays.append(float(average.decay))
        average = ema.update(average, {"w": jnp.float32(value)}, 0.99)
        values.append(float(average.params["w"]))
    np.testing.assert_allclose(decays, [0, 0.495, 0.62, 0.6903], atol=1e-4)
    expected = [1.0]
    for decay, value in zip(decays[1:], (2.0, 3.0, 4.0), strict=True):
        expected.append(decay * expected[-1] + (1 - decay) * value)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


# Roles


@pytest.mark.parametrize(
    "rows, expected",
    [
        (3, [1, 1, 1, 0]),
        (4, [1, 1, 1, 1]),
        (5, [1, 1, 1, 2]),
        (6, [2, 2, 2, 0]),
        (7, [2, 2, 2, 1]),
        (9, [2, 2, 2, 3]),
        (10, [2, 2, 2, 4]),
    ],
)
def test_odd_batches_follow_the_released_rounding(rows, expected):
    assert list(allocate(rows, dict.fromkeys("abcd", 1.0)).values()) == expected
    objective = build("released")
    if min(expected) == 0:
        with pytest.raises(UserError, match=r"without rows.*a batch of \d+ fills all"):
            objective.counts(rows)
    else:
        assert list(objective.counts(rows).values()) == expected


def test_the_remainder_goes_to_the_last_role_in_use():
    assert list(build("rcgm").counts(8).values()) == [3, 3, 2, 0]
    assert list(build("flow_matching").counts(5).values()) == [0, 5, 0, 0]
    assert build("paper").counts(8) == {"twin": 3, "base": 5}


@pytest.mark.parametrize("preset", list(objectives.PRESETS))
def test_draws_have_the_rows_that_the_roles_count(preset):
    objective = build(preset)
    counts = {role: rows for role, rows in objective.counts(40).items() if rows}
    draws = objective.draw(jax.random.key(0), 40, SHAPE)
    assert list(draws) == list(counts)
    for role, rows in counts.items():
        assert all(values.shape[0] == rows for values in draws[role].values())
    parts = [objective.cut(draws, start, start + 10) for start in range(0, 40, 10)]
    for role in draws:
        joined = jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves), *[p[role] for p in parts if role in p]
        )
        chex.assert_trees_all_equal(joined, draws[role])


# What is refused


@pytest.mark.parametrize(
    "preset, fields, message",
    [
        ("released", {"guidance": 1.0}, "diverges.*teacher_decay=1"),
        ("tutorial", {"guidance": 1.5, "teacher_decay": 0.0}, "diverges"),
        ("released", {"order": -1}, "objective.order is -1"),
        ("paper", {"order": 0}, "objective.order is 0; give 1 or more"),
        ("tutorial", {"order": 0}, "objective.order is 0; give 1 or more"),
        ("released", {"dt": 0.0}, "objective.dt"),
        ("released", {"teacher_decay": 1.5}, "objective.teacher_decay"),
        ("released", {"guidance": -0.5}, "objective.guidance"),
        ("released", {"ratios": (1.0, 1.0)}, "takes tuple of 4 float"),
        ("released", {"ratios": (0.0, 0.0, 0.0, 0.0)}, "one above 0"),
        ("released", {"consistency_ratio": 2.0}, "objective.consistency_ratio"),
        ("released", {"image_free": True}, "teacher_decay=1"),
        ("paper", {"twin_share": 1.5}, "objective.twin_share"),
        ("nothing", {}, "no objective preset 'nothing'; choose from released"),
        ("released", {"oder": 2}, "no field 'oder'; it has .*order"),
    ],
)
def test_what_cannot_be_trained_is_refused(preset, fields, message):
    with pytest.raises(UserError, match=message):
        build(preset, **fields)


@pytest.mark.parametrize("fields", [{"form": "none"}, {}, {"form": "twinflow", "oder": 2}])
def test_unknown_forms_and_fields_are_refused(fields):
    with pytest.raises(UserError, match="choose from twinflow|oder"):
        objectives.build(fields)


def test_strong_guidance_needs_a_frozen_teacher():
    assert build("released", guidance=4.0, teacher_decay=1.0).config.guidance == 4.0
