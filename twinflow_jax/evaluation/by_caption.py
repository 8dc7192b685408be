"""Text-to-image runs in one table, judged on the captions of held-out records."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from twinflow_jax.drawing import FewStep
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation import captioned, features, held_out
from twinflow_jax.evaluation.report import Scores
from twinflow_jax.sampling import few_step

ROWS = 8  # captions on the sheet
MOST = 100_000  # pictures of a score


@dataclasses.dataclass(frozen=True)
class Source:
    """What pictures are drawn from and judged by.

    records, train_records: folders of held-out and of training pairs. features: the file of an
    independent network's weights. seeds: pictures of each caption. guidance: of runs trained by
    flow matching, which then take plain Euler steps. pipeline: the imported checkpoint to use
    instead of the one that each run names.
    """

    records: str
    train_records: str
    features: str
    seeds: int = 4
    guidance: float | None = None
    pipeline: str | None = None


def score(
    folders: Sequence[str], steps: Sequence[int], sampler: dict[str, Any], count: int | None,
    seed: int, raw: bool, source: Source,
) -> Iterator[Scores]:
    """Of `count` held-out captions (default: all): everything so far, after each run and number of
    steps. sampler: for `sampling.few_step`.

    Raises:
      UserError: too few captions, too many pictures, or runs, records and features that do not
        go together.
    """
    seeds, guidance = source.seeds, source.guidance
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}; draw at least one sample of each caption")
    if count is not None and count < 2:
        raise UserError(f"--count is {count}; scores need at least 2 captions")
    grids = {n: few_step(n, **sampler) for n in steps} if guidance is None else {}
    reals, train = held_out.open_pair(source.records, source.train_records)
    held = reals.splits[held_out.split_of(reals)]
    if seeds * min(count or held, held) > MOST:
        raise UserError(f"--seeds {seeds} of {min(count or held, held):,} captions; scores are of "
                        f"at most {MOST:,} pictures: give fewer --seeds or a --count")
    runs = {
        folder: held_out.open_run(folder, raw, source.pipeline, reals) for folder in folders
    }
    samplers = {
        name: {grids[n].nfe: FewStep(grids[n]) for n in steps}
        if grids else {n: held_out.plain(run, n, guidance) for n in steps}
        for name, run in runs.items()
    }
    network = features.load(source.features)
    decode = held_out.decoder(reals, next(iter(runs.values())).pipeline)
    captions = held_out.hold_out(reals, count, decode)
    judge = held_out.create_judge(network.remembered, train, captions, decode)
    owners = held_out.owners_of(captions, seeds)
    some, shown = held_out.shown(captions, seeds, ROWS)
    real, rows, blocks = judge.real(len(owners)), [], {"real": captions.real[some]}
    texts = tuple(captions.texts[i] for i in some)
    settings = {
        "captions": len(captions.texts), "seeds": seeds, "seed": seed, "guidance": guidance,
    }
    for name, run in runs.items():
        with run.pipeline.kept() as pipeline:
            drawing = dataclasses.replace(run, pipeline=pipeline)
            for nfe, way in samplers[name].items():
                x = held_out.draw(drawing, captions, seeds, seed, way, decode)
                scores = judge.score(captioned.Pictures.see(network, [x]), owners)
                rows.append({"run": name, "step": run.step, "nfe": nfe} | scores)
                print(f"{name}, {nfe} NFE: R@1 {scores['retrieval']:.3f}", flush=True)
                label = f"{name}, {nfe} NFE: {scores['retrieval']:.3f} / {scores['frechet']:.1f}"
                blocks[label] = x[shown]
                yield Scores(
                    rows, real, blocks, "R@1 / Frechet distance", settings, seeds, texts
                )
