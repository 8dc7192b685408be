"""A checkpoint's networks, and which of them are in memory.

Each is loaded over all devices when it is needed. It is let go after that, so that the largest
decides how much memory drawing takes; or it stays, for somebody who draws again and again.
"""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from twinflow_jax import checkpoints, parallel
from twinflow_jax.checkpoints import adapter_files, imported, store
from twinflow_jax.checkpoints.dialects import FEW
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.config import Run
from twinflow_jax.errors import UserError
from twinflow_jax.models.adapters import added, ranks_of
from twinflow_jax.models.family import TextToImage


@dataclasses.dataclass
class Clock:
    """Seconds by stage and kind: {"denoise": {"load": .., "compile": .., "run": ..}}."""

    seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def measure(self, stage: str, kind: str):
        begin = time.perf_counter()
        yield
        kinds = self.seconds.setdefault(stage, {})
        kinds[kind] = kinds.get(kind, 0.0) + time.perf_counter() - begin

    def lines(self) -> list[str]:
        return [
            f"{stage}: " + ", ".join(f"{kind} {value:.2f} s" for kind, value in kinds.items())
            for stage, kinds in self.seconds.items()
        ]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The networks of an imported checkpoint, and perhaps a run's transformer in their stead.

    dtype: of computation and of the loaded weights. trained: the run's arrays, with `settings`,
    its transformer's config, and the step that they are of. put_on: arrays of adapters from files,
    which take the place of the transformer's; few: whether those were trained for few steps. ranks:
    of the transformer's adapters (`models.adapters.added`).
    """

    checkpoint: Imported
    dtype: str
    trained: store.Arrays | None = None
    settings: Any = None
    step: int | None = None
    clock: Clock = dataclasses.field(default_factory=Clock)
    progress: bool = True
    put_on: store.Arrays = dataclasses.field(default_factory=dict)
    few: bool = False
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    _kept: dict[str, Any] | None = None
    _programs: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> TextToImage:
        return self.checkpoint.text_to_image

    @property
    def knows_r(self) -> bool:
        """Whether the transformer was trained with a target time, which base models are not.

        Raises:
          UserError: there is no transformer.
        """
        return self.trained is not None or self.few or self.checkpoint.knows_r

    def arrays(self, name: str) -> store.Arrays:
        """A network's stored weights."""
        if name != "transformer":
            return self.checkpoint.arrays(name)
        return (self.trained or self.checkpoint.arrays(name)) | self.put_on

    def config(self, name: str):
        """Our config of a network, computing in this pipeline's dtype."""
        trained = name == "transformer" and self.settings is not None
        config = self.settings if trained else self.checkpoint.config(name)
        return dataclasses.replace(config, dtype=self.dtype)

    @contextlib.contextmanager
    def loaded(self, name: str, stage: str) -> Iterator[tuple[Any, Any]]:
        """`(config, params)` of a network, freed at the end unless they are kept.

        Raises:
          UserError: it is larger than the devices' memory.
        """
        kept = {} if self._kept is None else self._kept
        if name not in kept:
            with self.clock.measure(stage, "load"):
                abstract = self.abstract(name)
                self._check_room(name, abstract)
                weights = store.load(self.arrays(name), abstract, name, self.progress)
                kept[name] = jax.block_until_ready(weights)
        try:
            yield self.config(name), kept[name]
        finally:
            if self._kept is None:
                _free(kept)

    @contextlib.contextmanager
    def kept(self) -> Iterator["Pipeline"]:
        """The same pipeline, whose networks stay in memory once they are loaded, until the end."""
        kept: dict[str, Any] = {}
        try:
            yield dataclasses.replace(self, _kept=kept)
        finally:
            _free(kept)

    def _check_room(self, name: str, abstract) -> None:
        """Raises UserError where a network's weights alone are more than a device holds."""
        devices, gib = self.devices(), 2**30
        need, room = parallel.on_device(abstract), parallel.room(devices[0])
        if room and need > room:
            alone = len(devices) < jax.local_device_count()
            raise UserError(
                f"{name} of {self.checkpoint.folder} takes {need / gib:.1f} GiB on each of "
                f"{len(devices)} devices, which have {room / gib:.1f}: " + (
                    "several hosts share this slice, and each has one chip for what it computes "
                    "alone (docs/pods.md); for training give sample.prompts=()" if alone
                    else "take more of them, or --dtype bfloat16"
                )
            )

    def abstract(self, name: str):
        """The shapes, dtypes and layouts of a network's loaded weights."""
        config, network = self.config(name), self.checkpoint.network(name)
        with added(self.ranks if name == "transformer" else {}):
            abstract, axes = network.abstract(config)
        layouts = parallel.shardings(self.mesh(), abstract, axes)
        dtype = jnp.dtype(self.dtype)
        return jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=layout),
            abstract, layouts,
        )

    def devices(self) -> list:
        return parallel.own_devices()

    def put(self, tree, layout: jax.sharding.Sharding):
        """Host arrays on this pipeline's devices."""
        return jax.device_put(tree, layout)

    def run(self, stage: str, key: Hashable, function: Callable, *arguments):
        """`function(*arguments)` as a compiled program, which is kept for this key and these
        shapes; the host waits for it.

        key: the same only for functions that compute the same.
        """
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arguments))
        key = stage, key, shapes
        if key not in self._programs:
            with self.clock.measure(stage, "compile"), parallel.applied(self.mesh()):
                self._programs[key] = jax.jit(function).lower(*arguments).compile()
        with self.clock.measure(stage, "run"):
            return jax.block_until_ready(self._programs[key](*arguments))

    def mesh(self) -> jax.sharding.Mesh:
        """This process's own devices: beside others, each draws and encodes for itself."""
        devices, heads = self.devices(), self.config("transformer").heads
        tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and heads % n == 0)
        return parallel.make_mesh(parallel.MeshConfig(tensor=tensor), devices)


def _free(params) -> None:
    for leaf in jax.tree.leaves(params):
        leaf.delete()


def run_of(checkpoint: epath.PathLike) -> Run | None:
    """The description of the run whose folder a checkpoint is; None of an imported one.

    Raises:
      UserError: it is neither.
    """
    folder = epath.Path(checkpoint)
    if imported.is_imported(folder):
        return None
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} is no run and no imported checkpoint: give the --workdir of training, or "
            "what `twinflow convert import` wrote"
        )
    return checkpoints.read_run(folder)


def open_pipeline(
    checkpoint: epath.PathLike, run: Run | None = None, dtype: str | None = None, raw: bool = False,
    step: int | None = None, base: str | None = None, given: Sequence[tuple[str, float]] = (),
) -> Pipeline:
    """The pipeline of an imported checkpoint, or of a run's transformer within one.

    run: the run, where `checkpoint` is its folder. base: the imported checkpoint to use
    instead of the one that the run names. dtype: default bfloat16, float32 on a CPU. given: files
    of adapters, or imported ones, to put on the transformer, with the factor of each.
    Raises:
      UserError: any of these cannot be read or does not fit, or the run names no imported
        checkpoint.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if run is None:
        if raw or step is not None or base:
            raise UserError(
                f"{checkpoint} is an imported checkpoint: --raw, --at-step and --pipeline are "
                "for runs"
            )
        return _put_on(Pipeline(imported.open_imported(checkpoint), dtype), given)
    base = base or checkpoints.pipeline_of(checkpoint, run)
    _, arrays, step = checkpoints.open_weights(checkpoint, raw, step)
    pipeline = Pipeline(
        imported.open_imported(base), dtype, arrays, run.model, step, ranks=ranks_of(arrays)
    )
    return _put_on(pipeline, given)


def _put_on(pipeline: Pipeline, given: Sequence[tuple[str, float]]) -> Pipeline:
    """The pipeline with adapters from files; says what was taken for granted of them."""
    if not given:
        return pipeline
    network, config = pipeline.checkpoint.network("transformer"), pipeline.config("transformer")
    arrays, opened = pipeline.arrays("transformer"), []
    free = not pipeline.knows_r
    for source, factor in given:
        adapter = adapter_files.open_adapter(source, network, config, free)
        config, free = adapter.config, free and not adapter.time
        other = adapter_files.other_base(adapter, arrays, imported.layout(network, config)[0])
        for note in (*adapter.file.notes, *([other] if other else ())):
            warnings.warn(f"{source}: {note}", stacklevel=3)
        opened.append((adapter, factor))
    leaves = adapter_files.put(opened, network, config, arrays)
    few = any(adapter.said.get("twinflow_sampler") == FEW for adapter, _ in opened)
    return dataclasses.replace(
        pipeline, settings=config, put_on=leaves, few=few, ranks=ranks_of(leaves)
    )
