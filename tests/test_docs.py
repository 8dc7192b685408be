"""The documentation as a site: built without a warning, asking for nothing from elsewhere."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a link, an anchor, a page or a name that is not there ends the build."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)], cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = re.findall(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="?(https?:[^" >]*)',
                             page.read_text())
        assert not fetched, page


@pytest.mark.skipif(not BROWSER, reason="no chromium here: apt-get install chromium")
def test_the_search_works_in_pages_that_were_opened_from_a_folder(site):
    """Browsers start no worker there: javascripts/iframe-worker.js stands in for it."""
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"file://{site}/families/sana.html?q=time_text_embed_2")
        found = page.locator(".md-search-result__item a[href*='adapters.html']").first
        found.wait_for(state="attached", timeout=120_000)
        browser.close()


def test_every_public_name_has_its_docstring_there(site):
    listed = re.findall(r"^\| `(twinflow_jax[\w.]+)` \|", (ROOT / "docs/api.md").read_text(), re.M)
    page = (site / "reference.html").read_text()
    assert set(re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(), re.M)) == set(
        listed
    )
    for name in listed:  # where it is defined, which may be deeper
        assert re.search(rf'id="(?:{re.escape(name)})"', page), name


def test_what_others_say_of_pages_is_there(site):
    """Files and anchors that the README, messages, configs and scripts name."""
    text = (ROOT / "README.md").read_text()
    for folder in ("twinflow_jax", "configs", "launch", "benchmarks", "notebooks"):
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file()]
        text += "".join(f.read_text() for f in files if f.suffix in (".py", ".sh", ".ipynb"))
    named = set(re.findall(r"docs/([\w/]+)\.md(?:#([\w-]+))?", text))
    assert ("benchmarks", "objectives-against-each-other") in named
    for page, anchor in named:
        built = (site / f"{page}.html").read_text()
        assert not anchor or f'id="{anchor}"' in built, (page, anchor)
