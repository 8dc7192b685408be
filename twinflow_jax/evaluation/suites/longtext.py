"""LongText-Bench (2507.22058): text in pictures, read by a network; English and Chinese apart."""

import pathlib

from twinflow_jax.errors import UserError
from twinflow_jax.evaluation.suites.suite import Item, Line, Suite, json_rows, printed

SAMPLES = 4


def parse(contents: dict[str, bytes]) -> list[Item]:
    [data] = contents.values()
    rows = json_rows(data.decode())
    return [Item(f"{row['prompt_id']:04d}", row["prompt"], row["category"]) for row in rows]


def read(text: str, items) -> tuple[list[Line], dict[str, float]]:
    """Words (in Chinese, characters) that were found over those that were to be drawn."""
    lines = []
    for row in json_rows(text):
        if "match_word_count" not in row:
            raise UserError("holds no match_word_count: run summary_scores.py first")
        file = pathlib.PurePosixPath(row["image"])
        name, _, part = file.stem.partition("_")
        if name not in items or items[name].prompt != row["prompt"]:
            raise UserError(f"{file} is of another prompt")
        lines.append(
            Line(name, int(part), row["match_word_count"], row["gt_word_count"], str(file))
        )
    return lines, {}


def create(language: str, title: str, file: str, digest: str) -> Suite:
    results = "{folder}.results"
    return Suite(
        f"longtext-{language}", f"LongText-Bench ({title})", "Qwen2.5-VL-7B-Instruct",
        "X-Omni-Team/X-Omni@2b8237b", ("textbench", file), 160, digest, parse, "{id}_{k}.png",
        "cd textbench\n"
        "torchrun --nproc_per_node=1 evaluate_text_reward.py --sample_dir {folder} "
        f"--output_dir {results} --mode {language}\n"
        f"cat {results}/results_chunk*.jsonl > {results}/results.jsonl\n"
        f"python summary_scores.py {results}/results.jsonl --mode {language}",
        read, ".jsonl", printed(r"Text Score: ([\d.]+)"), samples=SAMPLES, first=1, parts=SAMPLES,
    )


ENGLISH = create(
    "en", "English", r"text_prompts\.jsonl",
    "a2130769e72bd8560470a066114cdac87f80f1eb071ba6bc0f7033225a9be0d8",
)
CHINESE = create(
    "zh", "Chinese", r"text_prompts_zh\.jsonl",
    "6512cd121ac093e8113e114d76eb2c0ce967c220b18e2049e1063554ce496758",
)
