"""From a run's description to its parts on the devices: one composition for training and plans."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from twinflow_jax import models, objectives, parallel, seeds
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError
from twinflow_jax.models import attention
from twinflow_jax.models.settings import Settings
from twinflow_jax.objectives.config import STUDENT, Shared
from twinflow_jax.training import flops, optimizers, state, step


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run's parts. fresh: the state of step 0 with given weights. phases: the jitted train steps
    by name, in the order they are used; learned: their objectives. Where networks take turns, each
    kind of step is a phase of its own."""

    run: Run
    model: models.Model
    fresh: Callable[[Any], state.TrainState]
    strategy: parallel.Strategy
    layouts: state.TrainState
    learned: dict[str, objectives.Objective]
    phases: dict[str, Any]

    def initial(self):
        """Jitted: the state of step 0 with weights drawn anew."""
        key = seeds.initial(self.run.train.seed)
        return jax.jit(lambda: self.fresh(self.model.init(key)), out_shardings=self.layouts)

    def started(self):
        """Jitted: the state of step 0 with given weights. A base is taken over, not copied: it may
        fill more than half of the memory."""
        taken = (0,) if self.run.adapter.rank else ()
        return jax.jit(self.fresh, out_shardings=self.layouts, donate_argnums=taken)

    def ahead(
        self, shapes: Sequence[models.Shape], first: int = 0
    ) -> list[tuple[str, models.Shape]]:
        """The phases that have steps from `first` on, with each shape of rows."""
        train = self.run.train
        begin = max(first, train.flow_matching_steps)
        steps = (first, *range(begin, begin + len(self.run.objective.cycle)))
        found = {self.phase(step) for step in steps if step < train.steps}
        return [(phase, shape) for phase in self.phases for shape in shapes if phase in found]

    def phase(self, step: int) -> str:
        """The name of a step's phase."""
        if step < self.run.train.flow_matching_steps:
            return "flow_matching"
        return phase_of(self.run.objective, self.run.learns(step))

    def abstract_state(self) -> state.TrainState:
        """Shapes, dtypes and layouts."""
        shapes = jax.eval_shape(self.fresh, self.model.abstract_params())
        return jax.tree.map(_placed, shapes, self.layouts)

    def abstract_batch(self, shape: models.Shape | None = None) -> dict[str, Any]:
        """What a step takes: x and cond of every row, noise too of pairs, and the condition that
        stands for none, of every row too where that is about pictures.

        shape: of rows (default: the run's).
        """
        model, rows = self.model, self.run.data.batch_size
        shape = shape or self.run.shape
        null = model.abstract_null(shape)
        whole = parallel.replicated(self.strategy.mesh)
        of_rows = lambda leaf: jax.ShapeDtypeStruct(
            (rows, *leaf.shape[1:]), leaf.dtype, sharding=self.over_rows
        )
        x = jax.ShapeDtypeStruct((1, *shape.sample), jnp.float32)
        of_null = of_rows if shape.references else lambda leaf: _placed(leaf, whole)
        noise = {"noise": of_rows(x)} if self.run.objective.pairs else {}
        return noise | {
            "x": of_rows(x), "cond": jax.tree.map(of_rows, null),
            "null": jax.tree.map(of_null, null),
        }

    def evaluations(self, phase: str) -> list[flops.Call]:
        """Those of one step of a phase."""
        found = flops.calls(
            self.learned[phase], self.run.data.batch_size, self.model.sample_shape,
            self.run.train.micro_steps,
        )
        if not self.run.adapter.rank:
            return found
        # Gradients go through a frozen base; beside its products those of adapters are few.
        through = lambda call: call.trained or call.through
        return [dataclasses.replace(c, trained=False, through=through(c)) for c in found]

    def step_flops(self, phase: str, shape: models.Shape | None = None) -> int:
        """Model FLOPs of one step of a phase on all devices, for rows of a shape."""
        # As a CPU computes it: plain attention, whose FLOPs no kernel hides or fills up.
        one = flops.forward(self.model, shape or self.run.shape, "cpu")
        return flops.worth(one, self.evaluations(phase))

    @functools.cached_property
    def over_rows(self) -> jax.sharding.NamedSharding:
        return parallel.over_rows(self.strategy.mesh, self.run.data.batch_size)

    def lower(self, phase: str, shape: models.Shape | None = None, **options):
        """A phase's step for rows of a shape, traced for this mesh."""
        check_tokens(self.strategy.mesh, shape or self.run.shape, self.run.model)
        arguments = self.abstract_state(), self.abstract_batch(shape)
        exact = self.learned[phase].config.derivative == "jvp"
        with self.strategy.applied(), attention.plain() if exact else contextlib.nullcontext():
            return self.phases[phase].trace(*arguments).lower(**options)


def prepare(run: Run, devices: list | None = None) -> Setup:
    """The parts that run on the devices, on all of them or on these.

    Raises:
      UserError: a mesh or strategy that does not go with the devices, the network or the batch.
    """
    model, train, shared = models.build(run.model, adapter=run.adapter), run.train, run.mesh
    optimizer = optimizers.create(run.optimizer, run.updates(STUDENT))
    others = {
        name: optimizers.create(dataclasses.replace(run.optimizer, **fields), run.updates(name))
        for name, fields in run.objective.auxiliary.items()
    }
    if not model.config.splits_tokens:
        if shared.context > 1:
            raise UserError(
                f"mesh.context is {shared.context}, but model {run.model.name!r} does not "
                "split its tokens: set it to 1"
            )
        shared = dataclasses.replace(shared, context=1)
    mesh = parallel.make_mesh(shared, devices, run.data.batch_size)
    abstract = model.abstract_params()
    check_divisible(run.data.batch_size, model, mesh)
    check_tokens(mesh, run.shape, run.model)
    decay = run.objective.teacher_decay
    fresh = lambda params: state.create(
        params, optimizer, decay, train.ema_decay, train.weights, model.fixed,
        bool(run.adapter.rank), others,
    )
    shapes = jax.eval_shape(fresh, abstract)
    strategy = parallel.create(shared.strategy, mesh, shapes.params, model.axes(), model.dtype)
    layouts = state.layouts(shapes, optimizer, strategy.layouts, parallel.replicated(mesh), others)

    learned = {}
    if train.flow_matching_steps:
        learned["flow_matching"] = objectives.build(
            objectives.preset("flow_matching", teacher_decay=decay)
        )
    learned |= {
        phase_of(run.objective, turn): objectives.Objective(run.objective, turn)
        for turn in run.objective.cycle
    }
    return Setup(
        run, model, fresh, strategy, layouts, learned,
        {
            name: step.make_step(
                phase, model.apply, optimizer, train, strategy, layouts, auxiliary=others
            )
            for name, phase in learned.items()
        },
    )


def phase_of(objective: Shared, learns: tuple[str, ...]) -> str:
    """The name of an objective's steps at which these networks learn."""
    return "objective" if len(set(objective.cycle)) == 1 else " and ".join(learns)


def check_divisible(rows: int, model: models.Model, mesh: jax.sharding.Mesh) -> None:
    """Refuses rows and heads that the mesh does not divide.

    Raises:
      UserError: names the key and numbers that would do.
    """
    parts = parallel.row_parts(mesh)
    if rows % parts:
        raise UserError(
            f"data.batch_size is {rows}, which the {parts} parts of mesh.data x mesh.fsdp do not "
            f"divide: take {-(-rows // parts) * parts}, or mesh.fsdp=0 and mesh.context=0"
        )
    tensor, heads = mesh.shape["tensor"], model.config.heads
    if tensor > 1 and (heads == 0 or heads % tensor):
        raise UserError(
            f"mesh.tensor is {tensor}, which does not divide the {heads} heads of model "
            f"{model.config.name!r}"
        )


def check_tokens(mesh: jax.sharding.Mesh, shape: models.Shape, settings: Settings) -> None:
    """Refuses samples whose tokens, with those of their sources, the mesh does not divide.

    Raises:
      UserError: names the key and the number.
    """
    context = mesh.shape["context"]
    tokens = sum(
        math.prod(side // settings.patch for side in one[:2])
        for one in (shape.sample, *shape.references)
    )
    if tokens % context:
        raise UserError(
            f"mesh.context is {context}, which does not divide the {tokens} tokens of an image"
        )


def _placed(leaf, layout):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
