"""Pictures a second, as the paper's Table 4 has them: ten at once, and one alone."""

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import numpy as np

from twinflow_jax import drawing, files, parallel
from twinflow_jax.drawing import Pipeline, Sampler, by_prompt, text
from twinflow_jax.drawing.pipeline import run_of
from twinflow_jax.errors import UserError

BATCHES, REPEATS = (10, 1), 5  # of the first, which compiles, nothing is counted
PROMPT = "a red fox in fresh snow at the edge of a forest, early morning, soft light"
STAGES = ("text encoding", "denoising", "decoding")


def speed(args: argparse.Namespace) -> int:
    """What the verb's arguments ask for; returns the exit status."""
    run = run_of(args.checkpoint)
    if run is not None and run.family.text_to_image is None:
        raise UserError(f"{args.checkpoint} draws by class: speed is of drawing from prompts")
    pipeline, shape, tile, way = by_prompt.prepared(args, run)
    rows = measure(pipeline, way.sampler, shape, tile, way.settings.get("negative"))
    scale = pipeline.config("vae").downscale
    told = {
        "checkpoint": args.checkpoint, "device": device(), "dtype": pipeline.dtype,
        "nfe": way.settings["nfe"], "size": [shape[1] * scale, shape[0] * scale],
    }
    print(f"{told['checkpoint']}: {told['nfe']} NFE, {told['size'][0]}x{told['size'][1]}, "
          f"{told['dtype']}, {told['device']}")
    print(table(rows))
    if args.json:
        with files.writing("--json", args.json):
            files.write(args.json, json.dumps(told | {"speed": rows}, indent=1).encode())
    return 0


def device() -> str:
    """What computes, in words."""
    found = parallel.own_devices()
    return f"{len(found)} x {found[0].device_kind}"


def measure(
    pipeline: Pipeline, sampler: Sampler, shape: tuple[int, int, int], tile: int,
    negative: str | None,
) -> list[dict[str, Any]]:
    """Of each of BATCHES: seconds of all from prompts to pixels, and of each stage, the median of
    REPEATS. All networks are in memory; tokenizing counts, writing files does not. A negative
    prompt is encoded before."""
    tokenizers, rows = text.tokenizers(pipeline), []
    with dataclasses.replace(pipeline, progress=False).kept() as kept:
        null = text.embed(kept, [], negative=negative) if negative is not None else None
        for batch in BATCHES:
            times = [
                _once(kept, tokenizers, sampler, shape, tile, null, batch)
                for _ in range(1 + REPEATS)
            ][1:]
            median = {key: statistics.median(t[key] for t in times) for key in times[0]}
            rows.append(
                {"batch": batch, "pictures a second": batch / median["all"], "seconds": median}
            )
    return rows


def _once(kept: Pipeline, tokenizers, sampler, shape, tile, null, batch) -> dict[str, float]:
    """Seconds of one batch, of all and by stage."""
    kept.clock.seconds.clear()
    begin = time.perf_counter()
    with text.encoder(kept, batch) as encode:
        cond = encode(kept.family.tokenize(tokenizers, [PROMPT] * batch))
    empty = []
    if null:
        cond, *empty = drawing.same_length(cond, null)
    numbers = np.arange(batch)
    for _ in drawing.pictures(
        kept, sampler, cond, numbers, numbers, shape, 0, batch, *empty, tile=tile
    ):
        pass
    whole = time.perf_counter() - begin
    return {"all": whole} | {
        stage: kept.clock.seconds.get(stage, {}).get("run", 0.0) for stage in STAGES
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For the terminal; seconds are of a whole batch."""
    lines = [f"{'batch':>5}  {'pictures/s':>10}  {'seconds':>8}  "
             + "  ".join(f"{stage:>13}" for stage in STAGES)]
    for row in rows:
        seconds = row["seconds"]
        lines.append(
            f"{row['batch']:>5}  {row['pictures a second']:>10.2f}  {seconds['all']:>8.3f}  "
            + "  ".join(f"{seconds[stage]:>13.3f}" for stage in STAGES)
        )
    return "\n".join(lines)
