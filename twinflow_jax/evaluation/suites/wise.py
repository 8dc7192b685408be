"""WISE (2503.07265): knowledge. Two versions whose pictures and scores are not to be mixed."""

import json
from collections.abc import Callable

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites.suite import Item, Line, Suite, json_rows, printed

REPOSITORY = "PKU-YuanGroup/WISE@eb51174"
NAMES = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")
GROUPS = ("culture", "time", "space", "biology", "physics", "chemistry")


def by_number(ends: tuple[int, ...]) -> Callable[[int], str]:
    """The group of an item's number, from the last number of each: categories in the files are
    spelled in several ways."""

    def group(number: int) -> str:
        return next(name for name, end in zip(GROUPS, ends, strict=True) if number <= end)

    return group


def parser(group: Callable[[int], str]):
    def parse(contents: dict[str, bytes]) -> list[Item]:
        rows = [row for data in contents.values() for row in json.loads(data)]
        rows.sort(key=lambda row: row["prompt_id"])
        return [
            Item(str(row["prompt_id"]), row["Prompt"], group(row["prompt_id"])) for row in rows
        ]

    return parse


def reader(keys: tuple[str, ...], score: Callable[..., float]):
    def read(text: str, items) -> tuple[list[Line], dict[str, float]]:
        lines = []
        for row in json_rows(text):
            if any(key not in row for key in keys):
                raise UserError(f"holds no {' and '.join(keys)}: is it of the other WISE?")
            name = str(row["prompt_id"])
            if name not in items:
                raise UserError(f"prompt_id {name} is none of the prompts")
            lines.append(Line(name, 0, score(*(row[key] for key in keys))))
        return lines, {}

    return read


LEGACY_COMMAND = "\n".join([
    *(f"python gpt_eval.py --json_path data/{name}.json --image_dir {{folder}} --output_dir "
      f"{{folder}}.results --api_key KEY --model gpt-4o-2024-05-13 --result_full {name}_full.json "
      f"--result_scores {name}_scores.jsonl" for name in NAMES),
    "python Calculate.py {folder}.results/*_scores.jsonl --category all "
    "| tee {folder}.results/summary.txt",
])

LEGACY = Suite(
    "wise-legacy", "WISE (legacy, 2025)", "GPT-4o-2024-05-13", REPOSITORY,
    ("WISE_legacy/data", rf"({'|'.join(NAMES)})\.json"), 1000,
    "3787b7354e84306e102e34600b0877a558fdbb8e885dfec4a60bda97886302af",
    parser(by_number((400, 567, 700, 800, 900, 1000))), "{id}.png",
    "cd WISE_legacy\n" + LEGACY_COMMAND,
    reader(("consistency", "realism", "aesthetic_quality"),
           lambda c, r, a: (0.7 * c + 0.2 * r + 0.1 * a) / 2),
    ".jsonl", printed(r"Overall WiScore: ([\d.]+)"),
    weights=dict(zip(GROUPS, (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), strict=True)),
    allowed=r"Results/.*",
)

VERIFIED = Suite(
    "wise-verified", "WISE Verified (2026)", "Qwen3.5-35B-A3B", REPOSITORY,
    ("data_verified", rf"({'|'.join(NAMES)})_verified\.json"), 1000,
    "3146044eaec245b34503b4937b93745141de402a1842ea1004eb534c14948ec4",
    parser(by_number((400, 520, 640, 760, 880, 1000))), "{id}.png",
    "IMAGE_DIR={folder} VLLM_API_BASE=http://127.0.0.1:8000/v1 bash eval_qwen.sh "
    "| tee {folder}.summary.txt",
    reader(("score",), float), ".jsonl", printed(r"Overall WiScore: ([\d.]+)"),
    weights=dict(zip(GROUPS, (0.4, 0.12, 0.12, 0.12, 0.12, 0.12), strict=True)),
    allowed=r"Results-[\w.-]+/.*",
)
