"""What is published: sdist and wheel as `make dist` builds them, what they say of themselves, and the release workflow."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from emim_solo import __version__
from emim_solo.suite import load_suite

REPOSITORY = Path(__file__).resolve().parent.parent
WORKFLOWS = REPOSITORY / ".github" / "workflows"
RELATIVE = re.compile(r'(?:\]\(|(?:src|href)=")(?!https?:|#)([^)"#]*)')  # of links and pictures, Markdown's and HTML's


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a command printed; its failing fails the test."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of the checkout, and the wheel that is built of it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY, cwd=folder)
    assert {path.name for path in folder.iterdir()} == {
        f"emim_solo-{__version__}.tar.gz",
        f"emim_solo-{__version__}-py3-none-any.whl",
    }
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_twine_finds_nothing_to_say(dist: Path) -> None:
    said = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist, NO_COLOR="1")
    assert said.count("PASSED") == 2
    assert "make dist" in (REPOSITORY / "Makefile").read_text()


def test_the_wheel_holds_the_package_and_its_configs_and_the_sdist_what_tests_it(dist: Path, wheel: Path) -> None:
    def files(folder: str) -> set[str]:
        found = (path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / folder).rglob("*") if path.is_file())
        return {name for name in found if not name.endswith(".pyc")}

    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files("emim_solo") | files("hydra_plugins") | {f"emim_solo/{name}" for name in files("scripts")}
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert files("tests") | files("docs") | files("examples") | {"CITATION.cff", "mkdocs.yml", "Makefile"} <= packed
    assert not [name for name in packed if name.startswith((".venv", "build", "dist", "runs", "datasets"))]


def test_readme_leads_nowhere_but_to_addresses_on_a_package_index(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"emim_solo-{__version__}.dist-info/METADATA"))
    text = str(metadata.get_payload())
    readme = (REPOSITORY / "README.md").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert RELATIVE.search(readme), "there is something to leave out"
    assert RELATIVE.findall(text) == []
    assert set(re.findall(r"https?://[^)\s]+", text)) == set(re.findall(r"https?://[^)\s]+", readme))
    for words, target in re.findall(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", readme):
        assert words in text or target in text, "the words of a link stay"
    assert len(text) > 0.8 * len(readme)


def test_the_release_has_readmes_links_lead_to_files_that_are_there(tmp_path: Path) -> None:
    """The step of the workflow, run on a copy."""
    steps = yaml.safe_load((WORKFLOWS / "release.yml").read_text())["jobs"]["build"]["steps"]
    (step,) = (step for step in steps if "README" in step.get("name", ""))
    readme = tmp_path / "README.md"
    more = '\n<img src="docs/images/report.png"> [a\nb](LICENSE) ![c](https://x.org/d.png) [here](#the-objective)\n'
    readme.write_text((REPOSITORY / "README.md").read_text() + more)
    before = RELATIVE.findall(readme.read_text())
    run("bash", "-e", "-c", step["run"], cwd=tmp_path, FILES="https://host/owner/name", GITHUB_REF_NAME="v9")
    text = readme.read_text()
    assert RELATIVE.findall(text) == []
    led = re.findall(r"https://host/owner/name/(raw|blob)/v9/([^)\"#]*)", text)
    assert sorted(target for _, target in led) == sorted(before)
    assert all((REPOSITORY / target).exists() for _, target in led)
    assert {kind for kind, target in led if target.endswith(".png")} == {"raw"}
    assert "](https://x.org/d.png)" in text and "](#the-objective)" in text


def test_the_wheel_works_where_the_checkout_is_not(wheel: Path, few_digits: Path, tmp_path: Path) -> None:
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", tmp_path / "site")
    run(sys.executable, *pip, wheel, cwd=tmp_path)
    others = [entry for entry in sys.path if entry and Path(entry).resolve() != REPOSITORY]
    path = os.pathsep.join([str(tmp_path / "site"), *others])
    command = tmp_path / "site" / "bin" / "emim-solo"
    assert run(command, "configs", "pretrain/digits", cwd=tmp_path, PYTHONPATH=path).startswith(str(tmp_path / "site"))
    run(
        *(command, "pretrain", "--config-path", "pretrain/digits", "--config-name", "emim", "max_epochs=1"),
        *("method_kwargs.proj_hidden_dim=32", "optimizer.batch_size=32", "data.num_workers=0", "accelerator=cpu"),
        *(f"data.train_path={few_digits / 'train'}", f"data.val_path={few_digits / 'val'}"),
        cwd=tmp_path,
        PYTHONPATH=path,
        OMP_NUM_THREADS="1",
    )
    assert (tmp_path / "trained_models" / "rows.jsonl").is_file()


def test_solo_learn_main_installs_as_readme_says(tmp_path: Path) -> None:
    load_suite()
    import solo

    assert solo.__file__ is not None
    clone = Path(solo.__file__).resolve().parent.parent
    if not (clone / "main_pretrain.py").is_file():
        pytest.skip("in a clone of solo-learn main only: make test-main SOLO=<clone>")
    copy = shutil.copytree(clone, tmp_path / "clone", ignore=shutil.ignore_patterns(".git"))
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps")
    run(sys.executable, *pip, "--target", tmp_path / "site", ".", cwd=copy)
    assert (tmp_path / "site" / "solo" / "methods" / "base.py").is_file()


def test_the_version_is_one() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"version = {{{__version__}}}" in (REPOSITORY / "docs" / "cite.md").read_text()
    first = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None and first[1] == __version__


def test_the_paper_is_the_same_wherever_it_is_cited() -> None:
    (paper,) = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["references"]
    bibtex = (REPOSITORY / "docs" / "cite.md").read_text()
    assert f"{{{paper['title']}}}" in bibtex and f"{{{paper['year']}}}" in bibtex
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert names in bibtex
    for page in (bibtex, (REPOSITORY / "README.md").read_text(), paper["url"]):
        assert "2409.04747" in page


def test_every_python_that_is_said_to_work_is_tested(wheel: Path) -> None:
    matrix = yaml.safe_load((WORKFLOWS / "test.yml").read_text())["jobs"]["test"]["strategy"]["matrix"]
    tested = {*matrix["python"], *(job["python"] for job in matrix["include"])}
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"emim_solo-{__version__}.dist-info/METADATA").decode()
    assert set(re.findall(r"Python :: (3\.\d+)", metadata)) == tested
    lowest = re.search(r"^Requires-Python: >=(.*)$", metadata, re.MULTILINE)
    assert lowest is not None and lowest[1] == min(tested, key=lambda version: int(version[2:]))
