"""GEdit-Bench (2504.17761): what people ask to be done to pictures; English and Chinese apart."""

import csv
import functools
import io
import json
import math
import pathlib
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow
from etils import epath
from jaxtyping import Int

from twinflow_jax.data.tables import opened
from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites.suite import Item, Line, Suite, printed

TASKS = {  # with the number of their instructions
    "background_change": 40, "color_alter": 40, "material_alter": 40, "motion_change": 40,
    "ps_human": 70, "style_change": 60, "subject-add": 60, "subject-remove": 57,
    "subject-replace": 60, "text_change": 99, "tone_transfer": 40,
}
TEXTS = ["task_type", "key", "instruction", "instruction_language", "Intersection_exist"]
PICTURE = "input_image"  # in the size in which judges see it
SEMANTICS, QUALITY = "semantic consistency", "perceptual quality"
COMMON = "of what all models answered"  # the scorer's second table


def content(file: epath.Path) -> bytes:
    """The rows without their pictures, as JSON."""
    with opened(file) as table:
        return json.dumps(table.read(columns=TEXTS).to_pylist()).encode()


def parser(language: str):
    def parse(contents: dict[str, bytes]) -> list[Item]:
        return [
            Item(f"{row['task_type']}/{language}/{row['key']}", row["instruction"],
                 row["task_type"], source=f"{name}/{number}")
            for name, data in contents.items() for number, row in enumerate(json.loads(data))
            if row["instruction_language"] == language
        ]

    return parse


class Pictures:
    """Of the rows of Parquet files, a row group at a time: `Suite.sources`."""

    def __init__(self, files: Sequence[epath.Path], images: str | None):
        if images:
            raise UserError("--images cannot be used: the prompts of gedit hold their pictures")
        self._files = {file.name: file for file in files}
        self._lock = threading.Lock()  # threads wait for a group instead of reading it again
        self._starts = functools.cache(self._starts)
        self._group = functools.lru_cache(maxsize=4)(self._group)

    def __call__(self, item: Item) -> bytes:
        name, _, number = item.source.rpartition("/")
        with self._lock:
            starts = self._starts(name)
            group = int(np.searchsorted(starts, int(number), side="right")) - 1
            value = self._group(name, group)[int(number) - int(starts[group])].as_py()
        found = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(found, bytes):
            raise OSError(0, f"{PICTURE} holds no bytes")
        return found

    def _starts(self, name: str) -> Int[np.ndarray, "_"]:
        """The first rows of a file's row groups, and how many rows it has."""
        with opened(self._files[name]) as table:
            count = table.num_row_groups
            return np.cumsum([0, *(table.metadata.row_group(i).num_rows for i in range(count))])

    def _group(self, name: str, group: int) -> pyarrow.ChunkedArray:
        with opened(self._files[name]) as table:
            return table.read_row_group(group, columns=[PICTURE])[PICTURE]


def read(text: str, items: Mapping[str, Item]) -> tuple[list[Line], dict[str, float]]:
    """Each picture's first row: a scorer that was stopped judges some again."""
    lines, languages = {}, {name.split("/")[1] for name in items}
    for row in csv.DictReader(io.StringIO(text)):
        file = pathlib.PurePosixPath(row["edited_image"])
        name = "/".join([*file.parts[-3:-1], file.stem])
        if name not in items:
            if row["instruction_language"] not in languages:
                continue
            raise UserError(f"{file} is of another prompt")
        if items[name].prompt.split() != row["instruction"].split():
            raise UserError(f"{file} is of another prompt ({row['instruction']!r})")
        semantics, quality = float(row["sementics_score"]), float(row["quality_score"])  # its name
        overall = math.sqrt(semantics * quality)
        further = {SEMANTICS: semantics, QUALITY: quality}
        if row["intersection_exist"] == "True":
            further[COMMON] = overall
        lines.setdefault(name, Line(name, 0, overall, file=str(file), further=further))
    return list(lines.values()), {}


def create(name: str, title: str, language: str) -> Suite:
    which = "--model_name {name} --save_path {parent} --backbone gpt4o"
    fixes = """sed -i 's/tqdm(dataset, /tqdm(dataset["train"], /' test_gedit_score.py\n"""
    if language == "cn":  # as its data say, and its summary does not
        fixes += """sed -i 's/"zh"/"cn"/' calculate_statistics.py\n"""
    return Suite(
        name, f"GEdit-Bench ({title})", "GPT-4.1", "stepfun-ai/Step1X-Edit@570eba6",
        ("default/train", r".+\.parquet"), sum(TASKS.values()), TASKS, parser(language),
        "fullset/{id}.png",
        f"cd GEdit-Bench\n{fixes}python test_gedit_score.py {which}\n"
        f"python calculate_statistics.py {which} --language {language} "
        "| tee {folder}.summary.txt",
        read, ".csv", printed(r"Average: [\d.]+, [\d.]+, ([\d.]+)"),
        weights=dict.fromkeys(TASKS, 1 / len(TASKS)), allowed=r"(gpt4o|qwen25vl)/.*",
        dataset="stepfun-ai/GEdit-Bench@refs/convert/parquet", sources=Pictures,
        shown="fullset/{id}_SRCIMG.png", content=content,
    )


ENGLISH = create("gedit", "English", "en")
CHINESE = create("gedit-cn", "Chinese", "cn")
