"""What a form of the loss is: fill these five in, in a module of its own."""

from typing import Any, Protocol, runtime_checkable

import jax

from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import Shared
from twinflow_jax.objectives.draws import Counts, Draws


@runtime_checkable
class Form(Protocol):
    """A module in this room, listed in FORMS. All of it is pure, and knows no Flax and no mesh.

    ROLES: what rows of a batch are for, in the order in which they stand there. Config: its
    hyperparameters, a frozen dataclass that derives from config.Shared.
    """

    ROLES: tuple[str, ...]
    Config: type[Shared]

    def counts(batch_size: int, config: Any) -> Counts:  # noqa: N805 - of a module
        """Rows per role of a batch of so many."""

    def draw(
        key: jax.Array, batch_size: int, sample_shape: tuple[int, ...], config: Any  # noqa: N805
    ) -> Draws:
        """Everything random in one step: `{role: {name: array with a row for each sample}}`.

        Roles without rows are absent.
        """

    def loss(
        apply: Any, params: Any, teacher_params: Any, batch: Batch, draws: Draws,  # noqa: N805
        config: Any, totals: Counts | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of rows that stand in role order, and its terms by name, which add up to it.

        apply: `(params, x_t, t, r, cond) -> velocity`. teacher_params: the very same object as
        params where the student is the teacher. draws: from `draw`, for exactly these rows.
        totals: rows per role of the whole batch where this is a micro-batch of it (default: it
        is whole); losses and terms of the micro-batches then add up to the whole batch's.
        """
