"""The documentation as a site: what `make docs` makes of docs/ and README.md, and what it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command of `make docs`."""
    (words,) = re.findall(r"/mkdocs (build .*)", (REPOSITORY / "Makefile").read_text())
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", *words.split()]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for name in ("benchmarks", "docs", "examples", "research", "scripts", "emim_solo"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    return tmp_path


def test_a_new_page_is_in_the_navigation_and_links_lead_to_files_of_the_repository(sources: Path) -> None:
    (sources / "docs" / "new.md").write_text("# Quite new\n\n[the laboratory](../research/lab.py)\n")
    done = build(sources)
    assert done.returncode == 0, done.stderr
    site = sources / "build" / "site"
    start = (site / "index.html").read_text()
    assert re.search(r'href="new\.html"[^>]*>\s*<span[^>]*>\s*Quite new', start), "in the navigation of every page"
    assert 'href="research/lab.py"' in (site / "new.html").read_text()
    assert (site / "research" / "lab.py").read_bytes() == (REPOSITORY / "research" / "lab.py").read_bytes()
    for picture in re.findall(r"!\[[^\]]*\]\(docs/([^)]+)\)", (REPOSITORY / "README.md").read_text()):
        assert f'src="{picture}"' in start and (site / picture).is_file()
        assert f'href="{picture}"' in start, "on a phone it is read by opening it"
    assert 'id="emim_solo.emim.objective.emim_loss_func"' in (site / "api.html").read_text()
    loaded = {
        address
        for page in site.glob("*.html")
        for address in re.findall(r'(?:src|<link[^>]* href)="(https?:[^"]*)', page.read_text())
    }
    assert loaded == set(), "nothing is loaded from elsewhere"


def test_a_link_that_leads_nowhere_is_an_error(sources: Path) -> None:
    for name, link in (("theory", "nowhere.md"), ("images", "../research/nowhere.py"), ("cite", "theory.md#nowhere")):
        with (sources / "docs" / f"{name}.md").open("a") as page:
            page.write(f"\n[x]({link})\n")
    with (sources / "README.md").open("a") as page:
        page.write("\n[x](docs/nowhere-else.md)\n")
    done = build(sources)
    assert done.returncode != 0
    for link in ("'nowhere.md'", "'research/nowhere.py'", "'theory.md#nowhere'", "'nowhere-else.md'"):
        assert link in done.stderr
