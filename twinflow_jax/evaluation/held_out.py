"""Text-to-image runs scored on the captions of held-out records, whose embeddings they hold."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from jaxtyping import Int
from tqdm import tqdm

from twinflow_jax import checkpoints, drawing, sampling
from twinflow_jax.arrays import HostImages, HostLatents, Labels
from twinflow_jax.checkpoints import imported
from twinflow_jax.data.records import NULL, PROMPTS, Records, open_records
from twinflow_jax.drawing import Embeddings, Pipeline, codec, denoising
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation import captioned
from twinflow_jax.models.adapters import ranks_of

BATCH, CHUNK = 64, 256  # pictures drawn, and records read, at once
Decode = Callable[[HostLatents], HostImages]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run's networks, and the step that its weights are of."""

    pipeline: Pipeline
    step: int
    text_tokens: int
    learned_guidance: float


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """Held-out captions, each with one real picture. cond: as networks take them."""

    texts: tuple[str, ...]
    cond: Embeddings
    null: Embeddings
    real: HostImages


def open_run(folder: str, raw: bool, pipeline: str | None, records: Records) -> Run:
    """A run that draws pictures of the records' size from their embeddings.

    pipeline: the imported checkpoint to use instead of the one that the run names.
    Raises:
      UserError: no such run, or one of another family, text encoder or size.
    """
    run, arrays, step = checkpoints.open_weights(folder, raw)
    settings = run.model
    if run.family.text_to_image is None:
        raise UserError(f"{folder} draws by class: use `evaluate classes`")
    if records.manifest.family != settings.name:
        raise UserError(
            f"the records in {records.folder} are for {records.manifest.family!r}, but {folder} "
            f"is of {settings.name!r}"
        )
    checkpoint = imported.open_imported(pipeline or checkpoints.pipeline_of(folder, run))
    mine, theirs = records.manifest.text_encoder, checkpoint.text_identity
    if mine != theirs:
        raise UserError(
            f"the records in {records.folder} were made with the text encoder {mine}, but "
            f"{folder} takes {theirs}: encode them with its pipeline"
        )
    shape = records.sample_shape(split_of(records))
    if shape != settings.sample_shape:
        raise UserError(
            f"the records in {records.folder} hold samples of {shape}, but {folder} draws "
            f"{settings.sample_shape}"
        )
    return Run(
        Pipeline(
            checkpoint, settings.dtype, arrays, settings, progress=False, ranks=ranks_of(arrays)
        ), step,
        run.shape.text, run.objective.guidance,
    )


def split_of(records: Records) -> str:
    """The largest split with pictures."""
    sizes = {name: count for name, count in records.splits.items() if name != PROMPTS}
    if not sizes:
        raise UserError(f"{records.folder} holds prompts alone: give records with pictures")
    return max(sizes, key=sizes.get)


def open_pair(held_out: epath.PathLike, train: epath.PathLike) -> tuple[Records, Records]:
    """Held-out and training records that were made alike.

    Raises:
      UserError: they were not, or either cannot be read or holds prompts alone.
    """
    pair = open_records(held_out), open_records(train)
    for records in pair:
        if records.manifest.edits:
            raise UserError(f"{records.folder} holds edits, which captions alone do not draw: "
                            "benchmarks/edits.py scores runs on them")
        split_of(records)
    if pair[0].manifest != pair[1].manifest:
        raise UserError(f"{held_out} and {train} were made with other networks: encode one again")
    return pair


def decoder(records: Records, pipeline: Pipeline) -> Decode:
    """Samples of records, or drawn ones like them, as pictures in [-1, 1]."""
    if not records.manifest.autoencoder:
        return lambda x: np.clip(x, -1, 1)
    return lambda x: np.stack(list(codec.decode(pipeline, x)))


def hold_out(records: Records, count: int | None, decode: Decode) -> Captions:
    """Different first captions of records, evenly spread where fewer are wanted.

    Raises:
      UserError: there is but one, or no picture.
    """
    split, found = split_of(records), {}
    for row in range(records.splits[split]):
        found.setdefault(records.read(split, row).captions[0], row)  # not its picture: few are kept
    count = min(count or len(found), len(found))
    keep = np.unique(np.linspace(0, len(found) - 1, count).astype(int))
    if len(found) < 2:
        raise UserError(f"{records.folder} holds one caption alone: scores need at least 2")
    texts = list(found)
    chosen = [records.read(split, found[texts[i]]) for i in keep]
    parts = [
        Embeddings(
            np.asarray(one.tokens[0][None], np.float32), np.ones((1, len(one.tokens[0])), bool)
        )
        for one in chosen
    ]
    null = Embeddings.read(records.folder / NULL, records.manifest.text_width)[1]
    real = decode(np.stack([one.sample for one in chosen]))
    return Captions(tuple(texts[i] for i in keep), Embeddings.join(parts), null, real)


def create_judge(
    network: Callable, train: Records, held_out: Captions, decode: Decode
) -> captioned.CaptionJudge:
    """A judge fitted to all pairs of the training records, each with its first caption."""
    split, captions, embeddings = split_of(train), [], []

    def batches() -> Iterator[HostImages]:
        rows = range(train.splits[split])
        for start in tqdm(rows[::CHUNK], unit_scale=CHUNK, unit=" pictures", desc="real pairs"):
            examples = [train.read(split, row) for row in rows[start : start + CHUNK]]
            captions.extend(one.captions[0] for one in examples)
            embeddings.append(captioned.embedding([one.tokens[0] for one in examples]))
            yield decode(np.stack([one.sample for one in examples]))

    seen = captioned.Pictures.see(network, batches())
    cond = held_out.cond
    targets = [tokens[mask] for tokens, mask in zip(cond.tokens, cond.mask, strict=True)]
    return captioned.CaptionJudge(
        seen, captions, np.concatenate(embeddings),
        captioned.Pictures.see(network, [held_out.real]), captioned.embedding(targets),
    )


def owners_of(captions: Captions, seeds: int) -> Labels:
    """The caption of each picture: all of one after the other."""
    return np.repeat(np.arange(len(captions.texts)), seeds)


def draw(
    run: Run, captions: Captions, seeds: int, seed: int, sampler: drawing.Sampler, decode: Decode
) -> HostImages:
    """`seeds` pictures of each caption."""
    owners = owners_of(captions, seeds)
    cut = slice(None), slice(run.text_tokens)
    cond, null = drawing.same_length(captions.cond[cut], captions.null[cut])
    shape = run.pipeline.settings.sample_shape
    parts = denoising.denoise(
        run.pipeline, sampler, cond, owners, np.arange(len(owners)), shape, seed, BATCH, null
    )
    return decode(np.concatenate(list(parts)))


def plain(run: Run, evaluations: int, guidance: float) -> drawing.Base:
    """Euler steps of equal length with classifier-free guidance, or none at half the cost.

    Raises:
      UserError: evaluations that do not make whole steps, or a run that draws guided already.
    """
    guided = guidance != run.pipeline.family.no_guidance
    each = 2 if guided else 1
    if evaluations % each:
        raise UserError(
            f"--guidance takes two evaluations a step: give even --steps, not {evaluations}"
        )
    if run.learned_guidance and guided:
        raise UserError(
            f"a run learned guided pictures (objective.guidance {run.learned_guidance}): "
            "--guidance is for runs trained by flow matching"
        )
    times = tuple(np.linspace(1, 0, evaluations // each + 1).tolist())
    return denoising.base(run.pipeline, sampling.Schedule(times, times[:-1], "euler"), guidance)


def shown(captions: Captions, seeds: int, rows: int) -> tuple[Labels, Int[np.ndarray, "M"]]:
    """Captions of a sheet, spread over all, and the numbers of their pictures."""
    some = np.unique(np.linspace(0, len(captions.texts) - 1, rows).astype(int))
    return some, (some[:, None] * seeds + np.arange(seeds)).ravel()
