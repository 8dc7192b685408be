"""The page that draws: what it draws, whom it serves, and that nothing which goes wrong ends it."""

import asyncio
import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.test_verbs import call
from twinflow_jax import config as configs
from twinflow_jax import demo, sample
from twinflow_jax.checkpoints.random import write_random
from twinflow_jax.errors import UserError
from twinflow_jax.models import names
from twinflow_jax.models.qwen_image import edit
from twinflow_jax.serving import networks
from twinflow_jax.serving.studio import Studio
from twinflow_jax.serving.wish import Wish
from twinflow_jax.training.loop import train

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ASKED = {
    "checkpoints": [0], "evaluations": [1], "count": 1, "seed": "7", "label": 3,
    "prompt": "a red fox", "size": "", "strip": False, "pictures": [],
}
FLOW = {
    "_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "flow_shift": 3.0,
}


def wish(**changed) -> Wish:
    return Wish.of(json.dumps(ASKED | changed).encode(), 2)


def events(studio: Studio, asked: Wish) -> list[dict]:
    async def collect():
        return [event async for event in studio.events(asked)]

    return asyncio.run(collect())


def pixels(png: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        return np.asarray(picture, int)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on digits: TwinFlow, and one that only learned velocities."""
    folder = tmp_path_factory.mktemp("demo")
    small = ["model.width=32", "model.depth=1", "data.batch_size=32", "train.steps=4",
             "sample.score_count=0", "sample.steps=(1,)", "sample.columns=1"]
    train(configs.parse("configs/digits.py", small), str(folder / "twin"), progress=False)
    flow = [*small, "train.flow_matching_steps=4"]
    train(configs.parse("configs/digits.py", flow), str(folder / "flow"), progress=False)
    return [str(folder / "twin"), str(folder / "flow")]


@pytest.fixture(scope="module")
def server(runs):
    """`(address, process)` of the command."""
    command = [sys.executable, "-m", "twinflow_jax.demo", "--port", "0"]
    command += [part for run in runs for part in ("--checkpoint", run)]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        said = process.stdout.readline()
        yield re.fullmatch(r"(http://127.0.0.1:\d+) draws with twin, flow; .*\n", said)[1], process
        process.terminate()
        lines = process.stderr.read().splitlines()
    assert process.returncode == 143 and lines[-1] == "terminated"
    assert all(re.match("refused: |a browser left", line) for line in lines[:-1]), lines


def test_draws_what_sample_draws(runs, tmp_path):
    """The same pixels at each number of evaluations, with the settings in the file."""
    studio = Studio(networks.open_networks(runs))
    found = events(studio, wish(evaluations=[1, 4], count=4, checkpoints=[0]))
    cells = [event for event in found if "pictures" in event]
    assert [cell["nfe"] for cell in cells] == [1, 4]
    for cell in cells:
        out = tmp_path / str(cell["nfe"])
        given = ["--classes", "3", "--count", "4", "--seed", "7", "--steps", str(cell["nfe"])]
        assert call(sample, "--checkpoint", runs[0], "--out", str(out), *given) == 0
        for file, picture in zip(sorted(out.iterdir()), cell["pictures"], strict=True):
            with Image.open(file) as theirs:
                np.testing.assert_allclose(pixels(picture["png"]), np.asarray(theirs, int), atol=1)
                theirs = json.loads(theirs.text["twinflow"])
            with Image.open(io.BytesIO(base64.b64decode(picture["png"]))) as ours:
                ours = json.loads(ours.text["twinflow"])
            assert {k: v for k, v in theirs.items() if k not in ("checkpoint", "raw")} == {
                k: v for k, v in ours.items() if k != "checkpoint"
            }


def test_trajectories_are_of_what_was_learned(runs):
    """Both for TwinFlow, and nothing at negative times of velocities alone, which also take no
    jumps: their style tells the network its own time."""
    twin, flow = networks.open_networks(runs)
    strips = {
        network.name: [network.strip(wish(), fake, lambda text: None) for fake in (False, True)]
        for network in (twin, flow)
    }
    assert [x.shape for x in strips["twin"]] == [(9, 8, 8, 1)] * 2
    np.testing.assert_array_equal(strips["twin"][0][0], strips["twin"][1][0])  # the same noise
    assert not np.allclose(strips["twin"][0][-1], strips["twin"][1][-1])
    assert strips["flow"][1] is None
    [page] = flow.draw(wish(), 2, lambda text: None).pages
    assert json.loads(page.text["twinflow"])["style"] == "mul"


def test_prompts_and_what_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    """Each mistake is a sentence in the page and a line in the console, and the next wish draws."""
    folder = str(tmp_path / "sana")
    written = write_random("sana", folder, seed=0)
    studio = Studio(networks.open_networks([folder]))
    last = lambda **changed: events(studio, wish(**changed))[-1]
    *_, drawn, note = events(studio, wish(prompt="fox " * 2500))
    assert "only the first 298 are used" in note["note"]
    assert "only the first 298" in capsys.readouterr().err
    assert last(prompt="fox " * 2500, seed="8") == note  # again, though it is not encoded again
    assert call(sample, "--checkpoint", folder, "--out", str(tmp_path), "--seed", "7", "--prompt",
                "fox " * 2500) == 0
    [file] = tmp_path.glob("*.png")
    with Image.open(file) as theirs:
        theirs = np.asarray(theirs, int)
        np.testing.assert_allclose(pixels(drawn["pictures"][0]["png"]), theirs, atol=1)
    capsys.readouterr()
    mistakes = {
        "prompt 1 of 1 is empty": last(prompt=" "),
        "50x50 is not divisible by 32: choose 64x64": last(size="50"),
        "320x320 is over 4 times the 16,384 pixels that": last(size="320"),
    }
    monkeypatch.setattr(networks, "memory", lambda: 1000)
    mistakes["and this machine has 0.0 GB: serve it from"] = last()
    monkeypatch.undo()
    lines = capsys.readouterr().err.splitlines()
    for line, (sentence, event) in zip(lines, mistakes.items(), strict=True):
        assert sentence in event["error"] and line == f"refused: {event['error']}"
    assert last()["nfe"] == 1

    # The same weights as those of a base model draw by its own sampling.
    table = written.network("transformer").table(written.config("transformer"))
    record = json.loads((written.folder / "checkpoint.json").read_text())
    record["networks"]["transformer"]["added"] = sorted(table.group(names.KNOWS_R))
    (written.folder / "checkpoint.json").write_text(json.dumps(record))
    (written.folder / "files/scheduler").mkdir()
    (written.folder / "files/scheduler/scheduler_config.json").write_text(json.dumps(FLOW))
    [base] = networks.open_networks([folder])
    assert not base.about["fake"]
    drawn = base.draw(wish(evaluations=[2]), 2, lambda text: None)
    assert drawn.nfe == 4 and json.loads(drawn.pages[0].text["twinflow"])["base"] is True


def test_edits_what_sample_edits(tmp_path, monkeypatch, capsys):
    """In the picture's own size where none is given; what is no picture is a sentence."""
    whole = edit.size_of_area
    monkeypatch.setattr(edit, "size_of_area", lambda area, size: whole(area // 256, size))
    folder = str(write_random("qwen_image_edit_plus", tmp_path / "c", seed=0).folder)
    source, rng = tmp_path / "in.png", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8)).save(source)
    given = base64.b64encode(source.read_bytes()).decode()
    studio = Studio(networks.open_networks([folder]))
    [about] = [network.about for network in studio.networks]
    assert about["edits"] == 3
    for size, shape in ("", (60, 90, 3)), ("32x64", (64, 32, 3)):
        out = tmp_path / f"out{size}"
        assert call(
            sample, "--checkpoint", folder, "--image", str(source), "--prompt", "a red fox",
            "--seed", "7", "--out", str(out), *(("--size", size) if size else ()),
        ) == 0
        [file] = out.iterdir()
        [theirs] = [one for one in events(studio, wish(size=size, pictures=[given]))
                    if "pictures" in one]
        ours = pixels(theirs["pictures"][0]["png"])
        with Image.open(file) as theirs:
            np.testing.assert_allclose(ours, np.asarray(theirs, int), atol=1)
        assert ours.shape == shape
    last = lambda *pictures: events(studio, wish(pictures=pictures))[-1]["error"]
    assert last() == "choose a picture that the instruction is about"
    assert "is about 4 pictures: this network takes 1 to 3" in last(*[given] * 4)
    torn = base64.b64encode(source.read_bytes()[:2000]).decode()
    assert re.match("picture 2 cannot be read as a picture", last(given, torn))


@pytest.mark.parametrize("changed, says", [
    ({"seed": "-1"}, "the seed is -1; give a whole number"),
    ({"size": "10x"}, "'10x' is no size"),
    ({"checkpoints": [5]}, "5 is not a checkpoint of this page"),
    ({"evaluations": [3]}, "3 is not a number of evaluations"),
    ({"evaluations": []}, "choose a number of evaluations"),
    ({"count": 10**9}, "is not the page's: count"),
    ({"evaluations": [[1]]}, "is not the page's"),
    ({"prompt": "x" * 300_000}, "the prompt has over 131,072 letters: shorten it"),
    ({"pictures": ["A" * (1 << 26)]}, "over 67,108,864 bytes: choose smaller pictures"),
    ({"pictures": ["no base64"]}, "is not the page's"),
])
def test_a_wish_that_is_none_is_refused(changed, says):
    with pytest.raises(UserError, match=re.escape(says)):
        wish(**changed)


class Held:
    """A network that draws once it may."""

    name, about = "held", {}

    def __init__(self):
        self.begun, self.may = threading.Event(), threading.Event()

    def draw(self, asked, evaluations, say):
        say("drawing")
        self.begun.set()
        assert self.may.wait(60)
        say("drawing still")
        return networks.Drawn(np.zeros((1, 2, 2, 1), np.float32), [networks.album.Page("x", {})],
                              0.1, evaluations)

    def strip(self, asked, fake, say):
        raise NotImplementedError


def test_wishes_wait_and_one_whose_browser_left_gives_way(capsys):
    held = Held()
    studio = Studio([held, held])

    async def two_browsers():
        first, second = studio.events(wish(evaluations=[1, 2])), studio.events(wish())
        assert await anext(first) == {"ahead": 0} and (await anext(first))["state"] == "drawing"
        await asyncio.to_thread(held.begun.wait, 60)
        assert await anext(second) == {"ahead": 0}  # none waits but it
        await first.aclose()
        held.may.set()
        return [event async for event in second]

    *_, drawn = asyncio.run(two_browsers())
    assert drawn["nfe"] == 1
    assert capsys.readouterr().err == "a browser left: the rest of its drawing is dropped\n"


def test_a_port_in_use_gets_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert call(demo, "--checkpoint", "nothing", "--port", port) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"error: 127.0.0.1:{port} cannot be listened at (Address already in use): " \
        "choose another --port, 0 for any free one"


def test_serves_the_page_and_its_drawings_alone(server):
    address, _ = server

    def status(path: str, data: bytes | None = None, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as r:
                return r.status
        except urllib.error.HTTPError as refused:
            return refused.code

    body = json.dumps(ASKED).encode()
    as_json = {"Content-Type": "application/json"}
    assert status("/") == 200 and status("/draw", body, **as_json) == 200
    assert status("/draw", body, **{"Content-Type": "text/plain"}) == 415  # as other sites can send
    assert status("/", Host="elsewhere.example") == 400
    for path in ("/config.json", "/../config.json", "//etc/passwd", "/docs", "/openapi.json"):
        assert status(path) == 404
    with urllib.request.urlopen(address) as page:
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert not re.search(rb"https?://", page.read())  # it asks for nothing from elsewhere


@pytest.mark.skipif(not BROWSER, reason="no chromium here: apt-get install chromium")
def test_in_a_browser(server):
    """Draws at once, another seed draws others, a bad one gets a sentence, and one that left in the
    middle leaves a page that draws."""
    playwright = pytest.importorskip("playwright.sync_api")
    address, process = server
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, asked, failed = browser.new_page(), [], []
        page.on("request", lambda one: asked.append(one.url))
        page.on("pageerror", lambda error: failed.append(error))
        state = page.locator("#state")
        page.goto(address)
        state.filter(has_text="done in").wait_for()
        assert page.locator("section").count() == 4  # pictures and trajectories of two checkpoints
        assert page.locator(".tile a").count() == 2 * 4 * 4
        assert page.locator(".strip img").count() == 3 * 9
        link = page.locator(".tile a").first
        before = link.get_attribute("href")
        with page.expect_download() as saved:
            link.click()
        name = re.fullmatch(r"class3_0000_twin_1nfe_seed0_[0-9a-f]{8}\.png",
                            saved.value.suggested_filename)
        assert name and "ms a picture" in page.locator("figcaption").first.inner_text()
        page.locator("#another").click()
        state.filter(has_text="done in").wait_for()
        assert link.get_attribute("href") != before
        page.locator("#seed").fill("seven")
        page.locator("#draw").click()
        page.locator("#mistake").filter(has_text="the seed is 'seven'; give a whole").wait_for()
        page.locator("#seed").fill("0")
        page.locator("label", has_text="32").click()  # other programs, which compile
        page.locator("small", has_text="compiling").first.wait_for()
        page.close()
        assert not failed and all(url.startswith((address, "data:")) for url in asked)
        page = browser.new_page()
        page.goto(address)
        page.locator("#state").filter(has_text="done in").wait_for()
        assert page.locator(".tile a").first.get_attribute("href") == before
        browser.close()
    assert process.poll() is None
