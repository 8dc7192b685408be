"""What a form of the loss is: fill these five in, in a module of its own."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from twinflow_jax import contracts
from twinflow_jax.errors import reason
from twinflow_jax.objectives import path
from twinflow_jax.objectives.batch import Batch
from twinflow_jax.objectives.config import STUDENT, Shared
from twinflow_jax.objectives.draws import Counts, Draws, normal

ROWS = 24  # of the batch that `check_form` tries


@runtime_checkable
class Form(Protocol):
    """A module in this room, listed in FORMS. All of it is pure, and knows no Flax and no mesh.

    ROLES: what rows of a batch are for, in the order in which they stand there. Config: its
    hyperparameters, a frozen dataclass that derives from config.Shared. `check_form` asks for all.
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

        Where Config has auxiliary networks, params are {name: params}, the student's among them,
        and there is one more argument, learns: the loss is of those networks alone, and no
        gradient reaches one through the term of another.

        apply: `(params, x_t, t, r, cond) -> velocity`. teacher_params: the very same object as
        params where the student is the teacher. draws: from `draw`, for exactly these rows.
        totals: rows per role of the whole batch where this is a micro-batch of it (default: it
        is whole); losses and terms of the micro-batches then add up to the whole batch's.
        """


def drawn(form: Form, key, batch_size: int, sample_shape: tuple[int, ...], config: Any) -> Draws:
    """What a form draws. Raises TypeError for other rows than it counts."""
    draws = form.draw(key, batch_size, sample_shape, config)
    # Shapes only, once for each trace: a row too few would silently train on less.
    wanted = {role: {n} for role, n in form.counts(batch_size, config).items() if n}
    found = {role: {leaf.shape[0] for leaf in mine.values()} for role, mine in draws.items()}
    if found != wanted:
        raise TypeError(f"{config.form}: draw gives rows {found}, counts {wanted}")
    return draws


def check_form(name: str, form: Any) -> list[str]:
    """What a form lacks of its contract, one line each, its loss on a small batch included."""
    if problems := contracts.missing(form, Form):
        return problems
    if not issubclass(form.Config, Shared):
        return ["Config derives from no config.Shared"]
    config = form.Config()
    if config.form != name:
        problems.append(f"Config's form is {config.form!r}, not {name!r}")
    try:
        return problems + _check_loss(form, config)
    except Exception as error:  # of whatever kind: of one who is adding a form
        return [*problems, f"{type(error).__name__}: {reason(error)}"]


def _check_loss(form: Form, config: Shared) -> list[str]:
    counts, key = form.counts(ROWS, config), jax.random.key(0)
    if tuple(counts) != form.ROLES or sum(counts.values()) != ROWS:
        return [f"counts gives {counts} of {ROWS} rows, in ROLES {form.ROLES}"]
    draws, batch = drawn(form, key, ROWS, (2,), config), Batch(normal(key, ROWS, (2,)), {}, {})
    apply = lambda params, x_t, t, r, cond: params * (x_t + path.expand(t + 2 * r, x_t))
    params, problems = jnp.float32(0.5), []
    if config.auxiliary:
        params = {STUDENT: params} | dict.fromkeys(config.auxiliary, jnp.float32(0.4))
    for learns in dict.fromkeys(config.cycle):
        more = {"learns": learns} if config.auxiliary else {}
        of_params = lambda params, more=more: form.loss(
            apply, params, jnp.float32(0.3), batch, draws, config, **more
        )
        (loss, terms), gradient = jax.value_and_grad(of_params, has_aux=True)(params)
        if not jnp.isfinite(loss) or not jnp.allclose(sum(terms.values()), loss):
            problems.append(f"the loss is {loss}, its terms {', '.join(map(str, terms.values()))}")
        for name, one in (gradient if config.auxiliary else {STUDENT: gradient}).items():
            if not jnp.isfinite(one) or (one != 0) != (name in learns):
                of = f" of the {name} where {' and '.join(learns)} learns" if more else ""
                problems.append(f"the loss has the gradient {one}{of}")
    return problems
