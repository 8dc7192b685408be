"""A queue of wishes and the one thread that draws them."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import sys
import traceback
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from twinflow_jax import images
from twinflow_jax.drawing import album
from twinflow_jax.errors import UserError, one_line, reason
from twinflow_jax.serving.networks import Network, trajectory
from twinflow_jax.serving.wish import Wish

MOST = 16  # wishes that wait
Event = dict[str, Any]


class Left(Exception):
    """The page that asked is gone."""


@dataclasses.dataclass(eq=False)
class Job:
    """A wish, and where its events go; None ends them."""

    wish: Wish
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)
    left: bool = False

    def put(self, event: Event | None) -> None:
        """Gives an event from the thread that draws. Raises Left where nobody waits for it."""
        if self.left:
            raise Left
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Studio:
    """Draws one wish after the other, with networks that stay."""

    def __init__(self, networks: Sequence[Network]):
        self.networks = networks
        self._waiting: list[Job] = []
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    async def events(self, wish: Wish) -> AsyncIterator[Event]:
        """What becomes of a wish: its place in the queue, states, pictures, mistakes."""
        job = Job(wish, asyncio.get_running_loop())
        self._waiting.append(job)
        job.events.put_nowait({"ahead": len(self._waiting) - 1})
        self._thread.submit(self._work, job)
        try:
            while (event := await job.events.get()) is not None:
                yield event
        finally:  # cancelled, where the browser left
            job.left = True

    def check_room(self) -> None:
        """Raises UserError where too many wait."""
        if len(self._waiting) >= MOST:
            raise UserError(f"{MOST} drawings wait already: try again in a moment")

    def _work(self, job: Job) -> None:
        self._waiting.remove(job)
        for ahead, other in enumerate(list(self._waiting), 1):
            other.loop.call_soon_threadsafe(other.events.put_nowait, {"ahead": ahead})
        try:
            for place in job.wish.checkpoints:
                self._checkpoint(job, place)
            job.put(None)
        except Left:
            print("a browser left: the rest of its drawing is dropped", file=sys.stderr)

    def _checkpoint(self, job: Job, place: int) -> None:
        """All that a wish asks of one checkpoint; what goes wrong is told in its row."""
        cell = {"checkpoint": place}
        tell = lambda **event: job.put(cell | event)
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                for event in drawn(self.networks[place], job.wish, tell):
                    tell(**event)
            for note in dict.fromkeys(str(one.message) for one in told):
                one_line(note)
                tell(note=note)
        except Left:
            raise
        except UserError as error:
            print(f"refused: {error}", file=sys.stderr)
            tell(error=str(error))
        except Exception as error:  # a bug, or no memory; the page goes on
            if "RESOURCE_EXHAUSTED" in str(error):
                line = "this takes more memory than the device has: choose a smaller size"
                print(f"refused: {line}", file=sys.stderr)
            else:
                line = f"this failed ({reason(error, 120)}); the console says more"
                traceback.print_exception(error)
            tell(error=line)


def drawn(network: Network, wish: Wish, tell) -> Iterator[Event]:
    """Pictures and trajectories of a wish from one checkpoint, each as soon as it is there."""
    for evaluations in wish.evaluations:
        said = lambda text: tell(evaluations=evaluations, state=text)  # noqa: B023
        found = network.draw(wish, evaluations, said)
        yield {
            "evaluations": evaluations, "nfe": found.nfe, "seconds": found.seconds,
            "pictures": [
                {"png": png(x, page.text), "name": page.name}
                for x, page in zip(found.pictures, found.pages, strict=True)
            ],
        }
    for fake in (False, True) if wish.strip else ():
        said = lambda text: tell(strip=fake, state=text)  # noqa: B023
        states = network.strip(wish, fake, said)
        if states is not None:
            yield {
                "strip": fake, "times": trajectory(fake).times, "pictures": [
                    {"png": png(x, album.settings())} for x in states
                ],
            }


def png(x: Float[np.ndarray, "H W C"], text: dict[str, str]) -> str:
    """A picture in [-1, 1] as a PNG file in base64."""
    return base64.b64encode(images.png(Image.fromarray(images.to_uint8(x)), text)).decode()
