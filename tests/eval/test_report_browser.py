"""The page in a real browser, headless: no console message, nothing wider than the window, and it prints.

Skipped where no Chromium or Chrome is installed (`apt-get install chromium`).
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from dense2sparse.eval.report import write_report

MADE_UP = runpy.run_path(str(Path(__file__).with_name("report_run.py")))
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"
)
MEASURE = (
    "<script>document.title = [document.documentElement.scrollWidth, innerWidth,"
    "document.querySelectorAll('svg').length,"
    "[...document.querySelectorAll('.scroll')].filter(x => x.scrollWidth > x.clientWidth + 1).length,"
    "getComputedStyle(document.body).backgroundColor].join()"
    "</script></body>"
)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = MADE_UP["write"](tmp_path_factory.mktemp("browser"), samples=6)
    return write_report(folder)["html"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """All of RULER's tasks at six lengths."""
    folder = tmp_path_factory.mktemp("large")
    return write_report(MADE_UP["write"](folder, samples=2, **MADE_UP["LARGE"]))["html"]


@pytest.fixture()
def browse(tmp_path):
    """Runs the browser on a file; returns its standard output and its console messages."""

    def run(page, *options):
        assert BROWSER is not None
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking"]
        command = [BROWSER, *flags, *options, page.as_uri()]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={**os.environ, "HOME": str(tmp_path)},
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


def measured(browse, tmp_path, html, *options):
    """Widths of page and window, numbers of charts and of cut tables, background, console messages."""
    page = tmp_path / "measured.html"
    page.write_text(html.read_text(encoding="utf-8").replace("</body>", MEASURE), encoding="utf-8")
    dom, messages = browse(page, "--dump-dom", *options)
    title = re.search(r"<title>(\d+),(\d+),(\d+),(\d+),(.*?)</title>", dom)
    assert title, "the page did not load"
    return *map(int, title.groups()[:4]), title[5], messages


@pytest.mark.parametrize("width", [1180, 520])
def test_page_renders_without_console_messages_at_any_width(browse, tmp_path, html, width):
    wide, window, charts, _, _, messages = measured(
        browse, tmp_path, html, f"--window-size={width},900"
    )
    assert messages == []
    assert wide <= window, "something is wider than the window"
    assert charts >= 10


def test_no_table_of_a_large_report_has_to_be_scrolled_on_a_desk(browse, tmp_path, large):
    wide, window, _, cut, _, messages = measured(browse, tmp_path, large, "--window-size=1180,900")
    assert (messages, cut) == ([], 0) and wide <= window


def test_broken_chart_would_be_noticed(browse, tmp_path):
    page = tmp_path / "broken.html"
    page.write_text('<svg><circle cx="nan" r="3"/></svg><p>here</p>', encoding="utf-8")
    dom, messages = browse(page, "--dump-dom")
    assert "here" in dom and messages


def test_page_follows_the_dark_scheme(browse, tmp_path, html):
    light = measured(browse, tmp_path, html)[4]
    dark = measured(browse, tmp_path, html, "--blink-settings=preferredColorScheme=0")[4]
    assert {light, dark} == {"rgb(251, 250, 247)", "rgb(20, 23, 26)"}


def test_page_prints(browse, tmp_path, html):
    target = tmp_path / "report.pdf"
    browse(html, f"--print-to-pdf={target}", "--no-pdf-header-footer")
    content = target.read_bytes()
    assert content.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", content)) > 2
