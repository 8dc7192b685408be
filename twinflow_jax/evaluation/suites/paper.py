"""What the TwinFlow paper (2512.05150) reports, for the tables' columns.

Its scores by suite; of GenEval also by tag, in the order of `geneval.TAGS`, of GEdit-Bench its
parts. Rows are of networks with so many parameters, trained whole or by adapters, at so many
evaluations; those that edit pictures apart. Rewritten prompts have a mark of their own and are
never compared with others.
"""

import dataclasses
from collections.abc import Mapping

from twinflow_jax.evaluation.suites.gedit import QUALITY, SEMANTICS
from twinflow_jax.evaluation.suites.geneval import TAGS

QWEN, SANA_06, SANA_16 = 20.4e9, 0.59e9, 1.6e9  # parameters of the transformers
NEAR = 0.15  # relative


@dataclasses.dataclass(frozen=True)
class Row:
    """name: in the table's head. scores: by suite, or by "suite: group"."""

    name: str
    scores: Mapping[str, float]


def _row(name: str, tags: tuple[float, ...] = (), **scores: float) -> Row:
    """tags: of GenEval."""
    by_tag = {f"geneval: {tag}": value for tag, value in zip(TAGS, tags, strict=False)}
    return Row(name, {key.replace("_", "-"): value for key, value in scores.items()} | by_tag)


def _edited(name: str, semantics: float, quality: float, gedit: float, imgedit: float) -> Row:
    parts = {f"gedit: {SEMANTICS}": semantics, f"gedit: {QUALITY}": quality}
    return Row(name, {"gedit": gedit, "imgedit": imgedit} | parts)


# (parameters, by adapters, evaluations) -> Tables 2 to 5, 7 and 9
PAPER = {
    (QWEN, True, 1): _row(
        "TwinFlow-Qwen-Image LoRA, 1 NFE", (1.00, 0.91, 0.84, 0.90, 0.75, 0.74),
        geneval=0.86, dpg=86.52, wise_legacy=0.54, diversity=0.5044,
    ),
    (QWEN, True, 2): _row(
        "TwinFlow-Qwen-Image LoRA, 2 NFE",
        geneval=0.87, dpg=87.64, wise_legacy=0.57, diversity=0.5188,
    ),
    (QWEN, False, 1): _row(
        "TwinFlow-Qwen-Image full, longer, 1 NFE", geneval=0.89, dpg=87.54, wise_legacy=0.57,
    ),
    (QWEN, False, 2): _row(
        "TwinFlow-Qwen-Image full, longer, 2 NFE", geneval=0.90, dpg=87.80, wise_legacy=0.59,
    ),
    (SANA_06, False, 1): _row(
        "SANA-TwinFlow 0.6B, 1 NFE", (0.98, 0.90, 0.68, 0.89, 0.84, 0.70), geneval=0.83, dpg=78.9,
    ),
    (SANA_06, False, 2): _row("SANA-TwinFlow 0.6B, 2 NFE", geneval=0.84, dpg=79.7),
    (SANA_16, False, 1): _row(
        "SANA-TwinFlow 1.6B, 1 NFE", (0.99, 0.88, 0.65, 0.86, 0.79, 0.68), geneval=0.81, dpg=79.1,
    ),
    (SANA_16, False, 2): _row("SANA-TwinFlow 1.6B, 2 NFE", geneval=0.83, dpg=79.6),
}
REWRITTEN_PAPER = {  # of the same weights as the first row
    (QWEN, True, 1): _row(
        "TwinFlow-Qwen-Image LoRA, 1 NFE, rewritten", (0.99, 0.94, 0.87, 0.96, 0.78, 0.83),
        geneval=0.90,
    ),
}
EDITED_PAPER = {  # Table 8
    (QWEN, True, 2): _edited("TwinFlow-Qwen-Image-Edit LoRA, 2 NFE", 5.94, 6.81, 5.85, 3.47),
    (QWEN, True, 4): _edited("TwinFlow-Qwen-Image-Edit LoRA, 4 NFE", 5.95, 6.97, 5.91, 3.55),
}
EDITED_TEACHERS = {
    QWEN: _edited("Qwen-Image-Edit, 50 steps guided", 8.00, 7.86, 7.56, 4.27),
}
TEACHERS = {
    QWEN: _row(
        "Qwen-Image, 50 steps guided", (0.99, 0.92, 0.89, 0.88, 0.76, 0.77),
        geneval=0.87, dpg=88.32, wise_legacy=0.62,
    ),
}


def row_of(
    parameters: int, adapters: bool, nfe: int, rewritten: bool = False, edits: bool = False
) -> Row | None:
    """The paper's row of such a network; None where it has none."""
    rows = EDITED_PAPER if edits else PAPER
    return next((
        row for (size, low, steps), row in (REWRITTEN_PAPER if rewritten else rows).items()
        if _near(size, parameters) and (low, steps) == (adapters, nfe)
    ), None)


def teacher_of(parameters: int, edits: bool = False) -> Row | None:
    """The paper's row of the network that such a one was trained from."""
    rows = EDITED_TEACHERS if edits else TEACHERS
    return next((row for size, row in rows.items() if _near(size, parameters)), None)


def _near(size: float, parameters: int) -> bool:
    return abs(parameters - size) < NEAR * size
