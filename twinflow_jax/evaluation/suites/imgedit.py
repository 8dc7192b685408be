"""ImgEdit-Bench (2505.20275), its basic suite: nine kinds of edits."""

import json
from collections.abc import Mapping, Sequence

from etils import epath

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites.suite import Item, Line, Read, Suite

TYPES = (
    "add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action"
)


def parse(contents: dict[str, bytes]) -> list[Item]:
    [data] = contents.values()
    rows = json.loads(data)
    if any("edit_type" not in row for row in rows.values()):
        raise ValueError(
            "they have no edit_type: ImgEdit's UGE and multi-turn suites are not drawn, give "
            "Benchmark/Basic/basic_edit.json"
        )
    return [
        Item(key, row["prompt"], row["edit_type"], source=row["id"]) for key, row in rows.items()
    ]


def sources(files: Sequence[epath.Path], images: str | None) -> Read:
    """The pictures lie apart, in an archive on the hub."""
    if not images:
        raise UserError(
            "imgedit's pictures lie apart from its prompts: give --images, the folder in "
            "Benchmark.tar of huggingface.co/datasets/sysuyy/ImgEdit that has animal/, style/ ..."
        )
    return lambda item: (epath.Path(images) / item.source).read_bytes()


def read(text: str, items: Mapping[str, Item]) -> tuple[list[Line], dict[str, float]]:
    """Of what the judge said of each picture, or of the means that the scorer's first step made of
    that, which it rounds. Answers without a score are no results."""
    rows, lines = json.loads(text), []
    if rows.keys() <= set(TYPES):
        return [], {}
    for key, said in rows.items():
        if key not in items:
            raise UserError(f"{key} is none of the prompts")
        score = mean(said) if isinstance(said, str) else said
        if isinstance(score, int | float):
            lines.append(Line(key, 0, float(score)))
    return lines, {}


def mean(said: str) -> float | None:
    """Of the lines "name: whole number", to two places, as the scorer counts them."""
    numbers = [line.strip().partition(": ")[2] for line in said.splitlines()]
    scores = [int(number) for number in numbers if number.isdigit()]
    return round(sum(scores) / len(scores), 2) if scores else None


def said(text: str) -> dict[str, str]:
    """The means by type that the scorer's second step wrote."""
    try:
        rows = json.loads(text)
        of_types = rows.keys() <= set(TYPES)
    except (ValueError, AttributeError):
        return {}
    return {name: f"{value:.2f}" for name, value in rows.items()} if of_types else {}


STEPS = "--average_score_json {folder}.averages.json"
IMGEDIT = Suite(
    "imgedit", "ImgEdit-Bench (basic)", "GPT-4o", "PKU-YuanGroup/ImgEdit@547185d",
    ("Benchmark/Basic", r"basic_edit\.json"), 737,
    "5ee9b7d61e918692416f79896300f738598c83adff8de737b25be4aaff72dc69", parse, "{id}.png",
    "cd Benchmark/Basic\n"
    "python basic_bench.py --result_img_folder {folder} --edit_json basic_edit.json "
    "--origin_img_root {images} --prompts_json prompts.json\n"
    f"python step1_get_avgscore.py --result_json {{folder}}/result.json {STEPS}\n"
    f"python step2_typescore.py {STEPS} --basic_edit basic_edit.json "
    "--typescore_json {folder}.types.json",
    read, ".json", said, weights=dict.fromkeys(TYPES, 1 / len(TYPES)), allowed=r"result\.json",
    sources=sources,
)
