"""Small suites as their repositories have them, and results as the official scorers write them."""

import csv
import io
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from twinflow_jax.evaluation.suites import SUITES
from twinflow_jax.evaluation.suites.gedit import TASKS
from twinflow_jax.evaluation.suites.geneval import TAGS
from twinflow_jax.evaluation.suites.imgedit import TYPES

SIZES = (2, 3, 1, 2, 1, 3)  # prompts of GenEval's tags: unequal
ENDS = {  # of the groups of numbers
    "wise-legacy": (1, 400, 401, 567, 568, 700, 701, 800, 801, 900, 901, 1000),
    "wise-verified": (1, 400, 401, 520, 521, 640, 641, 760, 761, 880, 881, 1000),
}
WISE = ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science")

# (task or type, how many-th of it) of each edit: unequal numbers, alphabetical files.
GEDIT = [(task, n) for i, task in enumerate(TASKS) for n in range(1 + (i == 1) + 2 * (i == 4))]
IMGEDIT = [(kind, n) for i, kind in enumerate(TYPES) for n in range(1 + 2 * (i == 3))]
SIZES_OF_SOURCES = ((48, 32), (40, 40))


def source(number: int) -> Image.Image:
    """A picture to be edited."""
    width, height = SIZES_OF_SOURCES[number % 2]
    noise = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise.repeat(8, 0).repeat(8, 1))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: pathlib.Path) -> pathlib.Path:
    """Clones of all repositories, with few prompts, one folder for each suite."""
    tags = [tag for tag, size in zip(TAGS, SIZES, strict=True) for _ in range(size)]
    put = lambda *where: _made(folder.joinpath(*where))
    put("geneval", "prompts", "evaluation_metadata.jsonl").write_text(lines(
        {"tag": tag, "include": [{"class": "cat", "count": 1}], "prompt": f"a photo of cat {i}"}
        for i, tag in enumerate(tags)
    ))
    for name, text in (("12", "a long prompt"), ("diffusiondb0", "a café\n"), ("x-7", "a b")):
        put("dpg", "dpg_bench", "prompts", f"{name}.txt").write_text(text)
    for suite, place, ending in (
        ("wise-legacy", "WISE_legacy/data", ""), ("wise-verified", "data_verified", "_verified"),
    ):
        numbers = ENDS[suite]
        for file, part in zip(WISE, (numbers[:2], numbers[2:6], numbers[6:]), strict=True):
            rows = [{"Prompt": f"riddle {n}", "prompt_id": n, "Category": "?"} for n in part]
            put(suite, place, f"{file}{ending}.json").write_text(json.dumps(rows))
    put("wise-legacy", "WISE_legacy/data", f"{WISE[0]}_rewrite.json").write_text("[]")
    for language, ending in (("en", ""), ("zh", "_zh")):
        put(f"longtext-{language}", "textbench", f"text_prompts{ending}.jsonl").write_text(lines(
            {"category": "sign", "prompt": f"a sign {n}", "text": ["A"], "prompt_id": n}
            for n in (3, 101)
        ))
    put("geneval2", "geneval2_data.jsonl").write_text(lines(
        {"prompt": f"{n} cats", "atom_count": n, "vqa_list": [], "skills": []} for n in (3, 5)
    ))
    rows = [
        {
            "task_type": task, "key": f"{task[:2]}{n}", "instruction": f"{said} {i}\nplease",
            "instruction_language": language, "Intersection_exist": n != 1,
            "input_image": {"bytes": png(source(i)), "path": None},
        }
        for i, (task, n) in enumerate(GEDIT) for language, said in (("en", "paint"), ("cn", "画"))
    ]
    for suite in ("gedit", "gedit-cn"):
        for number, some in enumerate((rows[:9], rows[9:])):
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(some),
                put(suite, "default/train", f"000{number}.parquet"), row_group_size=4,
            )
    put("imgedit", "Benchmark/Basic/basic_edit.json").write_text(json.dumps({
        str(7 * i): {"id": f"daily object/{i % 4}.png", "prompt": f"edit {i}", "edit_type": kind}
        for i, (kind, _) in enumerate(IMGEDIT)
    }))
    for i in range(4):
        source(i).save(put("imgedit", "singleturn/daily object", f"{i}.png"))
    assert {path.name for path in folder.iterdir()} == set(SUITES)
    return folder


def _made(file: pathlib.Path) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def geneval(folder: pathlib.Path, prompts: pathlib.Path) -> str:
    """One line a picture: of prompt i's four, i % 4 are wrong."""
    file = prompts / "geneval" / "prompts" / "evaluation_metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return lines(
        {
            "filename": f"{folder}/{i:05d}/samples/{k:05d}.png", "tag": row["tag"],
            "prompt": row["prompt"], "correct": k >= i % 4, "reason": "",
            "metadata": json.dumps(row), "details": "{}",
        }
        for i, row in enumerate(rows) for k in range(4)
    )


def dpg(folder: pathlib.Path, said: str = "62.5") -> str:
    """The lines of three grids, and the summary after them."""
    crops = {"12": (1, 1, 1, 1), "diffusiondb0": (0.5, 0.5, 0, 1), "x-7": (0.5, 0.5, 0.5, 0)}
    found = [
        f"{folder}/{name}.png, {', '.join(map(str, of))}, {sum(of) / 4}"
        for name, of in crops.items()
    ]
    return "\n".join([
        *found, f"Model: {folder.name}", "L1 category scores:", "\tentity: 50.0",
        "L2 category scores:", "\tentity - whole: 50.0", f"Image path: {folder}",
        f"Save results to: {folder}.results.txt", f"DPG-Bench score: {said}", "",
    ])


def wise(suite: str, numbers=None) -> dict[str, str]:
    """Scores by file: of the legacy set (2, 2, 2), (2, 1, 1) and (0, 2, 2), by hundreds."""
    rows, numbers = [], numbers or ENDS[suite]
    for number in numbers:
        turn = number // 100 % 3
        three = ((2, 2, 2), (2, 1, 1), (0, 2, 2))[turn]
        keys = ("consistency", "realism", "aesthetic_quality")
        scores = dict(zip(keys, map(float, three), strict=True))
        if suite == "wise-verified":
            scores = {"score": float(turn == 0)}
        rows.append({"prompt_id": number, "Subcategory": "?", **scores})
    parts = zip(WISE, (rows[:2], rows[2:6], rows[6:]), strict=True)
    return {f"{name}_scores.jsonl": lines(part) for name, part in parts}


def longtext(folder: pathlib.Path) -> str:
    """10 of 10 words of the first prompt, none of 90 of the second."""
    return lines(
        {
            "image": f"{folder}/{n:04d}_{k}.png", "prompt": f"a sign {n}", "ocr_gt": "a",
            "ocr_results": "a", "match_word_count": found, "gt_word_count": words,
            "text_accuray": found / words,
        }
        for n, found, words in ((3, 10, 10), (101, 0, 90)) for k in range(1, 5)
    )


GEDIT_SCORES = [((3 * i + 4) % 10, (7 * i + 9) % 10) for i in range(len(GEDIT))]  # 4 and 9 first
IMGEDIT_SCORES = [((i % 5) + 1, 2 * i % 5 + 1, (3 * i + 1) % 5 + 1) for i in range(len(IMGEDIT))]


def gedit(folder: pathlib.Path, again: int = 0) -> str:
    """Rows of both languages, with GEDIT_SCORES; the first `again` twice, the second time with
    zeros, as after a stop."""
    buffer = io.StringIO()
    names = ("source_image", "edited_image", "instruction", "sementics_score", "quality_score",
             "intersection_exist", "instruction_language")
    writer = csv.DictWriter(buffer, names)
    writer.writeheader()
    rows = [
        dict(zip(names, (
            f"{place}_SRCIMG.png", f"{place}.png", f"{said} {i}\nplease", *of, n != 1, language,
        ), strict=True))
        for i, ((task, n), of) in enumerate(zip(GEDIT, GEDIT_SCORES, strict=True))
        for language, said in (("en", "paint"), ("cn", "画"))
        for place in [f"{folder}/fullset/{task}/{language}/{task[:2]}{n}"]
    ]
    writer.writerows(rows)
    writer.writerows(row | {"sementics_score": 0, "quality_score": 0} for row in rows[:again])
    return buffer.getvalue()


def imgedit() -> dict[str, str]:
    """What the judge says of each, with IMGEDIT_SCORES."""
    heads = ("Brief reasoning: fine: yes\nPrompt Compliance", "Visual Seamlessness", "Fidelity")
    return {
        str(7 * i): "\n".join(f"{head}: {number}" for head, number in zip(heads, of, strict=True))
        for i, of in enumerate(IMGEDIT_SCORES)
    }
