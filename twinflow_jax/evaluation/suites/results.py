"""A scorer's results files to scores, which are computed here and compared with its own line."""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from twinflow_jax import files
from twinflow_jax.errors import UserError, few, reason
from twinflow_jax.evaluation.suites.suite import Item, Line, Suite

RESAMPLED, SHARE = 2000, 0.95  # of the bootstrap interval
SCORES = ".scores.json"  # beside the folder


def read(
    suite: Suite, items: Sequence[Item], folder: epath.Path, results: Sequence[str],
    partial: bool = False,
) -> dict[str, Any]:
    """Scores of a folder's pictures.

    results: the scorer's files, and perhaps what its summary printed. partial: take results of
    which some are missing.
    Raises:
      UserError: a file cannot be read, is of other pictures, has two results of one, or lacks some.
    """
    by_id = {item.id: item for item in items}
    found: dict[tuple[str, int], Line] = {}
    extra: dict[str, float] = {}
    said: dict[str, str] = {}
    for name in results:
        text = _text(name)
        said |= suite.said(text)
        if not name.endswith(suite.results):
            continue
        try:
            lines, more = suite.read(text, by_id)
        except UserError as error:
            raise UserError(f"--results {name}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--results {name} is no results file of {suite.name} ({reason(error)})"
            ) from error
        extra |= more
        for line in lines:
            _check_place(suite, folder, name, line)
            key = line.item, line.part
            if found.setdefault(key, line) != line:
                raise UserError(f"--results {name} has two results of {line.item}: give one run's")
    wanted = {
        (item.id, suite.first * (suite.parts > 1) + k) for item in items for k in range(suite.parts)
    }
    missing = sorted(wanted - found.keys())
    if len(missing) == len(wanted):
        raise UserError(f"no {suite.results} file with results in --results: give the scorer's own")
    if missing and not partial:
        names = few([f"{item}" + (f" ({k})" if suite.parts > 1 else "") for item, k in missing])
        raise UserError(
            f"results of {len(missing):,} of {len(wanted):,} are missing ({names}): score them, or "
            "say --partial"
        )
    sums = by_group(by_id, found.values())
    lacking = sorted(set(suite.weights or ()) - sums.keys())
    if lacking:
        raise UserError(f"no result of {', '.join(lacking)}: there is no score without them")
    value, low, high = (suite.scale * v for v in scored(suite.weights, sums))
    groups = {name: suite.scale * float(s[0].sum() / s[1].sum()) for name, s in sums.items()}
    for name in dict.fromkeys(name for line in found.values() for name in line.further):
        lines = [line for line in found.values() if name in line.further]
        of_these = by_group(by_id, (dataclasses.replace(i, total=i.further[name]) for i in lines))
        if of_these.keys() == sums.keys():
            extra[name] = suite.scale * scored(suite.weights, of_these)[0]
    notes = []
    for name, number in said.items():
        mine = groups.get(name, math.nan) if name else value
        if not agree(mine, number):
            of = f" of {name}" if name else ""
            notes.append(f"the scorer's own line says {number}{of}, its results give {mine:.5g}")
    return {
        "score": value, "interval": [low, high], "judge": suite.judge, "found": len(found),
        "expected": len(wanted), "said": said.get(""), "notes": notes, "further": extra,
        "groups": groups if len(groups) > 1 else {},
    }


def _text(name: str) -> str:
    try:
        return epath.Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--results {name} cannot be read ({reason(error)})") from error


def _check_place(suite: Suite, folder: epath.Path, name: str, line: Line) -> None:
    """Raises UserError where a result is of another folder's picture."""
    if line.file is None:
        return
    parts = pathlib.PurePosixPath(line.file).parts
    depth = suite.place.format(id=line.item, k=line.part).count("/") + 1
    if len(parts) > depth and parts[-depth - 1] != folder.name:
        raise UserError(f"--results {name} is of other pictures ({line.file}), not of {folder}")


def by_group(
    items: Mapping[str, Item], lines
) -> dict[str, tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]]:
    """Of each group, its items' sums of totals and of counts."""
    sums: dict[str, dict[str, list[float]]] = collections.defaultdict(dict)
    for line in lines:
        one = sums[items[line.item].group].setdefault(line.item, [0.0, 0.0])
        one[0], one[1] = one[0] + line.total, one[1] + line.count
    order = dict.fromkeys(item.group for item in items.values())
    table = {name: np.array(list(sums[name].values())) for name in order if name in sums}
    return {name: (of[:, 0], of[:, 1]) for name, of in table.items()}


def scored(weights: Mapping[str, float] | None, sums) -> tuple[float, float, float]:
    """The score, and the interval that holds it in SHARE of as many sets of prompts drawn with
    replacement, each group's for itself. weights, sums: by group, as of `Suite` and `by_group`."""
    random = np.random.default_rng(0)
    if weights is None:
        parts = [np.concatenate(of) for of in zip(*sums.values(), strict=True)]
        sums, weights = {"": tuple(parts)}, {"": 1.0}
    value, drawn = 0.0, np.zeros(RESAMPLED)
    for name, (totals, counts) in sums.items():
        value += weights[name] * float(totals.sum() / counts.sum())
        times = random.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), RESAMPLED)
        drawn += weights[name] * (times @ totals) / (times @ counts)
    low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return value, float(low), float(high)


def agree(value: float, said: str) -> bool:
    """Whether a number is what is printed, to the digits that are printed."""
    digits = len(said.partition(".")[2])
    return math.isclose(value, float(said), rel_tol=1e-6, abs_tol=0.51 * 10.0**-digits)


def write(folder: epath.Path, ending: str, scores: Mapping[str, Any]) -> epath.Path:
    """Keeps scores beside a folder, for the table."""
    file = folder.parent / (folder.name + ending)
    files.write(file, json.dumps(scores, indent=1).encode())
    return file
