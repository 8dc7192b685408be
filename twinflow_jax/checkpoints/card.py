"""The model card of an export: README.md with what the hub reads of it, and its picture."""

import dataclasses
import re
from typing import Any

from etils import epath
from PIL import Image

from twinflow_jax import files
from twinflow_jax.checkpoints.imported import Imported
from twinflow_jax.config import Run, flatten
from twinflow_jax.config.run import keys_of

CARD = """\
---
{head}
---

# {name}

Written by twinflow_jax from `{base}`{weights}. `{library}` loads this folder.
"""


@dataclasses.dataclass(frozen=True)
class Trained:
    """Weights of a run that are exported. raw: not the average."""

    folder: epath.PathLike
    run: Run
    step: int
    raw: bool

    def __str__(self) -> str:
        return f"trained for {self.step} steps ({'raw' if self.raw else 'average'} weights)"


def make(name: str, checkpoint: Imported, trained: Trained | None = None) -> dict[str, bytes]:
    """The card, and the picture in it, by the names of their files.

    name: of the export. Of paths only last names are told: a card is made to be published.
    """
    family, record = checkpoint.text_to_image, checkpoint.record
    draws = "transformer" in checkpoint.parts
    library = "transformers" if set(checkpoint.parts) <= {*family.encoders} else "diffusers"
    head = [f"library_name: {library}", *record.get("licence", ())]
    head += [f"pipeline_tag: {'image' if family.editing else 'text'}-to-image"] if draws else []
    head += [f"base_model: {record['hub']}"] if "hub" in record else []
    head += ["tags: [twinflow]"] if trained else []
    base = record["source"] if "hub" in record else epath.Path(record["source"]).name
    parts = [CARD.format(
        head="\n".join(head), name=name, base=base, library=library,
        weights=f", {trained}" if trained else "",
    )]
    if draws and checkpoint.knows_r:
        parts.append(family.note(checkpoint.config("transformer").times) + "\n")
    pictures = {}
    if trained:
        pictures = _pictures(trained, parts)
        figures, settings = _figures(trained), _settings(trained.run)
        parts += [_table("Figures", figures)] if figures else []
        parts.append(_table("Settings, where they are not the default", settings))
    return {"README.md": "\n".join(parts).encode()} | pictures


def licence(folder: epath.Path) -> list[str]:
    """The lines of a published folder's card that say its licence."""
    card = folder / "README.md"
    text = card.read_text() if card.exists() else ""
    head = re.match(r"\ufeff?---\s*\n(.*?)\n---", text, re.DOTALL)
    return re.findall(r"^license(?:_name|_link)?: *\S.*$", head[1] if head else "", re.MULTILINE)


def _pictures(trained: Trained, parts: list[str]) -> dict[str, bytes]:
    """The newest sheet of a run up to the exported step, and what to say of it."""
    sheets = epath.Path(trained.folder) / "samples"
    found = [
        (int(match[1]), sheet) for sheet in (sheets.iterdir() if sheets.exists() else ())
        if (match := re.fullmatch(r"step_(\d+)\.png", sheet.name)) and int(match[1]) <= trained.step
    ]
    if not found:
        return {}
    step, sheet = max(found)
    with sheet.open("rb") as stream, Image.open(stream) as picture:
        rows = picture.text.get("rows", "").splitlines()
    told = f"Rows: {'; '.join(rows)}.\n" if rows else ""
    parts.append(f"![Samples after step {step}](samples.png)\n\n{told}")
    return {"samples.png": sheet.read_bytes()}


def _figures(trained: Trained) -> dict[str, Any]:
    """The newest loss and scores of samples up to the exported step, by name."""
    found = {}
    for row in files.rows(epath.Path(trained.folder) / "metrics.jsonl"):
        if row["step"] <= trained.step:
            found |= {key: f"{value:.4g} (step {row['step']})" for key, value in row.items()
                      if key == "loss" or key.startswith("samples/")}
    return found


def _settings(run: Run) -> dict[str, Any]:
    values = flatten(run.fields())
    return {
        name: repr(values[name]) for name, key in keys_of(run.fields()).items()
        if values[name] != key.default and not key.is_path and name != "train.hub"
    }


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| `{name}` | {value} |" for name, value in
             ((name, str(value).replace("|", r"\|")) for name, value in rows.items())]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""])
