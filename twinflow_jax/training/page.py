"""WORKDIR/index.html: a run to look at in a browser, made of what lies in its folder.

One file without a server or a network: the numbers are in it, sheets are links beside it.
"""

import json
import math
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from twinflow_jax import buckets, files
from twinflow_jax.config import Run, flatten
from twinflow_jax.parallel import hosts

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
POINTS = 400  # of a curve: more are means of their neighbours
SPEED = {  # charts of speed.jsonl
    "images per second": ("images_per_second",),
    "shares of time and peak": ("goodput", "utilisation", "data_wait"),
}


def write(
    workdir: epath.PathLike, run: Run, names: Sequence[str], place: epath.PathLike | None = None
) -> None:
    """Rewrites a run's page, on the first process. names: of a sheet's rows. place: where the page
    and the metrics lie, if not in the folder itself (buckets.Mirror)."""
    if not hosts.leads():
        return
    place = epath.Path(place or workdir)
    data = json.dumps(contents(epath.Path(workdir), run, names, place), allow_nan=False)
    # A "<" could end the script that holds it.
    page = TEMPLATE.read_text().replace("RUN_AS_JSON", data.replace("<", r"\u003c"))
    files.write(place / "index.html", page.encode())


def contents(
    folder: epath.Path, run: Run, names: Sequence[str], place: epath.Path
) -> dict[str, Any]:
    """What the page shows, as JSON holds it."""
    metrics = files.rows(place / "metrics.jsonl")
    speed = files.rows(place / "speed.jsonl")
    steps = {row["step"]: row for row in speed}  # each as it was done last
    found = (re.fullmatch(r"step_(\d+)\.png", file.name) for file in folder.glob("samples/*.png"))
    sheets = sorted((int(match[1]), f"samples/{match[0]}") for match in found if match)
    return {
        "name": buckets.absolute(folder).name, "network": run.model.name, "written": time.time(),
        "step": max((row["step"] for row in metrics), default=0), "steps": run.train.steps,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "speed": speed[-1] if speed else {}, "sheets": sheets, "rows": list(names),
        "charts": charts(metrics, [steps[step] for step in sorted(steps)]),
        "settings": {key: repr(value) for key, value in flatten(run.fields()).items()},
    }


def charts(metrics: list[dict], speed: list[dict]) -> dict[str, dict[str, list]]:
    """Curves, [step, value] each, by their names, by the name of their chart: scores first."""
    found: dict[str, dict[str, list]] = {}
    keys = dict.fromkeys(key for row in metrics for key in row if key != "step")
    for key in sorted(keys, key=lambda key: (not key.startswith("samples/"), key[:4] != "loss")):
        if match := re.fullmatch(r"samples/(\d+)_nfe/(.+)", key):
            chart, line = match[2], f"{match[1]} NFE"
        else:
            chart, line = ("terms of the loss" if "/" in key else key), key.rpartition("/")[2]
        found.setdefault(chart, {})[line] = curve(metrics, key)
    for chart, lines in SPEED.items():
        drawn = {line: curve(speed, line) for line in lines}
        found[chart] = {line: points for line, points in drawn.items() if points}
    return {
        chart.replace("_", " "): {line.replace("_", " "): points for line, points in lines.items()}
        for chart, lines in found.items() if lines
    }


def curve(rows: list[dict], key: str) -> list[tuple[int, float | None]]:
    """A key's values over steps; None where a mean is no number, which JSON does not have."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    size = max(-(-len(points) // POINTS), 1)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    means = ((group[-1][0], sum(value for _, value in group) / len(group)) for group in groups)
    return [
        (step, float(f"{mean:.5g}") if math.isfinite(mean) else None) for step, mean in means
    ]
