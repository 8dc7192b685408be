"""Scores as a table and as a plot."""

import io

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from PIL import Image  # noqa: E402

Row = dict[str, float | int | str]


def table(rows: list[Row], real: dict[str, float]) -> str:
    """A table for the terminal; diversity and nearest also as a share of real held-out images'."""
    width = max(len("real images"), *(len(str(row["run"])) for row in rows))
    lines = [
        f"{'run':{width}}  NFE  accuracy  Frechet  diversity (of real)  nearest (of held-out)",
        f"{'real images':{width}}    -  {real['accuracy']:8.3f}  {real['frechet']:7.2f}  "
        f"{real['diversity']:9.2f}  1.00      {real['nearest']:7.3f}  1.00",
    ]
    for row in rows:
        lines.append(
            f"{row['run']:{width}}  {row['nfe']:3d}  {row['accuracy']:8.3f}  "
            f"{row['frechet']:7.2f}  {row['diversity']:9.2f}  "
            f"{row['diversity'] / real['diversity']:4.2f}      {row['nearest']:7.3f}  "
            f"{row['nearest'] / real['nearest']:4.2f}"
        )
    return "\n".join(lines)


def plot(rows: list[Row], real: dict[str, float]) -> Image.Image:
    """Accuracy, Frechet distance and diversity over evaluations, one line per run."""
    keys = ("accuracy", "frechet", "diversity")
    figure, axes = plt.subplots(1, len(keys), figsize=(12, 3.6), layout="constrained")
    for axis, key in zip(axes, keys, strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            mine = [row for row in rows if row["run"] == run]
            axis.plot([r["nfe"] for r in mine], [r[key] for r in mine], "o-", label=run)
        label = "real train against held-out" if key == "frechet" else "real held-out"
        axis.axhline(real[key], color="grey", linestyle=":", label=label)
        axis.set(xlabel="network evaluations", title=key, xscale="log")
        ticks = sorted({row["nfe"] for row in rows})
        axis.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axis.minorticks_off()
        if key == "frechet":
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    return to_image(figure)


def to_image(figure) -> Image.Image:
    """A matplotlib figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return Image.open(buffer)
