"""The page of a run: all that its folder says, and nothing that a text in it could run."""

import html.parser
import json
import math
import os
import re
import shutil
import subprocess

import pytest

from twinflow_jax.training import page

BAD = '</script><script>document.title = "run by a caption"</script>'
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def folder(small_config, tmp_path):
    """A run's folder with 1,000 lines of metrics, speed of two starts and three sheets."""
    metrics = [{"step": i, "loss": 2.0 * i, "loss/rcgm": 1.0} for i in range(1, 1001)]
    metrics += [{"step": i, "samples/1_nfe/frechet": math.nan if i == 500 else 7.0}
                for i in (500, 1000)]
    speed = [{"step": i, "run_began": 0.0, "goodput": 0.1 * j, "useful_seconds": 60.0,
              "images_per_second": 3.0, "seconds_per_step": 2.0, "seconds": {"steps": 1.0}}
             for j, i in enumerate((500, 700, 600, 700, 1000), 1)]
    for name, rows in (("metrics", metrics), ("speed", speed)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines + '{"step": 10')  # torn by a kill
    (tmp_path / "samples").mkdir()
    for step in (1000000, 500, 1000):
        (tmp_path / f"samples/step_{step:06d}.png").write_bytes(b"")
    config = small_config("train.steps=2000", f"sample.prompts=({BAD!r}, 'a fox')")
    page.write(tmp_path, config, config.sample.prompts)
    return tmp_path


class Scripts(html.parser.HTMLParser):
    """The texts of a page's scripts, as a browser splits it."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip():
            self.found.append(data)


def shown(folder) -> dict:
    data, _ = Scripts((folder / "index.html").read_text()).found
    return json.loads(data, parse_constant=pytest.fail)  # a browser knows no NaN


def test_page_holds_the_whole_run(folder):
    run = shown(folder)
    assert (run["step"], run["steps"], run["rows"]) == (1000, 2000, [BAD, "a fox"])
    sheets = [[step, f"samples/step_{step:06d}.png"] for step in (500, 1000, 1000000)]
    assert run["sheets"] == sheets and run["speed"]["step"] == 1000
    assert run["settings"]["optimizer.learning_rate"] == "0.001"
    charts = run["charts"]
    assert list(charts) == [
        "frechet", "loss", "terms of the loss", "images per second", "shares of time and peak",
    ]
    assert charts["frechet"] == {"1 NFE": [[500, None], [1000, 7.0]]}
    loss = charts["loss"]["loss"]  # means of 3 neighbours, the last group of one
    assert loss[0] == [3, 4.0] and loss[-1] == [1000, 2000.0] and len(loss) == 334
    goodput = charts["shares of time and peak"]["goodput"]  # what was done again counts once
    assert goodput == [[500, 0.1], [600, 0.3], [700, 0.4], [1000, 0.5]]


@pytest.mark.skipif(not BROWSER, reason="no chromium here: apt-get install chromium")
def test_a_browser_draws_the_page(folder):
    """All curves, captions as text, and another sheet when the slider moves."""
    text, run = (folder / "index.html").read_text(), shown(folder)
    moved = "<script>slider.value = 1; slider.oninput()</script>"
    (folder / "moved.html").write_text(text + moved)
    command = [BROWSER, "--headless", "--no-sandbox", f"--user-data-dir={folder / 'profile'}"]
    drawn = subprocess.run(
        [*command, "--dump-dom", f"file://{folder}/moved.html"], check=True, text=True,
        capture_output=True, env=os.environ | {"HOME": str(folder)},
    ).stdout
    assert re.search(r"<title>test_\w+: step 1000</title>", drawn)
    assert drawn.count("<path") == sum(map(len, run["charts"].values()))
    assert "<li>&lt;/script&gt;&lt;script&gt;" in drawn and "step 1,000</label>" in drawn
    assert '<img id="sheet" alt="step 1,000" src="samples/step_001000.png">' in drawn
    assert "files: <a" in drawn  # the last part: none before it failed
