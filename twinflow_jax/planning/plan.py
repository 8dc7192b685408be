"""What a config would cost on devices that nobody has yet: compiled, read, and priced."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from twinflow_jax import models, parallel, sampling
from twinflow_jax.config import Run
from twinflow_jax.objectives.config import STUDENT
from twinflow_jax.parallel import flags
from twinflow_jax.planning import cost, hlo
from twinflow_jax.planning.collectives import collectives
from twinflow_jax.planning.compiling import Compiled, compiled
from twinflow_jax.planning.topology import GIB, Topology, devices, generation_of
from twinflow_jax.training import flops, inputs, setup
from twinflow_jax.training.state import trained


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one topology. Bytes, FLOPs and seconds are of one device and one step.

    text: tokens of a row's. refused: why it does not compile, "" where it does. parts: bytes of
    what a device holds; the program's own come on top of peak_bytes. gradients: bytes of those of
    the weights that learn, which are among parts' "activations". passes: forwards of the batch
    that a step makes, in the mean over turns, "backwards" of which have a gradient and
    "derivatives" an exact derivative.
    analytic: FLOPs of the declared calls, matmul and attention. forwards: of the whole batch,
    that a step is worth. mean: FLOPs of the run's steps on average, this one's being 1.
    collectives: bytes by kind, "(looped)" inside loops.
    """

    topology: str
    mesh: dict[str, int]
    strategy: str
    remat: str
    rows: int
    text: int
    chips: int
    refused: str = ""
    passes: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: dict[str, int] = dataclasses.field(default_factory=dict)
    gradients: int = 0
    peak_bytes: int = 0
    hbm_bytes: int = 0
    host_bytes: int = 0
    analytic: dict[str, float] = dataclasses.field(default_factory=dict)
    compiled: dict[str, float] = dataclasses.field(default_factory=dict)
    forwards: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    components: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    overlapped: float = 0.0
    utilisation: float = 0.0
    steps: int = 1
    mean: float = 1.0
    compile_seconds: float = 0.0
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float:
        return self.rows / self.overlapped if self.overlapped else 0.0

    @property
    def run_seconds(self) -> float:
        """Of all the config's steps, without start, checkpoints and pictures."""
        return self.steps * self.mean * self.overlapped

    @property
    def chip_hours(self) -> float:
        return self.run_seconds * self.chips / 3600

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "images_per_second": self.images_per_second, "run_seconds": self.run_seconds,
            "chip_hours": self.chip_hours,
        }


Told = Callable[[Plan], None]  # of what is known before the compiler, which takes minutes


def train(run: Run, topology: Topology, hlo_file=None, told: Told = lambda _: None) -> Plan:
    """The plan of a training step, compiled for the topology: where networks take turns, of the one
    with the most FLOPs. What holds more than the memory before a step begins is not compiled.

    hlo_file: where to write the optimised HLO to.
    Raises:
      UserError: a run that cannot be trained there, whatever the memory.
    """
    prepared = setup.prepare(run, devices(topology))
    state, batch = prepared.abstract_state(), prepared.abstract_batch()
    turns = [setup.phase_of(run.objective, learns) for learns in run.objective.cycle]
    flops_of = {phase: prepared.step_flops(phase) for phase in turns}
    calls_of = {phase: prepared.evaluations(phase) for phase in turns}
    phase = max(flops_of, key=flops_of.get)
    mean = sum(flops_of[turn] for turn in turns) / len(turns) / flops_of[phase]
    notes = () if len(flops_of) == 1 else (
        f"{turns.count(phase)} of {len(turns)} steps is like this one, at which {phase} learn; a "
        f"step has {mean:.2f} of its FLOPs on average, which the run's hours assume of its seconds",
    )
    parts = {
        name: parallel.on_device(part) for name, part in (
            ("weights", state.params), ("optimizer", state.opt_state), ("teacher", state.teacher),
            ("average", state.average), ("auxiliary networks", state.auxiliary), ("batch", batch),
        )
    }
    one = flops.forward(prepared.model, run.shape)
    row_parts = parallel.row_parts(prepared.strategy.mesh)
    remat = prepared.model.config.remat
    work = flops.step(one, calls_of[phase], remat, row_parts)
    lower = lambda: prepared.lower(phase, lowering_platforms=("tpu",))
    calls = [call for turn in turns for call in calls_of[turn]]
    share = lambda kind: sum(c.rows * kind(c) for c in calls) / run.data.batch_size / len(turns)
    passes = {
        "forwards": share(lambda c: True), "backwards": share(lambda c: c.trained or c.through),
        "derivatives": share(lambda c: c.derived),
    }
    learning = {STUDENT: trained(state.params, state.fixed)} | {
        name: one.params for name, one in state.auxiliary.items()
    }
    learns = run.objective.cycle[turns.index(phase)]
    base = _base(
        run, topology, remat, steps=run.train.steps, mean=mean, notes=notes, passes=passes,
        gradients=parallel.on_device([learning[name] for name in learns]),
    )
    return _compiled(base, lower, prepared.strategy.mesh, parts, one, work, hlo_file, told)


def sample(
    run: Run, topology: Topology, steps: int, hlo_file=None, told: Told = lambda _: None
) -> Plan:
    """The plan of drawing `data.batch_size` latents in `steps` evaluations, weights in the dtype
    of computation; text encoder and autoencoder are not in it."""
    prepared = setup.prepare(run, devices(topology))
    model, mesh = prepared.model, prepared.strategy.mesh
    cast = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype, sharding=leaf.sharding)
    params = jax.tree.map(cast, prepared.abstract_state().params)
    batch = prepared.abstract_batch()
    key = jax.eval_shape(lambda: jax.random.key(0))
    grid, rows = sampling.few_step(steps), run.data.batch_size

    def draw(params, noise, cond, key):
        return sampling.sample(model.apply, params, noise, cond, grid, key)

    def lower():
        with prepared.strategy.applied():
            traced = jax.jit(draw).trace(params, batch["x"], batch["cond"], key)
            return traced.lower(lowering_platforms=("tpu",))

    one = flops.forward(model, run.shape)
    work = flops.step(
        one, [flops.Call(rows, False)] * grid.nfe, "none", parallel.row_parts(mesh)
    )
    given = batch["x"], batch["cond"]
    parts = {"weights": parallel.on_device(params), "batch": parallel.on_device(given)}
    base = _base(run, topology, "none")
    return _compiled(base, lower, mesh, parts, one, work, hlo_file, told)


def shares(run: Run) -> dict[models.Shape, float]:
    """Of the rows that a run trains on, by their shapes; none where its records are not here."""
    if not run.data.records or not all(epath.Path(path).exists() for path in run.data.records):
        return {}
    return inputs.shapes(run, inputs.open_data(run))


def impossible(run: Run, topology: Topology, why: str) -> Plan:
    """The plan of a run that the topology does not take."""
    return _base(run, topology, run.model.remat, refused=why)


def _base(run: Run, topology: Topology, remat: str, **known) -> Plan:
    """The plan with what is known before anything is compiled."""
    rows, text = run.data.batch_size, run.shape.text
    return Plan(topology.name, {}, run.mesh.strategy, remat, rows, text, topology.chips, **known)


def _compiled(base: Plan, lower, mesh, parts, one, work, hlo_file, told: Told) -> Plan:
    """The plan with what the compiler says."""
    placed, count = list(mesh.devices.flat), mesh.devices.size
    options = flags.options(placed[0].device_kind)
    plan = dataclasses.replace(
        base, mesh={axis: size for axis, size in mesh.shape.items() if size > 1} or {"fsdp": 1},
        parts=parts, hbm_bytes=generation_of(placed).hbm_bytes, options=options,
        analytic={"matmul": work.matmul / count, "attention": work.attention / count},
        forwards=(work.matmul + work.attention) / (base.rows * (one.matmul + one.attention)),
    )
    told(plan)
    held, trains = sum(parts.values()), bool(parts.get("optimizer"))
    made = Compiled(0.0, f"holds {held / GIB:.1f} of {plan.hbm_bytes / GIB:.1f} GiB before a step")
    if held < plan.hbm_bytes:
        made = compiled(lower, options, placed, base.topology)
    if made.refused:
        stays = held / plan.hbm_bytes if trains else 0.0
        helps = levers(base.strategy, base.remat, stays, trains)
        why = f"{made.refused}; what would help: {helps}"
        return dataclasses.replace(plan, refused=why, compile_seconds=made.seconds)
    if hlo_file:
        hlo_file.write_text(made.text)
    program = hlo.parse(made.text)
    predicted = cost.predict(program, placed)
    by_name = {part.name: part for part in predicted.components}
    amount = lambda name: by_name[name].amount if name in by_name else 0.0
    return dataclasses.replace(
        plan, peak_bytes=made.peak, host_bytes=made.host,
        parts=parts | {
            "activations": made.peak - sum(parts.values()),  # its peak includes the arguments
            "program": made.code,
        },
        compiled={"matmul": amount("matmul"), "attention": amount("attention kernels")},
        collectives=_collectives(program),
        components={
            part.name: {k: getattr(part, k) for k in ("seconds", "hidden", "amount", "count")}
            for part in predicted.components
        },
        seconds=predicted.seconds, overlapped=predicted.overlapped,
        utilisation=predicted.utilisation, compile_seconds=made.seconds,
        notes=base.notes + predicted.notes,
    )


def _collectives(program: hlo.Program) -> dict[str, dict[str, float]]:
    """Executions, bytes and overlapped bytes of each kind, in loops and outside."""
    found: dict[str, dict[str, float]] = {}
    for one in collectives(program):
        name = one.kind + (" (looped)" if one.in_loop else "")
        row = found.setdefault(name, {"count": 0, "bytes": 0, "overlapped": 0})
        row["count"] += one.count
        row["bytes"] += one.total
        row["overlapped"] += one.total if one.overlapped else 0
    return found


def levers(strategy: str, remat: str, stays: float, trains: bool = True) -> str:
    """What lets a program with less memory do. stays: share of the memory that is taken between
    steps; trains: whether it is a step."""
    found = []
    if strategy == "gather_once":
        found.append("mesh.strategy=gather_layers")
    if trains:
        if remat not in ("full", "offload"):
            found.append("model.remat=full")
        elif remat == "full":
            found.append("model.remat=offload")
        if stays > 0.5:
            weights = "train.weights=bfloat16 (int8 beside adapters)"
            found.append(f"optimizer.moments=bfloat16, {weights}, no averages")
        found.append("train.micro_steps")
    return ", ".join([*found, "fewer rows", "more chips"])
