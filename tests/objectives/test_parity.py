"""Every form of the objective against plain PyTorch, draw by draw.

JAX computes in float32, PyTorch in float64 from the same float32 weights, data and draws.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_reference as reference

from twinflow_jax import models, objectives
from twinflow_jax.config import Train
from twinflow_jax.objectives import STUDENT, Batch
from twinflow_jax.training import state as train_state
from twinflow_jax.training import step as train_step

SHAPE = (3, 2, 1)
CLASSES = 4
FIELDS = {"name": "mlp", "sample_shape": SHAPE, "width": 16, "depth": 1, "num_classes": CLASSES}
MODEL = models.create(FIELDS)
QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time

RELEASED = [
    {},
    {"order": 0},
    {"order": 1, "guidance_range": (0.3, 0.7)},
    {"order": 3, "guidance": 0.0, "clip": 0.0},
    {"rectify_clip": 0.0, "distance": "l2"},
    {"rectify_weight": 0.0, "sample_weight": False},
    {"teacher_decay": 0.0, "dt": 0.2},
    {"teacher_decay": 1.0, "guidance": 4.0},
    {"image_free": True, "teacher_decay": 1.0, "guidance": 0.0, "order": 0},
    {"barron_alpha": 2.0, "clip": 0.0, "rectify_clip": 0.0, "sample_weight": False},
    {"barron_alpha": 0.5, "barron_scale": 0.1, "ratios": (1.0, 2.0, 0.0, 1.0)},
    {"consistency_ratio": 0.0},
    {"consistency_ratio": 0.5},
    {"ratios": (0.0, 1.0, 1.0, 2.0), "time_distribution": (0.8, 1.2, 0.9)},
    {"order": 1, "target_time": "zero"},
]
TUTORIAL = [
    {},
    {"order": 1, "teacher_decay": 0.0},
    {"order": 3, "guidance": 0.0},
    {"twin": False, "teacher_decay": 1.0, "guidance": 2.0},
    {"twin": False, "guidance": 0.0, "clip": 0.0},
    {"clip": 0.0, "rectify_weight": 0.5},
]
PAPER = [
    {},
    {"order": 1, "teacher_decay": 0.0},
    {"order": 3, "clip": 1.0, "rectify_clip": 1.0, "rectify_weight": 0.5},
    {"twin_share": 0.0},
    {"twin_share": 1.0},
]
CASES = (
    [("released", fields) for fields in RELEASED]
    + [("rcgm", {}), ("flow_matching", {}), ("image_free", {})]
    + [("tutorial", fields) for fields in TUTORIAL]
    + [("paper", fields) for fields in PAPER]
)


def name(case) -> str:
    preset, fields = case
    return "-".join([preset, *(f"{k}={v}" for k, v in fields.items())]).replace(" ", "")


def flatten(tree) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def torch_model(params, dtype=torch.float64):
    network = reference.MLP(SHAPE, FIELDS["width"], FIELDS["depth"], CLASSES)
    return reference.load_flax(network, params).to(dtype)


def to_torch(tree, dtype=torch.float64):
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a)).to(dtype), tree)


def labels_to_torch(labels):
    return torch.tensor(np.asarray(labels), dtype=torch.int64)


def numpy_draws(objective, rows: int, rng: np.random.Generator):
    """Draws as the objective makes them, filled by NumPy, so that nothing need compile."""
    shapes = jax.eval_shape(lambda key: objective.draw(key, rows, SHAPE), jax.random.key(0))
    return {
        role: {
            name: (rng.normal if name.startswith("z") else rng.uniform)(size=array.shape).astype(
                np.float32
            )
            for name, array in arrays.items()
        }
        for role, arrays in shapes.items()
    }


@functools.cache
def weights():
    """Student and teacher: different weights, larger than at the start of training."""
    grown = lambda seed: jax.tree.map(
        lambda a: a + 0.2 * jax.random.normal(jax.random.key(seed), a.shape),
        MODEL.init(jax.random.key(seed)),
    )
    return grown(1), grown(2)


@pytest.mark.parametrize("classes", [0, CLASSES])
def test_network_matches_pytorch(classes):
    model = models.create(FIELDS | {"depth": 3, "num_classes": classes})
    params = model.init(jax.random.key(0))
    network = reference.load_flax(reference.MLP(SHAPE, 16, 3, classes), params)
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], (8, *SHAPE))
    t, r = (jax.random.uniform(key, (8,), minval=-1.0) for key in keys[1:3])
    label = jax.random.randint(keys[3], (8,), 0, classes + 1)
    mine = model.apply(params, x, t, r, model.cond(label))
    with torch.no_grad():
        theirs = network(*to_torch((x, t, r), torch.float32), labels_to_torch(label))
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)

    there = reference.to_flax(network)
    assert there.keys() == flatten(params).keys()
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(there[path], leaf)


@pytest.fixture(params=CASES, ids=name)
def case(request):
    """(objective, params, teacher, batch, draws) of a case, from a seed of its own."""
    preset, fields = request.param
    objective = objectives.build(objectives.preset(preset, **fields))
    rows = 24
    params, teacher = weights()
    if objective.config.teacher_decay == 0:
        teacher = params
    rng = np.random.default_rng(CASES.index(request.param))
    batch = Batch(
        rng.uniform(-1, 1, (rows, *SHAPE)).astype(np.float32),
        MODEL.cond(rng.integers(0, CLASSES, rows)),
        MODEL.cond(rng.integers(0, CLASSES + 1, rows)),
    )
    return objective, params, teacher, batch, numpy_draws(objective, rows, rng)


def test_loss_terms_and_gradient_match_pytorch(case):
    objective, params, teacher, batch, draws = case

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, teacher, batch, draws):
        value, gradients = train_step.loss_and_gradient(
            objective, MODEL.apply, {STUDENT: params}, teacher, batch, draws
        )
        return value, gradients[STUDENT]

    (loss, terms), gradient = run(params, teacher, batch, draws)

    student = torch_model(params)
    config = objective.config
    expected, expected_terms = reference.LOSSES[config.form](
        student,
        student if config.teacher_decay == 0 else torch_model(teacher),
        to_torch(batch.x),
        labels_to_torch(batch.cond["label"]),
        labels_to_torch(batch.null_cond["label"]),
        to_torch(draws),
        config,
    )
    expected.backward()

    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert terms.keys() == expected_terms.keys()
    for term, value in terms.items():
        assert float(value) == pytest.approx(expected_terms[term].item(), rel=1e-5), term

    mine, theirs = flatten(gradient), reference.to_flax(student, gradient=True)
    assert mine.keys() == theirs.keys()
    whole = np.sqrt(sum(np.square(g).sum() for g in theirs.values()))
    assert whole > 0
    for path, g in theirs.items():
        scale = max(np.linalg.norm(g), 1e-3 * whole)
        assert np.linalg.norm(mine[path] - g) <= 1e-4 * scale, path


@pytest.mark.parametrize(
    "preset, fields, unconditional",
    [
        ("tutorial", {}, "permuted"),
        ("released", {"teacher_decay": 0.0}, "empty"),
        ("image_free", {}, "permuted"),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_training_follows_pytorch(preset, fields, unconditional, monkeypatch):
    """Five steps of the real train step with Adam, which is traced once: same losses, weights,
    teacher and average."""
    chex.clear_trace_counter()
    once = chex.assert_max_traces(train_step.loss_and_gradient, 1)
    monkeypatch.setattr(train_step, "loss_and_gradient", once)
    objective = objectives.build(objectives.preset(preset, **fields))
    rows, seed, rate = 16, 3, 1e-3
    params = weights()[0]
    settings = Train(seed=seed, ema_decay=0.9, unconditional=unconditional)
    optimizer = optax.adam(rate)
    step = train_step.make_step(objective, MODEL.apply, optimizer, settings)
    state = train_state.create(
        jax.tree.map(jnp.copy, params), optimizer, objective.config.teacher_decay, 0.9
    )
    trainer = reference.Trainer(torch_model(params), objective.config, rate)
    average = reference.Average(trainer.model)

    rng = np.random.default_rng(seed)
    for number in range(5):
        x = rng.uniform(-1, 1, (rows, *SHAPE)).astype(np.float32)
        label = rng.integers(0, CLASSES, rows).astype(np.int32)
        key = jax.random.fold_in(jax.random.key(seed), number)
        draw_key, null_key, _ = jax.random.split(key, 3)  # as the step splits it
        draws = objective.draw(draw_key, rows, SHAPE)
        null = jnp.full((rows,), CLASSES)
        if unconditional == "permuted":
            null = label[jax.random.permutation(null_key, rows)]
        state, metrics = step(state, {"x": x, "cond": MODEL.cond(label), "null": MODEL.null})
        loss, _ = trainer.step(
            to_torch(x), labels_to_torch(label), labels_to_torch(null), to_torch(draws)
        )
        average.update(trainer.model, 0.9)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4)

    pairs = [(state.params, trainer.model), (state.average.params, average.model)]
    if state.teacher is not None:
        pairs.append((state.teacher.params, trainer.teacher))
    start = flatten(params)
    for mine, theirs in pairs:
        mine, theirs = flatten(mine), reference.to_flax(theirs)
        for path, value in theirs.items():
            # In units of what a step can move: Adam moves a weight by at most about `rate`.
            assert np.abs(mine[path] - value).max() <= 0.05 * rate, path
    moved = max(np.abs(value - start[path]).max() for path, value in flatten(state.params).items())
    assert moved > 2 * rate
