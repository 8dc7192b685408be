"""What a run learns from and draws: streams of rows, and how a sample becomes a picture.

Labelled images train a class-conditional network as they are. For a text-to-image family each
label stands for its caption, and images and captions go through the pipeline's autoencoder and
text encoder once, before training; or the run reads what twinflow encode made of them before.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes  # noqa: F401 - NumPy then knows bfloat16 by name
import numpy as np
from etils import epath
from jaxtyping import Float

from twinflow_jax import checkpoints, data, evaluation, images, models
from twinflow_jax.checkpoints import imported, random
from twinflow_jax.config import RANDOM, Run
from twinflow_jax.data import edits
from twinflow_jax.data.records import Records
from twinflow_jax.drawing import Pipeline, codec, editing, pairs, text
from twinflow_jax.errors import UserError
from twinflow_jax.models.settings import Settings
from twinflow_jax.parallel import hosts
from twinflow_jax.training import records

Conditions = dict[str, Any]  # row k of each array is of label, or prompt, k
EDITED = 256  # pictures of a named dataset that edits are made of


@dataclasses.dataclass(frozen=True)
class Inputs:
    """streams: of each shape of samples, rows of {"x", "cond"} (data.batches).

    null: the condition that stands for none, of one row, with text of so many tokens; {} where rows
    bring their own. shown: the conditions that previews draw, with their names. decode: samples ->
    images. judge: makes what scores drawn samples of each label, once, where there is one.
    """

    model: models.Model
    streams: tuple[tuple[data.Stream, ...], ...]
    null: Callable[[int], Conditions]
    shown: Conditions
    names: tuple[str, ...]
    decode: Callable[[Float[np.ndarray, "N ..."]], Float[np.ndarray, "N H W C"]]
    judge: Callable[[], evaluation.ClassJudge] | None


def take(conditions: Conditions, index) -> Conditions:
    """The conditions of some labels, one row each."""
    return jax.tree.map(lambda table: table[index], conditions)


def open_data(run: Run) -> data.Dataset | list[Records]:
    """The named dataset, or the folders of records, of a run."""
    if run.data.records:
        free = run.objective.image_free and not run.train.flow_matching_steps
        return records.open_folders(run.data.records, run.model, free, run.objective.pairs)
    dataset = data.load(run.data.name)
    if run.data.pairs:
        found = pairs.read(run.data.pairs)
        hosts.agree({"data.pairs": pairs.digest(found).encode()})  # each reads its own copy
        return dataclasses.replace(dataset, pairs=found)
    return dataset


def shapes(run: Run, source: data.Dataset | list[Records]) -> dict[models.Shape, float]:
    """The share of the rows that is of each shape, in the order of `Inputs.streams`."""
    if isinstance(source, data.Dataset):
        return {run.shape: 1.0}
    streams = records.streams(source, run.data.weights, run.model, run.data.text_lengths)
    weights = {shape: sum(one.weight for one in each) for shape, each in streams.items()}
    return {shape: weight / sum(weights.values()) for shape, weight in weights.items()}


def by_text(shapes: Mapping[models.Shape, float]) -> dict[int, float]:
    """The share of the rows that goes with each length of text."""
    found = dict.fromkeys(sorted({shape.text for shape in shapes}), 0.0)
    for shape, share in shapes.items():
        found[shape.text] += share
    return found


def digest(source: data.Dataset | list[Records]) -> str:
    """Of rows that may be others the next time, records or pairs; "" for the named datasets."""
    if isinstance(source, data.Dataset):
        return "" if source.pairs is None else pairs.digest(source.pairs)
    return records.digest(source)


def prepare(
    run: Run, source: data.Dataset | list[Records], workdir: epath.PathLike
) -> Inputs:
    """The inputs of a run whose data and folder have been checked."""
    if run.family.text_to_image is None:
        return of_classes(run.model, source, scored=run.sample.score_count > 0)
    pipeline, tokens = open_pipeline(run, workdir), run.shape.text
    if isinstance(source, data.Dataset) and run.family.text_to_image.editing:
        return of_edits(pipeline, source, tokens)
    if isinstance(source, data.Dataset):
        return of_captions(pipeline, source, tokens, run.sample.prompts)
    return of_records(pipeline, source, run)


def labelled(split: data.Split, conditions: Conditions) -> tuple[tuple[data.Stream, ...], ...]:
    """The rows of a split, each with the condition of its label."""
    def read(rows, seeds):
        noise = {} if split.noise is None else {"noise": split.noise[rows]}
        return noise | {"x": split.x[rows], "cond": take(conditions, split.label[rows])}

    return ((data.Stream(len(split), read),),)


def of_classes(settings: Settings, dataset: data.Dataset, scored: bool) -> Inputs:
    """Labelled images for a class-conditional network. scored: whether drawn samples are."""
    model = models.build(settings)
    classes = np.arange(dataset.num_classes, dtype=np.int32)
    table = {"label": classes} if settings.num_classes else {}
    create = functools.partial(evaluation.ClassJudge.create, dataset)
    return Inputs(
        model, labelled(dataset.learned, table), lambda _: dict(model.null), table,
        names=tuple(map(str, classes)), decode=lambda x: np.clip(x, -1, 1),
        judge=functools.cache(create) if scored and table else None,
    )


def of_captions(
    pipeline: Pipeline, dataset: data.Dataset, tokens: int, prompts: tuple[str, ...]
) -> Inputs:
    """Images and captions through a pipeline's networks; previews draw prompts, or the captions."""
    settings, prompts = pipeline.settings, prompts or dataset.captions
    captions, null, shown = (
        conditions(embeddings, tokens, settings.dtype)
        for embeddings in (
            text.embed(pipeline, dataset.captions, tokens), text.null(pipeline),
            text.embed(pipeline, prompts, tokens),
        )
    )
    side = pipeline.config("vae").downscale
    height, width = (side * places for places in settings.sample_shape[:2])
    latents = codec.encode(pipeline, data.to_rgb(dataset.train.x, height, width))
    return Inputs(
        models.build(settings), labelled(data.Split(latents, dataset.train.label), captions),
        lambda _: null, shown, prompts, decoder(pipeline), judge=None,
    )


def of_edits(pipeline: Pipeline, dataset: data.Dataset, tokens: int) -> Inputs:
    """Pictures of a dataset, changed as each of some instructions says; previews draw the first."""
    settings, side = pipeline.settings, pipeline.config("vae").downscale
    height, width = (side * places for places in settings.sample_shape[:2])
    sources = edits.sources(dataset.train.x[:EDITED], height, width)
    with text.encoder(pipeline, text.BATCH) as embed:
        told = editing.Instructions(pipeline, embed)(
            [(tuple(edits.CHANGES), [one]) for one in images.to_uint8(sources)]
        )
    latents = codec.encode(pipeline, sources)
    targets = [codec.encode(pipeline, change(sources)) for change in edits.CHANGES.values()]

    def about(which, tails):
        texts = [np.concatenate([told[i].shown, t]) for i, t in zip(which, tails, strict=True)]
        return records.padded(texts, settings, tokens) | {"references": (latents[which],)}

    def read(numbers, seeds):
        which, change = np.divmod(numbers, len(targets))
        pairs = list(zip(which, change, strict=True))
        return {
            "x": np.stack([targets[k][i] for i, k in pairs]),
            "cond": about(which, [told[i].tokens[k] for i, k in pairs]),
            "null": about(which, [told[i].null for i in which]),
        }

    streams = ((data.Stream(len(sources) * len(targets), read),),)
    return Inputs(
        models.build(settings), streams, lambda _: {},
        read(np.arange(2 * len(targets)), None)["cond"], 2 * tuple(edits.CHANGES),
        decoder(pipeline), judge=None,
    )


def of_records(pipeline: Pipeline, folders: Sequence[Records], run: Run) -> Inputs:
    """Rows that twinflow encode made; previews draw prompts, or captions of theirs."""
    settings, lengths, prompts = pipeline.settings, run.data.text_lengths, run.sample.prompts
    tokens = lengths[-1]
    if prompts:
        embeddings = text.embed(pipeline, prompts, tokens)
    else:
        prompts, embeddings = records.first_captions(folders[0])
        cut = {name: getattr(embeddings, name)[:, :tokens] for name in ("tokens", "mask")}
        embeddings = dataclasses.replace(embeddings, **cut)  # as a step sees them
    own = pipeline.family.editing is not None
    null = None if own else records.null(folders[0])
    return Inputs(
        models.build(settings),
        tuple(records.streams(
            folders, run.data.weights, settings, lengths, run.objective.pairs
        ).values()),
        lambda tokens: {} if own else conditions(null, tokens, settings.dtype),
        conditions(embeddings, tokens, settings.dtype),
        prompts, decoder(pipeline), judge=None,
    )


def open_pipeline(run: Run, workdir: epath.PathLike) -> Pipeline:
    """The networks of a run's `pipeline`, random ones being made here first."""
    folder = checkpoints.pipeline_of(workdir, run)
    if run.pipeline == RANDOM:
        hosts.first(lambda: random.write_random(run.model.name, folder, run.train.seed))
    return Pipeline(
        imported.open_imported(folder), run.model.dtype, settings=run.model, progress=False
    )


def decoder(pipeline: Pipeline):
    """Samples -> images."""
    return lambda latents: np.stack(list(codec.decode(pipeline, latents)))


def conditions(embeddings, tokens: int, dtype: str) -> Conditions:
    """Embeddings as a step takes them: so many tokens, in the dtype of computation.

    Raises:
      UserError: one has more valid tokens than that.
    """
    longest = int(embeddings.mask.sum(1).max())
    if longest > tokens:
        raise UserError(
            f"data.text_tokens has {tokens}, but the condition that stands for none has {longest} "
            "tokens: give more"
        )
    fill = max(tokens - embeddings.mask.shape[1], 0)
    padded = np.pad(embeddings.tokens[:, :tokens], ((0, 0), (0, fill), (0, 0)))
    mask = np.pad(embeddings.mask[:, :tokens], ((0, 0), (0, fill)))
    about = {"references": embeddings.references} if embeddings.references else {}
    return {"tokens": padded.astype(dtype), "mask": mask} | about
