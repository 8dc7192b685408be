"""GenEval (2310.11513) and GenEval 2 (2512.16853): objects, counts, colours, places."""

import json
import math
import pathlib

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites.suite import Item, Line, Suite, json_rows, printed

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def parse(contents: dict[str, bytes]) -> list[Item]:
    [data] = contents.values()
    items = []
    for line in data.splitlines():
        row, name = json.loads(line), f"{len(items):05d}"
        beside = f"{name}/metadata.jsonl", line + b"\n"  # read as one JSON object
        items.append(Item(name, row["prompt"], row["tag"], beside=beside))
    return items


def read(text: str, items) -> tuple[list[Line], dict[str, float]]:
    lines, right = [], {}
    for row in json_rows(text):
        file = pathlib.PurePosixPath(row["filename"])
        name = file.parent.parent.name
        item = items.get(name)
        if item is None or (item.prompt, item.group) != (row["prompt"], row["tag"]):
            raise UserError(f"{file} is of another prompt ({row['prompt']!r})")
        lines.append(Line(name, int(file.stem), float(row["correct"]), file=str(file)))
        right[name] = right.get(name, False) or bool(row["correct"])
    share = lambda values: sum(values) / max(len(values), 1)
    return lines, {
        "correct pictures": share([line.total for line in lines]),
        "correct prompts (any picture)": share(list(right.values())),
    }


GENEVAL = Suite(
    "geneval", "GenEval", "Mask2Former and CLIP (official scorer)", "djghosh13/geneval@af4902f",
    ("prompts", r"evaluation_metadata\.jsonl"), 553,
    "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13", parse,
    "{id}/samples/{k:05d}.png",
    "python evaluation/evaluate_images.py {folder} --outfile {folder}.results.jsonl "
    "--model-path MASK2FORMER_FOLDER\n"
    "python evaluation/summary_scores.py {folder}.results.jsonl | tee {folder}.summary.txt",
    read, ".jsonl", printed(r"Overall score \(avg\. over tasks\): ([\d.]+)"), samples=4, parts=4,
    weights=dict.fromkeys(TAGS, 1 / len(TAGS)),
)


def parse_2(contents: dict[str, bytes]) -> list[Item]:
    [data] = contents.values()
    rows = json_rows(data.decode())
    return [
        Item(f"{i:05d}", row["prompt"], f"{int(row['atom_count'])} atoms")
        for i, row in enumerate(rows)
    ]


def read_2(text: str, items) -> tuple[list[Line], dict[str, float]]:
    """Soft-TIFA by prompt, the geometric mean of its atoms' scores; by atom, the arithmetic."""
    scores = json.loads(text)
    if len(scores) > len(items):
        raise UserError(f"holds {len(scores):,} results for {len(items):,} prompts")
    means = [math.prod(s) ** (1 / len(s)) for s in scores]
    lines = [Line(name, 0, mean) for name, mean in zip(items, means, strict=False)]
    by_atom = sum(sum(s) / len(s) for s in scores) / max(len(scores), 1)
    return lines, {"Soft-TIFA AM": 100 * by_atom}


GENEVAL_2 = Suite(
    "geneval2", "GenEval 2 (Soft-TIFA GM)", "Qwen3-VL-8B-Instruct",
    "facebookresearch/GenEval2@a6e82d2", ("", r"geneval2_data\.jsonl"), 800,
    "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43", parse_2, "{id}.png",
    "python evaluation.py --benchmark_data geneval2_data.jsonl --image_filepath_data {folder}.json "
    "--method soft_tifa_gm --output_file {folder}.results.json | tee {folder}.summary.txt",
    read_2, ".json", printed(r"Score: ([\d.]+)"), scale=100, map=True,
)
