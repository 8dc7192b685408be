"""Scores as a table, a plot, a sheet and a file."""

import dataclasses
import json

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image

from twinflow_jax import files, images
from twinflow_jax.errors import UserError

Row = dict[str, float | int | str]

COLUMNS = {  # heading, decimals, and of what real pictures a share is given too
    "accuracy": ("accuracy", 3, ""),
    "retrieval": ("R@1", 3, ""),
    "frechet": ("Frechet", 2, ""),
    "kernel": ("kernel", 2, ""),
    "diversity": ("diversity", 2, "real"),
    "nearest": ("nearest", 3, "held-out"),
}
PLOTTED = ("accuracy", "retrieval", "frechet", "diversity")


@dataclasses.dataclass(frozen=True)
class Scores:
    """rows: of the table. real: references. blocks: pictures by name, for a sheet of so many
    columns, all with `captions` for their rows where they have any. settings: what else the JSON
    says."""

    rows: list[Row]
    real: dict[str, float]
    blocks: dict[str, Float[np.ndarray, "N H W C"]]
    title: str
    settings: dict[str, float | int | None]
    columns: int
    captions: tuple[str, ...] = ()


def write(
    scores: Scores, json_file: str | None = None, plot_file: str | None = None,
    sheet: str | None = None,
) -> None:
    """Writes what was asked for.

    Raises:
      UserError: one cannot be written.
    """
    try:
        if json_file:
            record = {"real": scores.real, **scores.settings, "scores": scores.rows}
            files.write(json_file, json.dumps(record, indent=2).encode())
        if plot_file:
            images.save(plot_file, plot(scores.rows, scores.real))
        if sheet:
            picture = images.sheet(scores.blocks, scores.columns, scores.title, scores.captions)
            images.save(sheet, picture, {"rows": "\n".join(scores.captions)})
    except OSError as error:
        raise UserError(f"cannot write the results: {error}") from error


def table(rows: list[Row], real: dict[str, float]) -> str:
    """A table for the terminal of the scores that `real` has; some also as a share of real ones."""
    width = max(len("real images"), *(len(str(row["run"])) for row in rows))
    keys = [key for key in COLUMNS if key in real]
    head = [f"{'run':{width}}  NFE"]
    for key in keys:
        name, _, share = COLUMNS[key]
        head.append(f"{name:>9}" + (f"  (of {share})" if share else ""))
    lines = ["  ".join(head)]
    for row in ({"run": "real images", "nfe": "-"} | real, *rows):
        cells = [f"{row['run']:{width}}  {row['nfe']:>3}"]
        for key in keys:
            _, decimals, share = COLUMNS[key]
            cell = f"{round(row[key], decimals) + 0.0:9.{decimals}f}"  # no -0.00
            if share:
                # 0: the nearest to held-out pictures that were trained on
                of_real = f"{row[key] / real[key]:.2f}" if real[key] else "-"
                cell += f"  {of_real:>{len(share) + 5}}"
            cells.append(cell)
        lines.append("  ".join(cells))
    return "\n".join(lines)


def plot(rows: list[Row], real: dict[str, float]) -> Image.Image:
    """The main scores over evaluations, one line per run."""
    keys = [key for key in PLOTTED if key in real]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(keys))
    for axis, key in zip(axes, keys, strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            mine = [row for row in rows if row["run"] == run]
            axis.plot([r["nfe"] for r in mine], [r[key] for r in mine], "o-", label=run)
        label = "real train against held-out" if key == "frechet" else "real held-out"
        axis.axhline(real[key], color="grey", linestyle=":", label=label)
        axis.set(xlabel="network evaluations", title=COLUMNS[key][0], xscale="log")
        ticks = sorted({row["nfe"] for row in rows})
        axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axis.minorticks_off()
        if key == "frechet":
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    return images.of_figure(figure)
