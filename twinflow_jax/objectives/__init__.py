"""What is minimised. Pure functions of `apply(params, x_t, t, r, cond) -> velocity`.

The forms, one module each (`form.Form` says what one is):
`twinflow` (as released: roles), `tutorial` (five full-batch losses) and `paper` (equations).
A preset is a name for one Config; `build` binds a Config to its form.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from twinflow_jax.arrays import Apply, Scalar
from twinflow_jax.errors import UserError
from twinflow_jax.objectives import paper, tutorial, twinflow
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import Shared
from twinflow_jax.objectives.draws import Counts, Draws, cut
from twinflow_jax.objectives.form import Form, drawn

FORMS: dict[str, Form] = {
    "twinflow": twinflow,
    "tutorial": tutorial,
    "paper": paper,
}

PRESETS = {
    "released": twinflow.Config(),
    "tutorial": tutorial.Config(),
    "paper": paper.Config(),
    "rcgm": twinflow.Config(ratios=(1.0, 1.0, 1.0, 0.0), rectify_weight=0.0),
    "flow_matching": twinflow.Config(
        ratios=(0.0, 1.0, 0.0, 0.0), consistency_ratio=0.0, order=0, guidance=0.0,
        rectify_weight=0.0, teacher_decay=0.0, sample_weight=False, distance="l2",
    ),
    "image_free": twinflow.Config(
        image_free=True, teacher_decay=1.0, guidance=4.0, rectify_weight=0.75
    ),
}


def preset(name: str, **fields: Any) -> dict[str, Any]:
    """The fields of a preset, some replaced, as a dict for a config file.

    Raises:
      UserError: no preset of that name, or a field that its form does not have.
    """
    if name not in PRESETS:
        raise UserError(f"no objective preset {name!r}; choose from {', '.join(PRESETS)}")
    known = dataclasses.asdict(PRESETS[name])
    for field in fields:
        if field not in known:
            raise UserError(
                f"the objective preset {name!r} has no field {field!r}; it has {', '.join(known)}"
            )
    return known | fields


@dataclasses.dataclass(frozen=True)
class Objective:
    """A form bound to its Config. Hashable, so that it can be a static argument of jit."""

    config: Shared

    @property
    def form(self) -> Form:
        return FORMS[self.config.form]

    def counts(self, batch_size: int) -> Counts:
        """Rows per role of a batch, in row order.

        Raises:
          UserError: the batch is too small for each role in use to have a row.
        """
        counts = self.form.counts(batch_size, self.config)
        if not self._fills(batch_size):
            larger = next(filter(self._fills, range(batch_size + 1, batch_size + 100_000)), None)
            advice = f"a batch of {larger} fills all" if larger else "give it a larger share"
            raise UserError(
                f"a batch of {batch_size} leaves a role without rows "
                f"({', '.join(f'{role} {n}' for role, n in counts.items())}): {advice}; "
                "train.micro_steps splits a batch where memory is short"
            )
        return counts

    def _fills(self, batch_size: int) -> bool:
        used = self.form.counts(100_000, self.config)
        mine = self.form.counts(batch_size, self.config)
        return all(mine[role] > 0 for role, rows in used.items() if rows > 0)

    def draw(self, key, batch_size: int, sample_shape: tuple[int, ...]) -> Draws:
        return drawn(self.form, key, batch_size, sample_shape, self.config)

    def loss(
        self, apply: Apply, params, teacher_params, batch: Batch, draws: Draws,
        totals: Counts | None = None,
    ) -> tuple[Scalar, dict[str, Scalar]]:
        return self.form.loss(apply, params, teacher_params, batch, draws, self.config, totals)

    def cut(self, draws: Draws, start: int, stop: int) -> Draws:
        """The draws of batch rows start to stop: those of one micro-batch."""
        return cut(draws, self.form.ROLES, start, stop)


def config_of(form: Any) -> type[Shared]:
    """The Config class of a form.

    Raises:
      UserError: no such form.
    """
    if form not in list(FORMS):  # what a config gives may have no hash
        raise UserError(f"objective.form is {form!r}; choose from {', '.join(FORMS)}")
    return FORMS[form].Config


def build(fields: Mapping[str, Any]) -> Objective:
    """An objective from a config's fields (`preset(...)`, perhaps overridden).

    Raises:
      UserError: unknown form or field, or a value that cannot be trained with.
    """
    return Objective(config_of(fields.get("form")).of(fields))
