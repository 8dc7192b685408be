"""What the Configs of forms share: keys, and what none of them can train with."""

import dataclasses
from typing import Any, ClassVar

from twinflow_jax import keys
from twinflow_jax.errors import UserError
from twinflow_jax.keys import option

STUDENT = "student"  # the network that a run is about


@dataclasses.dataclass(frozen=True)
class Shared(keys.Part):
    """What every form has; it derives from this and adds its own.

    Raises:
      UserError: a value that no form can train with, such as guidance >= 1 with a moving teacher:
        the teacher learns the guided target, so the effective guidance is the fixed point
        1 / (1 - g), which then diverges.
    """

    section: ClassVar[str] = "objective"
    guidance = 0.0  # a key only of the forms that have it
    counts_steps = False  # whether its loss changes with the steps done (Batch.done)
    derivative = ""  # "jvp": of a form that takes the network's exact derivative
    learns_jumps = True  # otherwise r = t in every row
    any_jumps = False  # whether jumps of any length from one t are among them
    learns_fake = False  # whether it learns the flow to its own samples, at negative times
    image_free = False  # whether captions without pictures will do; of some a key

    form: str = option("", "the form of the loss, a name in objectives.FORMS")
    teacher_decay: float = option(
        0.99,
        "0: the student is the teacher; below 1: its moving average with this decay; 1: frozen "
        "(it gives velocities only: guidance, w or the real score; jumps are the student's own)",
        least=0, most=1,
    )

    @property
    def guided(self) -> str:
        """The key by which velocities are guided, if they are."""
        return "objective.guidance" if self.guidance else ""

    @property
    def auxiliary(self) -> dict[str, dict[str, Any]]:
        """Networks that start as the student does and learn beside it, by name: what each one's
        optimizer has in place of the run's `optimizer`."""
        return {}

    @property
    def pairs(self) -> bool:
        """Whether batches are of pictures and the noise that they were drawn from."""
        return False

    @property
    def cycle(self) -> tuple[tuple[str, ...], ...]:
        """The networks that learn at each step, over and over."""
        return ((STUDENT,),)

    def __post_init__(self):
        super().__post_init__()
        if self.guidance >= 1 and self.teacher_decay < 1:
            raise UserError(
                f"objective.guidance is {self.guidance} with a moving teacher, which diverges "
                "(effective guidance 1/(1-g)): stay below 1, or freeze the teacher with "
                "objective.teacher_decay=1"
            )


@dataclasses.dataclass(frozen=True)
class Twinned(Shared):
    """Of a form that learns jumps (rcgm.py) and is rectified by its twin (twin.py)."""

    order: int = option(2, "teacher sub-steps of a jump", least=1)
    dt: float = option(0.01, "length of the step along the known velocity", above=0, below=1)
    clip: float = option(1.0, "limit on the RCGM error; 0 is none", least=0)
    rectify_weight: float = option(0.5, "weight of the rectification loss; 0 is none", least=0)

    any_jumps = True
