"""Checkpoints in memory that draw what a page asks for, by what `twinflow sample` draws with."""

import contextlib
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from twinflow_jax import checkpoints, parallel, sampling
from twinflow_jax.checkpoints import store
from twinflow_jax.config import Run
from twinflow_jax.drawing import album, by_edit, by_prompt, codec, denoising, editing, pictures
from twinflow_jax.drawing.conditions import Embeddings
from twinflow_jax.drawing.pipeline import Clock, Pipeline, open_pipeline, run_of
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.sampling import Grid, batched, few_step, make_grid
from twinflow_jax.serving.wish import Wish

STATES = 8  # steps of a trajectory that is shown
LARGER = 4  # times the pixels that a network was made for: the largest picture
Say = Callable[[str], None]
Pictures = Float[np.ndarray, "N _ _ C"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures in [-1, 1], each with what its file says; seconds: of one, without compiling."""

    pictures: Pictures
    pages: Sequence[album.Page]
    seconds: float
    nfe: int


@runtime_checkable
class Network(Protocol):
    """A checkpoint that draws. name: on the page; about: what the page says of it."""

    name: str
    about: dict[str, Any]

    def draw(self, wish: Wish, evaluations: int, say: Say) -> Drawn:
        """What a wish asks for. say: is told what is being done.

        Raises:
          UserError: what was wished cannot be drawn.
        """

    def strip(self, wish: Wish, fake: bool, say: Say) -> Pictures | None:
        """The states on the way from noise to the first picture, or on the fake trajectory, which
        not all networks have."""


def grids(jumps: bool, evaluations: int) -> Grid:
    """The recommended one; along velocities, where a network has learned no jumps."""
    return few_step(evaluations) if jumps else make_grid(evaluations, style="mul")


def trajectory(fake: bool) -> Grid:
    """Of the strip."""
    return make_grid(STATES, style="mul", fake=fake)


class ByClass:
    """A run that draws classes."""

    def __init__(self, folder: epath.Path, name: str):
        self.run, self.model, self.params, step = checkpoints.load_weights(folder)
        self.name, self._seen = name, set[Hashable]()
        fake = self.run.objective.learns_fake and not self.run.only_velocities
        self.about = _about(name, step, self.run, fake) | {
            "classes": max(self.run.model.num_classes, 1), "size": self.model.sample_shape[1::-1],
        }
        weights = store.fingerprint(names.flatten(self.params))
        self._told = {"checkpoint": name, "at_step": step, "weights": weights}

    def draw(self, wish: Wish, evaluations: int, say: Say) -> Drawn:
        grid = grids(not self.run.only_velocities, evaluations)
        labels = self._labels(wish)
        places = sampling.counted(labels)
        draw = lambda: np.concatenate(list(sampling.by_class(
            self.model, self.params, labels, places, grid, wish.seed
        )))
        self._first((grid, wish.count), draw, say)
        begin = time.perf_counter()
        x = draw()
        seconds = (time.perf_counter() - begin) / len(x)
        text = album.settings(**self._told, seed=wish.seed, **grid.told())
        pages = [
            album.Page(f"class{wish.label}_{place:04d}_{self.name}_{grid.nfe}nfe_seed{wish.seed}",
                       text | {"class": str(wish.label)})
            for place in places
        ]
        return Drawn(x, pages, seconds, grid.nfe)

    def strip(self, wish: Wish, fake: bool, say: Say) -> Pictures | None:
        if fake and not self.about["fake"]:
            return None
        labels = self._labels(wish)[:1]
        keys = batched.keys_of(labels, sampling.counted(labels), wish.seed)
        noise, fresh = batched.started(keys, self.model.sample_shape)
        draw = lambda: np.asarray(sampling.trajectory(
            self.model.apply, self.params, noise, self.model.cond(labels), trajectory(fake), fresh
        ))[:, 0]
        self._first(fake, draw, say)
        return draw()

    def _labels(self, wish: Wish) -> np.ndarray:
        last = self.about["classes"] - 1
        if not 0 <= wish.label <= last:
            raise UserError(f"class {wish.label}: {self.name} has classes 0 to {last}")
        return np.full(wish.count, wish.label, np.int32)

    def _first(self, key: Hashable, draw: Callable, say: Say) -> None:
        """Compiles what draws, by drawing once, where that has not been done."""
        say("drawing" if key in self._seen else "compiling, once for this shape")
        if key not in self._seen:
            draw()
            self._seen.add(key)


class Telling(Clock):
    """A clock that says what it measures."""

    say: Say = staticmethod(lambda text: None)
    KINDS = {"load": "loading for", "compile": "compiling, once for this shape:", "run": ""}

    @contextlib.contextmanager
    def measure(self, stage: str, kind: str):
        self.say(f"{self.KINDS[kind]} {stage}".strip())
        with super().measure(stage, kind):
            yield

    def ran(self) -> float:
        """Seconds in which programs ran, so far, but those that encode text."""
        return sum(self.seconds.get(stage, {}).get("run", 0) for stage in ("denoising", "decoding"))


@dataclasses.dataclass(frozen=True)
class Visited:
    """A sampler that gives the states along a grid, side by side, in place of the last one."""

    grid: Grid

    def __call__(self, apply: Callable, params, noise, cond, null, keys) -> jax.Array:
        states = sampling.trajectory(apply, params, noise, cond, self.grid, keys)
        return jnp.concatenate(list(states), axis=2)


class ByPrompt:
    """An imported checkpoint, or a text-to-image run."""

    def __init__(self, found: Pipeline, name: str, run: Run | None):
        self.name, self._clock, self._open = name, Telling(), contextlib.ExitStack()
        self._pipeline = dataclasses.replace(found, progress=False, clock=self._clock)
        self._own, self._scale = denoising.latent_shape(found, None), found.config("vae").downscale
        self._jumps = found.knows_r and not (run and run.only_velocities)
        self._base = not found.knows_r
        fake = run.objective.learns_fake and not run.only_velocities if run else found.knows_r
        self.about = _about(name, found.step, run, fake) | {
            "classes": 0, "size": (self._own[1] * self._scale, self._own[0] * self._scale),
        }
        weights = store.fingerprint(found.arrays("transformer"))
        self._told = {"checkpoint": name, "at_step": found.step, "weights": weights}
        self._embedded: dict[tuple, tuple] = {}

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each network in memory."""
        count = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
        networks = ("transformer", "vae", *self._pipeline.family.encoders)
        return {
            name: sum(map(count, jax.tree.leaves(self._pipeline.abstract(name))))
            for name in networks
        }

    def keep(self) -> None:
        """Has the networks stay in memory, once they are loaded."""
        self._pipeline = self._open.enter_context(self._pipeline.kept())

    def draw(self, wish: Wish, evaluations: int, say: Say) -> Drawn:
        shape = self._prepare(wish, say)
        if self._base:
            way = by_prompt.base(self._pipeline, shape, evaluations)
        else:
            way = by_prompt.few(grids(self._jumps, evaluations))
        cond, null = self._embed(wish, way.settings.get("negative"))
        numbers = np.arange(wish.count)
        before = self._clock.ran()
        x = np.stack(list(pictures(
            self._pipeline, way.sampler, cond, np.zeros_like(numbers), numbers, shape, wish.seed,
            null=null,
        )))
        seconds = (self._clock.ran() - before) / len(x)
        x, more = self._finished(wish, x)
        text = album.settings(
            **self._told, seed=wish.seed, size=shape, dtype=self._pipeline.dtype, **more,
            **way.settings,
        )
        pages = [
            album.Page(f"{by_prompt.plain(wish.prompt)}_{number:02d}_{way.label}_seed{wish.seed}",
                       text | {"prompt": wish.prompt, "number": str(number)})
            for number in numbers
        ]
        return Drawn(x, pages, seconds, way.settings["nfe"])

    def strip(self, wish: Wish, fake: bool, say: Say) -> Pictures | None:
        if fake and not self.about["fake"]:
            return None
        shape = self._prepare(wish, say)
        cond, _ = self._embed(wish, None)
        [beside] = denoising.denoise(
            self._pipeline, Visited(trajectory(fake)), cond, [0], [0], shape, wish.seed
        )
        states = np.concatenate(np.split(beside, STATES + 1, axis=2))
        return np.stack(list(codec.decode(self._pipeline, states)))

    def _embed(self, wish: Wish, negative: str | None) -> tuple[Embeddings, Embeddings | None]:
        """A wish's prompt and a negative one, or None, encoded: of what was asked last it is kept,
        with the warnings, which come again."""
        asked = wish.prompt, wish.pictures, negative
        if asked not in self._embedded:
            self._embedded.clear()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = self._encode(wish, negative)
            self._embedded[asked] = found, told
        found, told = self._embedded[asked]
        for one in told:
            warnings.warn(one.message, stacklevel=2)
        return found

    def _encode(self, wish: Wish, negative: str | None) -> tuple[Embeddings, Embeddings | None]:
        return by_prompt.embedded(self._pipeline, [wish.prompt], None, negative)

    def _size(self, wish: Wish) -> tuple[int, int]:
        """(width, height) that the network was made for."""
        return self.about["size"]

    def _finished(self, wish: Wish, x: Pictures) -> tuple[Pictures, dict[str, Any]]:
        """Pictures as the page gets them, and what their files say of that."""
        return x, {}

    def _prepare(self, wish: Wish, say: Say) -> tuple[int, int, int]:
        """The shape of the latents. Refuses what the memory here does not hold."""
        self._clock.say = say
        made_for = self._size(wish)
        width, height = wish.size or made_for
        shape = denoising.latent_shape(self._pipeline, (height, width))
        own = math.prod(made_for)
        if width * height > LARGER * own:
            raise UserError(
                f"{width}x{height} is over {LARGER} times the {own:,} pixels that {self.name} was "
                "made for: choose a smaller size"
            )
        largest, there = max(self.sizes.values()), memory()
        if there and largest > there:
            raise UserError(
                f"{self.name} takes {largest / 1e9:.1f} GB for its largest network, and this "
                f"machine has {there / 1e9:.1f} GB: serve it from a larger one"
            )
        return shape


class ByEdit(ByPrompt):
    """A checkpoint that edits pictures: the prompt is an instruction about them."""

    def __init__(self, found: Pipeline, name: str, run: Run | None):
        super().__init__(found, name, run)
        self.about["edits"] = found.family.editing.most
        self._edit = functools.lru_cache(maxsize=1)(self._edit)  # each number of evaluations asks

    def _edit(self, wish: Wish) -> editing.Edit:
        if not wish.pictures:
            raise UserError("choose a picture that the instruction is about")
        named = [(f"picture {i + 1}", lambda data=data: data)
                 for i, data in enumerate(wish.pictures)]
        return editing.decoded(self._pipeline.family.editing, wish.prompt, named)

    def _encode(self, wish: Wish, negative: str | None) -> tuple[Embeddings, Embeddings | None]:
        [found] = editing.conditions(self._pipeline, [self._edit(wish)], negative)
        return found

    def _size(self, wish: Wish) -> tuple[int, int]:
        area = editing.area_of(self._pipeline)
        return self._pipeline.family.editing.size(self._edit(wish).pictures, area)

    def _finished(self, wish: Wish, x: Pictures) -> tuple[Pictures, dict[str, Any]]:
        """In the size of the picture that decides, where none was asked for."""
        if not wish.size:
            own = self._pipeline.family.editing.decides(self._edit(wish).pictures).size
            x = np.stack([by_edit.resized(one, own) for one in x])
        return x, {"restored": not wish.size}


def memory() -> int | None:
    """Bytes that this process's devices have together; None if unknown."""
    own = parallel.own_devices()
    each = parallel.room(own[0])
    return each and each * len(own)


def open_networks(folders: Sequence[str]) -> list[Network]:
    """The networks of checkpoints, those that fit together staying in memory.

    Raises:
      UserError: one is no checkpoint, or cannot be read.
    """
    last = [epath.Path(folder).name for folder in folders]
    called = [name if last.count(name) == 1 else folder
              for name, folder in zip(last, folders, strict=True)]
    opened = []
    left = (memory() or math.inf) / 2  # the rest is for what is computed
    for folder, name in zip(map(epath.Path, folders), called, strict=True):
        run = run_of(folder)
        if run and not run.family.text_to_image:
            opened.append(ByClass(folder, name))
            continue
        found = open_pipeline(folder, run)
        network = (ByEdit if found.family.editing else ByPrompt)(found, name, run)
        if (taken := sum(network.sizes.values())) <= left:
            left -= taken
            network.keep()
        opened.append(network)
    return opened


def _about(name: str, step: int | None, run: Run | None, fake: bool) -> dict[str, Any]:
    kind = run.model.name if run else "imported"
    return {"name": name, "kind": kind, "step": step, "fake": fake, "edits": 0}
