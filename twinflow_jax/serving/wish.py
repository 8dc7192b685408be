"""What somebody at the page asks for."""

import base64
import dataclasses
import json

from twinflow_jax import arguments, seeds
from twinflow_jax.errors import UserError

EVALUATIONS = (1, 2, 4, 8, 32)
COUNTS = (1, 4, 9)  # pictures of each checkpoint and number of evaluations
LONGEST = 1 << 17  # letters of a prompt
LARGEST = 1 << 26  # bytes of a request, which holds the pictures to edit


@dataclasses.dataclass(frozen=True)
class Wish:
    """One press of the button. prompt, size: of networks that draw from text; label: of the others.

    checkpoints: their places in the list. size: (width, height) in pixels, None for the network's
    own. strip: whether the trajectories are wanted too. pictures: files, of networks that edit.
    """

    checkpoints: tuple[int, ...]
    evaluations: tuple[int, ...]
    count: int
    seed: int
    label: int
    prompt: str
    size: tuple[int, int] | None
    strip: bool
    pictures: tuple[bytes, ...] = dataclasses.field(repr=False)

    @classmethod
    def of(cls, body: bytes, checkpoints: int) -> "Wish":
        """The wish of a request's JSON. checkpoints: how many there are.

        Raises:
          UserError: it is none; says what is wrong in it.
        """
        if len(body) > LARGEST:
            raise UserError(f"the request has over {LARGEST:,} bytes: choose smaller pictures")
        try:
            asked = json.loads(body)
            size = arguments.size(asked["size"]) if asked["size"] else None
            wish = cls(
                checkpoints=_among(range(checkpoints), asked["checkpoints"], "a checkpoint"),
                evaluations=_among(EVALUATIONS, asked["evaluations"], "a number of evaluations"),
                count=asked["count"], seed=seeds.parse(str(asked["seed"])), label=asked["label"],
                prompt=asked["prompt"], size=size, strip=bool(asked["strip"]),
                pictures=tuple(
                    base64.b64decode(one, validate=True) for one in asked["pictures"]
                ),
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"the request is not the page's ({type(error).__name__})") from error
        if wish.count not in COUNTS or type(wish.label) is not int or type(wish.prompt) is not str:
            raise UserError("the request is not the page's: count, label or prompt")
        if len(wish.prompt) > LONGEST:
            raise UserError(f"the prompt has over {LONGEST:,} letters: shorten it")
        return wish


def _among(known, asked: list, what: str) -> tuple[int, ...]:
    """Those of the known ones that were asked for, in order."""
    if unknown := set(asked) - set(known):
        raise UserError(f"{min(unknown, key=str)!r} is not {what} of this page")
    if not asked:
        raise UserError(f"choose {what}")
    return tuple(one for one in known if one in asked)
