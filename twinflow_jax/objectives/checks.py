"""Checks that every form's Config makes on the fields that all of them have."""

from twinflow_jax.errors import UserError


def check_shared(config) -> None:
    """Refuses values that no form can train with.

    Raises:
      UserError: order < 0, dt outside (0, 1), clip < 0, teacher_decay outside [0, 1],
        guidance < 0, or guidance >= 1 with a moving teacher: the teacher learns the guided
        target, so the effective guidance is the fixed point 1 / (1 - g), which then diverges.
    """
    if not isinstance(config.order, int) or config.order < 0:
        raise UserError(f"objective.order is {config.order}; give a whole number of sub-steps >= 0")
    if not 0 < config.dt < 1:
        raise UserError(f"objective.dt is {config.dt}; it lies between 0 and 1 (released: 0.01)")
    if not config.clip >= 0:
        raise UserError(f"objective.clip is {config.clip}; give 0 (off) or more")
    if not 0 <= config.teacher_decay <= 1:
        raise UserError(
            f"objective.teacher_decay is {config.teacher_decay}; give 0 (the student is the "
            "teacher), a decay below 1 (its moving average), or 1 (frozen)"
        )
    if not config.guidance >= 0:
        raise UserError(f"objective.guidance is {config.guidance}; give 0 (off) or more")
    if config.guidance >= 1 and config.teacher_decay < 1:
        raise UserError(
            f"objective.guidance is {config.guidance} with a moving teacher, which diverges "
            "(effective guidance 1/(1-g)): stay below 1, or freeze the teacher with "
            "objective.teacher_decay=1"
        )
