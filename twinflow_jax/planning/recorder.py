"""A pipeline that computes nothing: what it should run is noted down to be compiled, and zeros come
back. A verb's own code, given it, says what the verb would compile.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from twinflow_jax import parallel
from twinflow_jax.checkpoints import imported
from twinflow_jax.drawing import Pipeline, denoising, text
from twinflow_jax.models.family import TextToImage

LEVERS = {  # of the stages of a pipeline
    text.STAGE: "--dtype bfloat16, a host with more chips, sample.prompts=() in training",
    "denoising": "a smaller --batch",
    "encoding": "a smaller --batch", "decoding": "a smaller --tile",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One that a verb compiles. beside: bytes that a device holds meanwhile which are none of its
    arguments. lever: what helps where it does not fit."""

    verb: str
    name: str
    lower: Callable[[], jax.stages.Lowered]
    beside: int
    lever: str
    options: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Blank(imported.Imported):
    """An imported checkpoint's configs; its weights are not read, and nothing is written to it."""

    configs: dict[str, Any] = dataclasses.field(default_factory=dict)
    real: imported.Imported | None = None

    @property
    def text_to_image(self) -> TextToImage:
        return self.real.text_to_image if self.real else super().text_to_image

    def network(self, name: str):
        return self.text_to_image.networks[name]

    def config(self, name: str):
        return self.configs[name]

    def tokenizer(self, encoder: str) -> epath.Path:
        return self.real.tokenizer(encoder) if self.real else super().tokenizer(encoder)

    @property
    def processor(self) -> dict[str, Any]:
        return self.real.processor if self.real else super().processor


@dataclasses.dataclass(frozen=True)
class Recorder(Pipeline):
    """A pipeline on one host's devices that notes down what it should run, in `programs`.

    verb: that it plays. held: bytes on a device which are none of this pipeline's.
    """

    of_host: tuple = ()
    verb: str = ""
    held: int = 0
    programs: list[Program] = dataclasses.field(default_factory=list)
    _loaded: dict[str, int] = dataclasses.field(default_factory=dict)

    def devices(self) -> list:
        return list(self.of_host)

    @contextlib.contextmanager
    def loaded(self, name: str, stage: str) -> Iterator[tuple[Any, Any]]:
        before, params = dict(self._loaded), self.abstract(name)
        self._loaded[name] = parallel.on_device(params)
        try:
            yield self.config(name), params
        finally:
            self._loaded.clear()
            self._loaded.update(before)

    def put(self, tree, layout: jax.sharding.Sharding):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout), tree
        )

    def run(self, stage: str, key: Hashable, function: Callable, *arguments):
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments))
        known = stage, key, shapes
        if known not in self._programs:
            with parallel.applied(self.mesh()):
                self._programs[known] = traced = jax.jit(function).trace(*arguments)
            shape = jax.tree.leaves(arguments[1])[0].shape
            beside = self.held + sum(self._loaded.values()) - parallel.on_device(arguments[0])
            self.programs.append(Program(
                self.verb, f"{stage}{_told(key)}, {by(shape)}", functools.partial(
                    self._lower, traced
                ), beside, LEVERS[stage],
            ))
        out = self._programs[known].out_info
        return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), out)

    def _lower(self, traced) -> jax.stages.Lowered:
        with parallel.applied(self.mesh()):
            return traced.lower(lowering_platforms=(self.of_host[0].platform,))


def _told(key: Hashable) -> str:
    """How a sampler that is a program's key draws."""
    if isinstance(key, denoising.FewStep):
        return f" {key.grid.nfe} NFE"
    return f" base, {len(key.schedule.told)} steps" if isinstance(key, denoising.Base) else ""


def by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
