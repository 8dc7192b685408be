"""From prompts to images with a checkpoint's networks, loaded one after the other.

Text encoder, transformer and autoencoder are each loaded when they are needed, over all devices,
and let go before the next: the largest decides how much memory it takes.
"""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from twinflow_jax import checkpoints, models, parallel, sampling
from twinflow_jax.arrays import HostImages, HostLatents, Numbers
from twinflow_jax.checkpoints import imported, store, tensors
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.errors import UserError
from twinflow_jax.models import tiling
from twinflow_jax.models.family import TextToImage
from twinflow_jax.parallel import hosts

TEXT_BATCH = 8  # prompts encoded at once
IMAGE_BATCH = 16  # images encoded at once
OVERLAP = 128  # pixels that neighbouring tiles share
TILE = 1536  # pixels a side that are decoded whole: attention takes 5 GiB there


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


def pad_and_join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (rows, length, ...) in one, with zeros after what is shorter than the longest."""
    longest = max(part.shape[1] for part in parts)
    pad = lambda a: np.pad(a, [(0, 0), (0, longest - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
    return np.concatenate([pad(part) for part in parts])


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Prompts as the transformer takes them; valid tokens first, then padding."""

    tokens: Float[np.ndarray, "N L D"]
    mask: Bool[np.ndarray, "N L"]

    @classmethod
    def join(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Several in one, padded to the longest."""
        return cls(
            pad_and_join([part.tokens for part in parts]),
            pad_and_join([part.mask for part in parts]),
        )

    def __getitem__(self, index) -> "Embeddings":
        return Embeddings(self.tokens[index], self.mask[index])

    def rows(self, index) -> dict[str, np.ndarray]:
        """The condition of some rows."""
        return {"tokens": self.tokens[index], "mask": self.mask[index]}

    def save(self, file: epath.PathLike, prompts: Sequence[str]) -> None:
        """Writes a safetensors file with `tokens`, `mask` and the prompts' UTF-8 as `prompts`."""
        text = np.frombuffer(json.dumps(list(prompts)).encode(), np.uint8)
        arrays = {"tokens": self.tokens, "mask": self.mask, "prompts": text}
        tensors.save(epath.Path(file), arrays)

    @classmethod
    def read(cls, file: epath.PathLike, width: int) -> tuple[list[str], "Embeddings"]:
        """The prompts and embeddings that `save` wrote, for a transformer of that text width.

        Raises:
          UserError: no such file, or not one of these.
        """
        found = {k: t.read() for k, t in tensors.read_header(epath.Path(file)).items()}
        try:
            tokens, mask = found["tokens"].astype(np.float32), found["mask"].astype(bool)
            prompts = [str(prompt) for prompt in json.loads(found["prompts"].tobytes())]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{file} holds no embeddings: write one with --save-embeddings") from (
                error
            )
        if tokens.shape != (*mask.shape, width) or len(prompts) != len(tokens) or not prompts:
            raise UserError(
                f"{file} holds tokens of shape {tokens.shape} and a mask of {mask.shape} for "
                f"{len(prompts)} prompts; the transformer takes (prompts, length, {width})"
            )
        return prompts, cls(tokens, mask)


def same_length(*parts: Embeddings) -> list[Embeddings]:
    """Each as it is, padded to the longest of them."""
    joined = Embeddings.join(parts)
    ends = np.cumsum([len(part.tokens) for part in parts])[:-1]
    return [
        Embeddings(tokens, mask)
        for tokens, mask in zip(
            np.split(joined.tokens, ends), np.split(joined.mask, ends), strict=True
        )
    ]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The networks of an imported checkpoint, and perhaps a run's transformer in their stead.

    dtype: of computation and of the loaded weights. trained: the run's arrays, with `settings`,
    its transformer's config.
    """

    checkpoint: Imported
    dtype: str
    trained: store.Arrays | None = None
    settings: Any = None
    clock: Clock = dataclasses.field(default_factory=Clock)
    progress: bool = True

    @property
    def family(self) -> TextToImage:
        return models.FAMILIES[self.checkpoint.family].text_to_image

    @property
    def knows_r(self) -> bool:
        """Whether the transformer was trained with a target time, which base models are not.

        Raises:
          UserError: there is no transformer.
        """
        if self.trained is not None:
            return True
        return not self.checkpoint.recorded("transformer")["added"]

    def config(self, name: str):
        """Our config of a network, computing in this pipeline's dtype."""
        trained = name == "transformer" and self.settings is not None
        config = self.settings if trained else self.checkpoint.config(name)
        return dataclasses.replace(config, dtype=self.dtype)

    @contextlib.contextmanager
    def loaded(self, name: str, stage: str):
        """`(config, params)` of a network, freed at the end."""
        config, network = self.config(name), self.checkpoint.network(name)
        trained = name == "transformer" and self.trained is not None
        arrays = self.trained if trained else self.checkpoint.arrays(name)
        abstract, axes = network.abstract(config)
        layouts = parallel.shardings(self.mesh(), abstract, axes)
        dtype = jnp.dtype(self.dtype)
        abstract = jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=layout),
            abstract, layouts,
        )
        with self.clock.measure(stage, "load"):
            params = jax.block_until_ready(store.load(arrays, abstract, name, self.progress))
        try:
            yield config, params
        finally:
            for leaf in jax.tree.leaves(params):
                leaf.delete()

    def mesh(self) -> jax.sharding.Mesh:
        """This process's own devices: beside others, each draws and encodes for itself."""
        devices, heads = jax.local_devices(), self.config("transformer").heads
        tensor = next(n for n in (8, 4, 2, 1) if len(devices) % n == 0 and heads % n == 0)
        return parallel.make_mesh(parallel.MeshConfig(tensor=tensor), devices)

    def embed(
        self, prompts: Sequence[str], tokens: int | None = None, negative: str | None = None
    ) -> Embeddings:
        """Prompts through the tokenizer and the text encoder.

        tokens: that every prompt is padded or cut to (default: the least of the family's buckets
        that holds the longest). negative: one more, the last row, which may be blank.
        Raises:
          UserError: no tokenizer, or an empty prompt.
        """
        tokenizer = self.tokenizer()
        groups = [self.family.tokenize(tokenizer, prompts, tokens)] if prompts else []
        if negative is not None:  # apart: its template, and so its length, may be another
            groups.append(self.family.tokenize(tokenizer, [negative], tokens, negative=True))
        with self.text_encoder() as encode:
            return Embeddings.join([encode(*group) for group in groups])

    def tokenizer(self):
        """Raises UserError where the checkpoint has none."""
        with local_copy(self.checkpoint.tokenizer) as folder:
            return self.family.load_tokenizer(folder)

    @contextlib.contextmanager
    def text_encoder(self, batch: int | None = None):
        """`(ids, mask) -> Embeddings` of any number of rows, for as long as it stays loaded.

        batch: rows at once, always (default: up to TEXT_BATCH).
        """
        stage = "text encoding"
        with self.loaded("text_encoder", stage) as (config, params):
            embed, compiled = jax.jit(self.family.embed, static_argnums=0), {}

            def encode(ids: Int[np.ndarray, "N L"], mask: Bool[np.ndarray, "N L"]) -> Embeddings:
                size, done = batch or min(TEXT_BATCH, len(ids)), []
                for start in range(0, len(ids), size):
                    rows = np.arange(start, start + size) % len(ids)  # the last batch wraps
                    shape = (size, ids.shape[1])
                    if shape not in compiled:
                        with self.clock.measure(stage, "compile"), parallel.applied(self.mesh()):
                            lowered = embed.lower(config, params, ids[rows], mask[rows])
                            compiled[shape] = lowered.compile()
                    with self.clock.measure(stage, "run"):
                        states, valid = compiled[shape](params, ids[rows], mask[rows])
                        states = np.asarray(states.astype(jnp.float32))
                        done.append(Embeddings(states, np.asarray(valid)))
                return Embeddings.join(done)[: len(ids)]

            yield encode

    def null(self) -> Embeddings:
        """The prompt that stands for none in training: encoded once, then kept beside the rest."""
        file = self.checkpoint.folder / f"null_prompt_{self.dtype}.safetensors"
        if file.exists():
            return Embeddings.read(file, self.config("text_encoder").width)[1]
        prompts = [self.family.null_prompt]
        embeddings = self.embed([], negative=self.family.null_prompt)
        if hosts.leads():
            with contextlib.suppress(OSError):  # a checkpoint that only others may write
                embeddings.save(file, prompts)
        return embeddings

    def codec(self, method: str) -> Callable:
        """`(config, params, x)` through the autoencoder, compiled; method: encode or decode."""
        module = self.checkpoint.network("vae").module

        def apply(config, params, x):
            return module(config).apply({"params": params}, x, method=method)

        return jax.jit(apply, static_argnums=0)

    def encode(self, images: HostImages) -> HostLatents:
        """Normalised latents of images in [-1, 1]."""
        size, parts = min(IMAGE_BATCH, len(images)), []
        with self.image_encoder() as encode:
            for start in tqdm(
                range(0, len(images), size), unit="batch", desc="encoding",
                disable=not self.progress,
            ):
                parts.append(encode(images[start : start + size], size))
        return np.concatenate(parts)

    @contextlib.contextmanager
    def image_encoder(self):
        """`(images (N, H, W, 3) in [-1, 1], batch) -> latents`, for as long as it stays loaded.

        batch: images that are encoded at once, always; N is at most that.
        """
        with self.loaded("vae", "encoding") as (config, params):
            encode, mesh = self.codec("encode"), self.mesh()

            def run(images: HostImages, batch: int):
                rows = images[np.arange(batch) % len(images)]  # what is missing repeats
                rows = jax.device_put(rows, parallel.over_devices(mesh, batch))
                return np.asarray(encode(config, params, rows))[: len(images)]

            yield run

    def denoise(
        self, draw: Callable, cond: Embeddings, owners: Numbers, numbers: Numbers,
        shape: tuple[int, int, int], seed: int, batch: int | None = None,
        null: Embeddings | None = None,
    ) -> HostLatents:
        """Latents: one for each of `owners`, the prompt that it is of.

        draw: `(apply, params, noise, cond, null, keys) -> latents`, of a batch. numbers: which
        noise each image starts from; the same number with the same seed gives the same noise.
        batch: images at once (default: one for each part of the mesh's rows).
        """
        stage, mesh = "denoising", self.mesh()
        batch = min(batch or parallel.row_parts(mesh), len(owners))
        owners, numbers = np.asarray(owners), np.asarray(numbers, np.uint32)
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(seed), n))(numbers)
        pairs = jax.vmap(jax.random.split)(keys)
        over = parallel.over_rows(mesh, batch)
        with self.loaded("transformer", stage) as (config, params):
            module = self.checkpoint.network("transformer").module(config)

            def run(params, noise, cond, null, keys):
                apply = lambda params, *inputs: module.apply({"params": params}, *inputs)
                return draw(apply, params, noise, cond, null, keys)

            compiled, parts = None, []
            starts = range(0, len(owners), batch)
            for start in tqdm(starts, unit="batch", desc=stage, disable=not self.progress):
                rows = np.arange(start, start + batch) % len(owners)  # the last batch wraps
                noise = jax.vmap(lambda k: jax.random.normal(k, shape))(pairs[rows, 0])
                empty = null.rows(np.zeros(batch, int)) if null else None
                inputs = (noise, cond.rows(owners[rows]), empty, pairs[rows, 1])
                inputs = jax.device_put(inputs, over)
                if compiled is None:
                    with self.clock.measure(stage, "compile"), parallel.applied(mesh):
                        compiled = jax.jit(run).lower(params, *inputs).compile()
                with self.clock.measure(stage, "run"):
                    parts.append(np.asarray(compiled(params, *inputs)))
        return np.concatenate(parts)[: len(owners)]

    def decode(self, latents: HostLatents, tile: int) -> list[np.ndarray]:
        """Images in [-1, 1], one at a time; those beyond `tile` pixels a side in tiles."""
        stage = "decoding"
        with self.loaded("vae", stage) as (config, params):
            compiled = {}
            decode = self.codec("decode")

            def run(x):
                x = jax.device_put(x, parallel.replicated(self.mesh()))
                if x.shape not in compiled:
                    with self.clock.measure(stage, "compile"):
                        compiled[x.shape] = decode.lower(config, params, x).compile()
                with self.clock.measure(stage, "run"):
                    return np.asarray(compiled[x.shape](params, x).astype(jnp.float32))

            size, overlap = tile // config.downscale, OVERLAP // config.downscale
            return [
                tiling.tiled(run, x[None], size, overlap, config.downscale)[0]
                for x in tqdm(latents, unit="image", desc=stage, disable=not self.progress)
            ]

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """Of images of (height, width) pixels; default: what the transformer was made for.

        Raises:
          UserError: the latents cannot have that size.
        """
        vae, transformer = self.config("vae"), self.config("transformer")
        places = transformer.sample_shape[:2]
        height, width = size or (side * vae.downscale for side in places)
        step = transformer.patch * vae.downscale
        if height < step or width < step or height % step or width % step:
            near = lambda side: max(step, round(side / step) * step)
            raise UserError(
                f"the size {width}x{height} is not divisible by {step}: choose "
                f"{near(width)}x{near(height)}"
            )
        return height // vae.downscale, width // vae.downscale, vae.latent_channels

    def tile_of(self, pixels: int | None) -> int:
        """The side of decoding's tiles: what was asked for, or TILE.

        Raises:
          UserError: too small, or not of whole latents.
        """
        downscale = self.config("vae").downscale
        pixels = TILE if pixels is None else pixels
        if pixels % downscale or pixels < 2 * OVERLAP:
            raise UserError(
                f"--tile is {pixels}; give a multiple of {downscale}, {2 * OVERLAP} or more"
            )
        return pixels

    def schedule(self, steps: int, shape: tuple[int, int, int]) -> sampling.Schedule:
        """The base model's own, for a number of steps, from the checkpoint's scheduler.

        Raises:
          UserError: the checkpoint has none, or one that we do not know.
        """
        file = self.checkpoint.folder / "files" / "scheduler" / "scheduler_config.json"
        if not file.exists():
            raise UserError(f"{self.checkpoint.folder} has no scheduler, so no base sampling")
        try:
            scheduler = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}): import again") from error
        tokens = shape[0] * shape[1] // self.config("transformer").patch ** 2
        return sampling.published(scheduler, steps, tokens)

    def few_step(self, grid: sampling.Grid) -> Callable:
        """For `denoise`: the any-step sampler along a grid."""
        return lambda apply, params, noise, cond, null, keys: sampling.sample(
            apply, params, noise, cond, grid, keys
        )

    def base(self, schedule: sampling.Schedule, guidance: float) -> Callable:
        """For `denoise`: the base model's own multi-step sampling."""
        rule = self.family.base_guide or sampling.guide

        def draw(apply, params, noise, cond, null, keys):
            inputs = (apply, params, noise, cond, null, schedule.times)
            if schedule.solver == "dpm":
                return sampling.dpm_solve(*inputs, schedule.told, guidance, rule)
            return sampling.solve(*inputs, guidance, rule=rule)

        return draw


def open_pipeline(
    checkpoint: epath.PathLike, run=None, dtype: str | None = None, raw: bool = False,
    step: int | None = None, base: str | None = None,
) -> Pipeline:
    """The pipeline of an imported checkpoint, or of a run's transformer within one.

    run: the run's config, where `checkpoint` is a run. base: the imported checkpoint to use
    instead of the one that the run names. dtype: default bfloat16, float32 on a CPU.
    Raises:
      UserError: either cannot be read, or the run names no imported checkpoint.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if run is None:
        if raw or step is not None or base:
            raise UserError(
                f"{checkpoint} is an imported checkpoint: --raw, --at-step and --pipeline are "
                "for runs"
            )
        return Pipeline(imported.open_imported(checkpoint), dtype)
    base = base or checkpoints.pipeline_of(checkpoint, run)
    _, arrays, _ = checkpoints.open_weights(checkpoint, raw, step)
    settings = models.settings_of(run.model)[1]
    return Pipeline(imported.open_imported(base), dtype, arrays, settings)


@contextlib.contextmanager
def local_copy(folder: epath.Path):
    """A folder as a local path: itself, or a copy of one on object storage."""
    if "://" not in str(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir() if folder.exists() else ():
            if file.is_file():
                file.copy(epath.Path(copy) / file.name)
        yield copy
