"""Runs that train adapters: the base stays, and checkpoints hold the rest."""

import dataclasses

import jax
import numpy as np
import pytest

from twinflow_jax import checkpoints, models, seeds
from twinflow_jax import config as configs
from twinflow_jax.errors import UserError
from twinflow_jax.models import int8, names
from twinflow_jax.models.adapters import is_adapter
from twinflow_jax.models.conditioning import TWIN
from twinflow_jax.training import checks, setup, state
from twinflow_jax.training.loop import train

AVERAGED = ["objective.teacher_decay=0.9", "train.ema_decay=0.9"]
ADAPTED = ["adapter.rank=2", "train.weights=bfloat16", "train.steps=6", *AVERAGED]


@pytest.fixture
def base(small_config, tmp_path) -> str:
    train(small_config("train.steps=3"), str(tmp_path / "base"), progress=False)
    return str(tmp_path / "base")


def leaves(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in names.flatten(tree).items()}


@pytest.mark.parametrize("micro", [1, 4])
def test_adapters_train_on_a_base_that_stays(small_config, base, tmp_path, micro):
    run = small_config(*ADAPTED, f"train.init_from={base}", f"train.micro_steps={micro}")
    end = train(run, str(tmp_path / "run"), progress=False)
    params, started = leaves(end.params), leaves(checkpoints.load_weights(base)[2])
    for path, leaf in params.items():
        if is_adapter(path):
            assert leaf.dtype == np.float32 and np.any(leaf), path
        else:
            np.testing.assert_array_equal(leaf, started[path].astype("bfloat16"), path)
    assert sum(is_adapter(path) for path in params) == len(params) // 2  # of weights, with biases

    kept = {part: leaves(tree) for part, tree in state.to_parts(end).items() if part != "progress"}
    assert set(kept) == {"params", "teacher", "average"}
    for tree in kept.values():
        assert tree and all(map(is_adapter, tree))
    moments = [leaf for leaf in jax.tree.leaves(end.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(a.size for a in kept["params"].values())

    def again() -> None:
        resumed = train(run, str(tmp_path / "run"), progress=False)
        jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (end, resumed)))

    again()  # from the end
    (tmp_path / "run" / "checkpoints" / "6").rename(tmp_path / "away")
    again()  # from step 5

    sampled = leaves(state.sampling_params(end))
    for read in (
        checkpoints.load_weights(tmp_path / "run")[2],
        names.unflatten({k: a.read().result() for k, a in
                         checkpoints.open_weights(tmp_path / "run")[1].items()}),
    ):
        for path, leaf in leaves(read).items():
            np.testing.assert_allclose(leaf, sampled[path].astype(np.float32), rtol=1e-2, atol=1e-3)
            if is_adapter(path):
                np.testing.assert_array_equal(leaf, sampled[path], path)


@pytest.mark.filterwarnings("ignore:objective is of another kind")
@pytest.mark.parametrize("teacher", ["averaged", "student", "base"])
def test_rows_one_by_one_are_the_batch(small_config, teacher):
    """Each of four rows another role."""
    fields = {"averaged": 0.9, "student": 0.0, "base": 1.0}
    run = small_config(
        "adapter.rank=2", "objective.form=twinflow", "data.batch_size=4", "train.init_from=any",
        f"objective.teacher_decay={fields[teacher]}", "objective.guidance=0.5",
        "objective.dt=0.2", "objective.distance=l2",  # others are divided by what rounds
    )
    prepared = setup.prepare(run)
    model, objective, rng = prepared.model, run.bound_objective, np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.standard_normal(a.shape).astype(np.float32) * 0.2, model.abstract_params()
    )
    theirs = None if teacher == "student" else names.unflatten({
        path: leaf * (0.0 if teacher == "base" else 0.5) if is_adapter(path) else leaf
        for path, leaf in names.flatten(params).items()
    })
    x = rng.standard_normal((4, *model.sample_shape)).astype(np.float32)
    batch = setup.step.Batch(x, model.cond(np.arange(4)), model.cond(np.full(4, 10)))
    draws = objective.draw(jax.random.key(1), 4, model.sample_shape)
    found = [
        jax.jit(
            lambda *given, micro=micro: setup.step.loss_and_gradient(
                objective, model.apply, *given, micro, fixed=model.fixed
            ),
            compiler_options={"xla_backend_optimization_level": 0},
        )({"student": params}, theirs, batch, draws)
        for micro in (1, 4)
    ]
    (loss, _), whole = found[0]
    (again, _), parts = found[1]
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    whole, parts = jax.tree.leaves(whole), jax.tree.leaves(parts)
    largest = max(np.abs(leaf).max() for leaf in whole)
    for a, b in zip(whole, parts, strict=True):
        assert np.any(a) and np.abs(a - b).max() <= 1e-6 * largest


@pytest.mark.parametrize("file", [
    "qwen20b_lora_tpu", pytest.param("sana06b_lora_tpu", marks=pytest.mark.slow),
    pytest.param("zimage6b_lora_tpu", marks=pytest.mark.slow),
    pytest.param("sd35m_lora_tpu", marks=pytest.mark.slow),
    pytest.param("openuni512_lora_tpu", marks=pytest.mark.slow),
])
def test_the_small_lora_runs_train_adapters_and_nothing_else(file, tmp_path):
    run = configs.parse(f"configs/{file}.py:tiny", [
        "train.steps=8", "train.sample_every=8", "train.checkpoint_every=8", "sample.columns=1",
        "sample.steps=(1,)", "model.remat=none",
    ])
    end = train(run, str(tmp_path), progress=False)
    model = models.build(run.model, adapter=run.adapter)
    first = leaves(jax.jit(model.init)(seeds.initial(run.train.seed)))
    # The text of the last block of Qwen-Image goes nowhere, nor do SD3's queries for it.
    dead = {f"layers/text/{name}/lora_b" for name in ("query", "out", "mlp_hidden", "mlp_out")}
    dead = {"last/text/query/lora_b"} if file.startswith("sd35") else dead
    for path, leaf in leaves(end.params).items():
        if path.startswith(TWIN):  # Z-Image's, which trains whole
            assert np.any(leaf != first[path]), path
        elif not is_adapter(path):
            np.testing.assert_array_equal(leaf, first[path].astype(leaf.dtype), path)
        elif path.endswith("b"):
            layers = leaf if leaf.ndim == 3 else leaf[None]
            still = [not np.any(layer) for layer in layers]
            assert still == [False] * (len(still) - 1) + [path in dead], path
    learned = names.flatten(state.to_parts(end)["params"])
    assert all(is_adapter(path) or path.startswith(TWIN) for path in learned)
    shapes = {
        leaf.shape for path, leaf in first.items()
        if not is_adapter(path) and not path.startswith((TWIN, "time_")) and leaf.ndim > 1
    }
    kept = jax.tree.leaves((end.opt_state, end.teacher, end.average))
    assert shapes.isdisjoint(leaf.shape for leaf in kept)


def equations(jaxpr):
    """Of a jaxpr and all within it."""
    for one in jaxpr.eqns:
        yield one
        for value in jax.tree.leaves(tuple(one.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("file, makes", [("qwen20b_lora_tpu", False), ("qwen20b_tpu", True)])
def test_the_backward_pass_makes_no_gradient_of_the_base(file, makes):
    """No loop over layers gives arrays of the shapes of its stacked kernels, as it does where all
    weights train."""
    prepared = setup.prepare(configs.parse(f"configs/{file}.py:tiny"))
    given = prepared.abstract_state(), prepared.abstract_batch()
    kernels = {
        leaf.shape for path, leaf in names.flatten(given[0].params).items()
        if path.startswith("layers/") and path.endswith("kernel")
    }
    with prepared.strategy.applied():
        traced = prepared.phases["objective"].trace(*given)
    loops = [one for one in equations(traced.jaxpr.jaxpr) if one.primitive.name == "scan"]
    made = {out.aval.shape for one in loops for out in one.outvars}
    assert len(kernels) >= 3 and kernels & made == (kernels if makes else set())


WHOLE = ("qwen20b", "sana06b", "sana16b", "zimage6b", "sd35m", "openuni512")


def test_the_lora_configs():
    for file in (f"{name}_lora_tpu" for name in WHOLE):
        whole = configs.parse(f"configs/{file.replace('_lora', '')}.py").model
        for variant in ("order1", "order2", *(["paper"] if "qwen" in file else [])):
            run = configs.parse(f"configs/{file}.py:{variant}")
            assert dataclasses.replace(run.model, time_conditioning="second_embedder") == whole
            assert (run.adapter.rank, run.train.weights) == (64, "bfloat16")
            assert (run.objective.teacher_decay == 1) == (variant == "order1")
    small = [configs.load(f"configs/sana{size}b_lora_tpu.py:tiny") for size in ("06", "16")]
    assert small[0] == small[1]


def test_a_base_at_random_is_made_again_from_the_seed(small_config, tmp_path):
    end = train(small_config(*ADAPTED, "train.weights=float32"), str(tmp_path), progress=False)
    sampled = leaves(state.sampling_params(end))
    for path, leaf in leaves(checkpoints.load_weights(tmp_path)[2]).items():
        np.testing.assert_array_equal(leaf, sampled[path], path)


def test_the_frozen_teacher_is_the_base_alone(small_config, base):
    run = small_config(
        "adapter.rank=2", "objective.teacher_decay=1", f"train.init_from={base}",
        "train.unconditional=permuted",
    )
    prepared = setup.prepare(run)
    fresh = prepared.fresh(prepared.model.init(jax.random.key(0)))
    teacher = state.whole(fresh.teacher.params, fresh.params)
    plain = models.build(run.model)
    x = jax.numpy.ones((2, *plain.sample_shape))
    given = x, x[:, 0, 0, 0], x[:, 0, 0, 0], plain.cond([1, 2])
    only = names.unflatten({k: a for k, a in names.flatten(teacher).items() if not is_adapter(k)})
    np.testing.assert_array_equal(
        prepared.model.apply(teacher, *given), plain.apply(only, *given)
    )


def test_a_gradient_is_that_of_the_network_it_stands_for(small_config):
    """d loss / da = x^T (dy b^T), d loss / db = (x a)^T dy: from the gradient of a plain kernel."""
    run = small_config("adapter.rank=2")
    prepared, plain = setup.prepare(run), models.build(run.model)
    rng = np.random.default_rng()
    params = jax.tree.map(
        lambda a: rng.standard_normal(a.shape).astype(np.float32) * 0.2,
        prepared.model.abstract_params(),
    )
    flat = names.flatten(params)
    kernels = {k[:-6] + "kernel": (flat[k], flat[k[:-1] + "b"]) for k in flat if k.endswith("_a")}
    whole = {
        k: a + kernels[k][0] @ kernels[k][1] if k in kernels else a
        for k, a in flat.items() if not is_adapter(k)
    }
    objective = run.bound_objective
    rows = run.data.batch_size
    draws = objective.draw(jax.random.key(1), rows, plain.sample_shape)
    x = jax.numpy.asarray(rng.standard_normal((rows, *plain.sample_shape)), "float32")
    batch = setup.step.Batch(x, plain.cond(np.arange(rows) % 10), plain.cond(np.full(rows, 10)))
    of = lambda apply: jax.jit(jax.value_and_grad(
        lambda params: objective.loss(apply, params, params, batch, draws)[0]
    ))
    loss, gradient = of(prepared.model.apply)(params)
    expected, full = of(plain.apply)(names.unflatten(whole))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    gradient, full = leaves(gradient), leaves(full)
    for kernel, (a, b) in kernels.items():
        for name, wanted in (("lora_a", full[kernel] @ b.T), ("lora_b", a.T @ full[kernel])):
            got = gradient[kernel.replace("kernel", name)]
            error = np.linalg.norm(got - wanted)
            assert error <= 1e-4 * np.linalg.norm(wanted), (kernel, name)


@pytest.mark.parametrize("overrides, says", [
    (["adapter.rank=3"], "adapter.rank is 2 there, 3 here"),
    (["adapter.targets=('Dense_0',)"], "adapter.targets"),
])
def test_other_adapters_do_not_go_on(small_config, tmp_path, overrides, says):
    train(small_config(*ADAPTED), str(tmp_path / "run"), progress=False)
    with pytest.raises(UserError, match=says):
        train(small_config(*ADAPTED, *overrides), str(tmp_path / "run"), progress=False)
    other = small_config(*ADAPTED, *overrides, f"train.init_from={tmp_path / 'run'}")
    with pytest.raises(UserError, match=says.split(" is")[0]):
        train(other, str(tmp_path / "other"), progress=False)
    assert not (tmp_path / "other").exists()


DIT = ("model.name=dit", "model.patch=2", "model.heads=2")


@pytest.mark.filterwarnings("ignore:model is of another kind")
def test_a_run_does_not_go_on_that_sees_r_otherwise(small_config, tmp_path):
    few = ["adapter.rank=2", "train.steps=1", *DIT]
    train(small_config(*few), str(tmp_path / "run"), progress=False)
    says = "model.time_conditioning is 'second_embedder' there, 'half_r' here"
    for start, folder in (("", "run"), (f"train.init_from={tmp_path / 'run'}", "other")):
        other = small_config(*few, "model.time_conditioning=half_r", *([start] if start else []))
        with pytest.raises(UserError, match=says):
            train(other, str(tmp_path / folder), progress=False)
    assert not (tmp_path / "other").exists()
    flow, velocities = tmp_path / "flow", ["train.steps=1", "train.flow_matching_steps=1", *DIT]
    train(small_config(*velocities), str(flow), progress=False)  # which saw r = t alone
    checks.check_start(
        small_config(*few, "model.time_conditioning=half_r", f"train.init_from={flow}")
    )


@pytest.mark.filterwarnings("ignore:model is of another kind")
def test_adapters_train_on_a_base_in_int8(small_config, tmp_path):
    """It stays, is in no checkpoint and comes back from its source, as others are sampled with."""
    train(small_config("train.steps=1", *DIT), str(tmp_path / "base"), progress=False)
    source = checkpoints.load_weights(tmp_path / "base")[2]
    made = names.flatten(jax.jit(int8.base)(source))
    few = [*ADAPTED, *DIT, f"train.init_from={tmp_path / 'base'}", "train.weights=int8"]
    run, same = small_config(*few), np.testing.assert_array_equal
    end = train(run, str(tmp_path / "run"), progress=False)
    for path, leaf in names.flatten(end.params).items():
        if is_adapter(path):
            assert np.any(leaf), path
        else:
            jax.tree.map(same, leaf, made[path])
    assert sum(map(int8.is_quantised, made.values())) == 3
    for part, tree in state.to_parts(end).items():
        assert part == "progress" or all(map(is_adapter, names.flatten(tree)))

    (tmp_path / "run" / "checkpoints" / "6").rename(tmp_path / "away")
    again = train(run, str(tmp_path / "run"), progress=False)
    jax.tree.map(same, *map(jax.device_get, (end, again)))
    sampled = names.flatten(checkpoints.load_weights(tmp_path / "run")[2])
    for path, leaf in names.flatten(source).items():
        np.testing.assert_array_equal(sampled[path], leaf, path)

    with pytest.raises(UserError, match="train.weights is 'int8' there, 'bfloat16' here"):
        other = small_config(*few[:-1], "train.weights=bfloat16")
        train(other, str(tmp_path / "run"), progress=False)


def test_int8_is_for_the_kernels_of_a_base(small_config):
    with pytest.raises(UserError, match="int8.*nothing can train: set adapter.rank"):
        small_config("train.weights=int8")
    with pytest.raises(UserError, match="int8.*this network has none of: use bfloat16"):
        setup.prepare(small_config("train.weights=int8", "adapter.rank=2"))


@pytest.mark.filterwarnings("ignore:model is of another kind")
def test_a_gate_that_stays_shut_is_refused(small_config):
    run = small_config("adapter.rank=2", "model.time_conditioning=gated", *DIT)
    with pytest.raises(UserError, match="whole leaves gated.*: add 'gated_time_embedder/.*'"):
        setup.prepare(run)


@pytest.mark.filterwarnings("ignore:(model|objective) is of another kind")
def test_jumps_that_one_time_cannot_tell_apart_are_refused(small_config):
    half_r = ("model.time_conditioning=half_r", "objective.order=1", *DIT)
    for kind in ("tutorial", "twinflow"):
        with pytest.raises(UserError, match="order is 1 .* sees t - r / 2 alone"):
            small_config(f"objective.form={kind}", *half_r)
        small_config(f"objective.form={kind}", half_r[0], *DIT)
    with pytest.raises(UserError, match=r"flow_map\), or another"):
        small_config("objective=meanflow", half_r[0], *DIT)
    for fits in ("ratios=(1,1,0,1)", "target_time=zero"):
        small_config("objective.form=twinflow", *half_r, f"objective.{fits}")
