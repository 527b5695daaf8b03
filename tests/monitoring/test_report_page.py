"""`report.html`: every run in every plot, to be picked; by what is in the file, and by what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_report import DOWNPOUR, GOSSIP, write_run

from lightning_gossip.__main__ import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

LOSING = {**GOSSIP, "gossip/lost": [(10, 0.0), (15, 1.0), (20, 1.0)], "gossip/joined": [(10, 0.0), (20, 1.0)]}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Return a page of two runs, of which the first has lost a rank that came back, and the second has an odd name."""
    write_run(tmp_path / "logs" / "version_0", [GOSSIP, LOSING])
    write_run(tmp_path / "logs" / "version_1 <script>alert(1)<!--", [DOWNPOUR])
    assert main(["report", str(tmp_path / "logs"), "--out", str(tmp_path)]) == 0
    return tmp_path / "report.html"


def figures(page: Path) -> list[dict[str, Any]]:
    [found] = re.findall(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    parsed: list[dict[str, Any]] = json.loads(found)
    return parsed


def named(figure: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [trace for trace in figure["data"] if name in trace.get("name", "")]


def test_curves_bands_and_events_are_those_of_the_runs(page: Path) -> None:
    accuracy = figures(page)[0]
    [mean] = named(accuracy, "version_0")[:1]
    assert (mean["y"], mean["meta"]["step"], mean["meta"]["seconds"]) == ([50, 75], [10, 20], [10, 20])
    assert mean["meta"]["run"] == 0
    assert sum(trace.get("fill") == "tonexty" for trace in accuracy["data"]) == 1, "one rank has no band"
    [consensus] = named(accuracy, "consensus model")
    assert consensus["y"] == pytest.approx([60, 80])
    assert [trace["meta"]["step"] for trace in named(accuracy, "a rank is lost")] == [[15, 15, None]]
    assert [trace["meta"]["step"] for trace in named(accuracy, "a rank joins")] == [[20, 20, None]]


@pytest.mark.long
def test_what_is_0_has_no_place_on_a_logarithmic_axis(page: Path) -> None:
    [distance] = [f for f in figures(page) if f["layout"]["yaxis"]["title"]["text"].startswith("Consensus distance")]
    assert distance["layout"]["yaxis"]["type"] == "log"
    [mean] = named(distance, "version_0")[:1]
    assert (mean["y"], mean["meta"]["step"]) == ([pytest.approx(0.01)], [20])


@pytest.mark.long
def test_the_page_needs_no_other_file_and_runs_no_name(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<(script|link|img)[^>]*\b(src|href)=", text)
    assert "<script>alert" not in text
    assert "version_1 &lt;script&gt;alert(1)&lt;!--" in text


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.slow
def test_a_browser_draws_it_and_hides_the_run_that_is_not_picked(page: Path, tmp_path: Path) -> None:
    probe = """
    <script>  // `plots` is the page's
    const lines = () => plots.map(plot => plot.querySelectorAll("path.js-line").length);
    const title = () => document.querySelector(".plot .xtitle").textContent;
    setTimeout(() => {
      const first = [lines(), title()];
      document.getElementById("run0").click();
      document.querySelector("input[value=seconds]").click();
      setTimeout(() => {
        const seen = document.createElement("pre");
        seen.textContent = JSON.stringify([first, [lines(), title()]]);
        document.body.replaceChildren(seen);
      }, 500);
    }, 1500);
    </script>"""
    copy = tmp_path / "probed.html"
    copy.write_text(page.read_text().replace("</body>", probe + "</body>"))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    seen = subprocess.run(
        [*command, "--virtual-time-budget=6000", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    [found] = re.findall(r"<pre>(.*?)</pre>", seen.stdout)
    (before, steps), (after, seconds) = json.loads(found)
    assert (steps, seconds) == ("Updates of each replica", "Wall time (s)")
    assert len(before) == len(figures(page))
    assert all(before)
    assert before[0] > after[0] > 0, "the other run is there still"
    only_gossip = [n for n, figure in enumerate(figures(page)) if {t["meta"]["run"] for t in figure["data"]} == {0}]
    assert [after[n] for n in only_gossip] == [0] * len(only_gossip)
