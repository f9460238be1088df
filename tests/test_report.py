"""The report: its numbers against the rows, and the page itself in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images

from emim_solo.evaluation.thumbnails import QUALITY
from emim_solo.ground import compare
from emim_solo.ground.errors import UsageError
from emim_solo.report import charts
from emim_solo.report import page as report
from emim_solo.results import rows
from emim_solo.results import tables as results
from emim_solo.results.curves import read_curves

sys.path.insert(
    0, str(Path(__file__).parent)
)  # importlib mode, which the suite's own package `tests` asks for, does not
from benchmark_folder import METHODS, config, write_files, write_rows
from browser import EXECUTABLE, Page

STAGE_OF = {
    "linear": ("linear", "acc1"),
    "logistic": ("logistic", "backbone_acc1"),
    "knn": ("knn", "backbone_cosine_k20"),
    "score": ("score", "view_information"),
    "rank": ("diagnostics", "backbone_rankme"),
    "loss_share": ("diagnostics", "loss_share"),
}


def from_rows(folder: Path, name: str, key: str) -> list[float]:
    """A metric's values by seed, straight from the file, by other means than the package's."""
    stage, metric = STAGE_OF[key]
    lines = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    return [row["metrics"][metric] for row in lines if (row["name"], row["stage"]) == (name, stage)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_files(write_rows(tmp_path_factory.mktemp("digits"), broken="vicreg", collapsed="barlow_twins"))
    report.write_report(folder)
    return folder


# -- tables ------------------------------------------------------------------------------------------------------


def test_cells_are_mean_and_t_interval_of_the_rows(folder):
    table = results.headline(results.collect(rows.read(folder / "rows.jsonl")))
    for name, cells in table.lines:
        for key, cell in zip(table.keys, cells, strict=True):
            if key not in STAGE_OF:
                continue
            values = [value for value in from_rows(folder, name, key) if math.isfinite(value)]
            low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
            assert cell.text == f"{np.mean(values):.1f} ± {(high - low) / 2:.1f}"


def test_differences_are_paired_by_seed(folder):
    found = results.collect(rows.read(folder / "rows.jsonl"))
    table = results.differences(found)
    assert [name for name, _ in table.lines] == ["emim − barlow_twins", "emim − vicreg"]
    cell = dict(table.lines)["emim − barlow_twins"][table.keys.index("linear")]
    low, high = stats.ttest_rel(
        *(from_rows(folder, name, "linear") for name in ("emim", "barlow_twins"))
    ).confidence_interval()
    assert cell.estimate.interval == pytest.approx((low, high))
    assert dict(table.lines)["emim − vicreg"][table.keys.index("linear")].estimate.n == 2, "one seed of vicreg is NaN"
    shown = f"{(low + high) / 2:+.1f} ± {(high - low) / 2:.1f}".replace("-", "−")
    assert f"| emim − barlow_twins | 3 | {shown} |" in (folder / "differences.md").read_text()
    latex = shown.replace("±", r"$\pm$").replace("−", "$-$")
    assert rf"emim $-$ barlow\_twins & 3 & {latex} &" in (folder / "differences.tex").read_text()


def test_one_seed_prints_no_interval(tmp_path):
    written = report.write_report(write_rows(tmp_path, seeds=1))
    assert "±" not in written.markdown.read_text()
    assert "One seed" in written.markdown.read_text()


def test_flags_of_collapsed_and_nan_runs_are_in_every_form_of_the_table(folder):
    for path in ("table.md", "table.tex", "report.html"):
        text = (folder / path).read_text()
        assert "1 NaN" in text
        assert "barlow_twins: collapsed with seed 1" in text
    assert "collapsed 1/3" in (folder / "report.html").read_text()


def test_a_cell_of_fewer_seeds_than_its_line_says_so(folder, tmp_path):
    for row in rows.read(folder / "rows.jsonl"):
        if (row["name"], row["seed"], row["stage"]) != ("barlow_twins", 2, "linear"):
            rows.append(tmp_path / "rows.jsonl", row)
    written = report.write_report(tmp_path)
    tables = results.headline(written.results), results.differences(written.results)
    for table, name in zip(tables, ("barlow_twins", "emim − barlow_twins"), strict=True):
        cells = dict(zip(table.keys, dict(table.lines)[name], strict=True))
        assert str(cells["n"]) == "3" and cells["linear"].estimate.n == 2
        assert str(cells["linear"]).endswith(" (n = 2)")
        assert "(" not in str(cells["knn"])
    assert '<span class="nan">n = 2</span>' in written.html.read_text()
    assert "n = " not in (folder / "differences.md").read_text()


def test_nan_in_every_seed_is_a_flagged_cell(tmp_path):
    write_rows(tmp_path, seeds=1, broken="vicreg")
    text = report.write_report(tmp_path).markdown.read_text()
    assert re.search(r"\| vicreg \| 1 \| NaN \|", text)


def test_deviation_from_equal_terms_is_printed(tmp_path):
    write_rows(tmp_path, seeds=1)
    own = config("slow", 0, method="vicreg", max_epochs=10)
    row = rows.new_row(
        "pretrain", config=own, suite={"generation": "main", "version": "1.0.6"}, device="cpu", epochs=10, seconds=1.0,
        checkpoint=None, metrics={},
    )  # fmt: skip
    rows.append(tmp_path / "rows.jsonl", row | {"config": own})
    written = report.write_report(tmp_path)
    for path in (written.markdown, written.latex, written.html):
        assert "slow deviates from equal terms: max_epochs 10 (others 20)" in path.read_text()
    assert "Not finished: slow seed 0" in written.markdown.read_text()
    assert "Equal terms: same" not in written.markdown.read_text()


def test_the_score_stands_beside_the_accuracy(folder):
    scored = charts.scored_runs(results.collect(rows.read(folder / "rows.jsonl")))
    assert len(scored) == 8, "nine runs, one with NaN"
    ours = from_rows(folder, "emim", "score"), from_rows(folder, "emim", "linear"), from_rows(folder, "emim", "knn")
    assert [run[1:] for run in scored if run[0] == "emim"] == [
        pytest.approx((score, 0.3, (linear + knn) / 2)) for score, linear, knn in zip(*ours, strict=True)
    ]
    ranks = [stats.rankdata([run[i] for run in scored]) for i in (1, 3)]
    rho = f"{np.corrcoef(*ranks)[0, 1]:.2f} over 8 runs"
    assert rho in (folder / "report.html").read_text()
    assert charts.rank_correlation([("a", 1.0, 0.1, 90.0 - i) for i in range(5)]) == "", "all scores are one"
    assert "−1.00" in charts.rank_correlation([("a", float(i), 0.1, 90.0 - i) for i in range(5)])


def test_scores_of_two_protocols_are_named(tmp_path):
    write_rows(tmp_path, seeds=2)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if '"stage": "score"' in line)
    lines[last] = lines[last].replace('"protocol": "abc"', '"protocol": "xyz"')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    assert any(
        "different protocols" in note.text
        for note in results.notes(results.collect(rows.read(tmp_path / "rows.jsonl")))
    )


def test_latex_escapes_and_markdown_lines_up(folder):
    latex, markdown = (folder / "table.tex").read_text(), (folder / "table.md").read_text()
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[%_#]", "\n".join(body))
    assert r"barlow\_twins & 3 & " in latex and r"$\pm$" in latex
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    best = max(METHODS, key=lambda name: np.nanmean(from_rows(folder, name, "linear")))
    assert re.search(rf"\| {best} \| 3 \| \*\*", markdown)


def test_newer_rows_replace_older_ones_and_other_configs(tmp_path):
    write_rows(tmp_path, seeds=1)
    row = next(row for row in rows.read(tmp_path / "rows.jsonl") if (row["name"], row["stage"]) == ("emim", "linear"))
    rows.append(tmp_path / "rows.jsonl", row | {"metrics": {"acc1": 50.0}})
    rows.append(tmp_path / "rows.jsonl", row | {"metrics": {"acc1": 10.0}, "config_hash": "of another run"})
    found = results.collect(rows.read(tmp_path / "rows.jsonl"))
    assert found.values("emim", results.HEADLINE[0]) == {0: 50.0}


def test_rows_that_are_not_of_one_kind_are_warned_of(tmp_path):
    write_rows(tmp_path, seeds=2)
    for row in rows.read(tmp_path / "rows.jsonl"):
        if (row["name"], row["stage"], row["seed"]) == ("vicreg", "knn", 1):
            rows.append(tmp_path / "rows.jsonl", row | {"settings": {"views": 8}})
        if (row["name"], row["seed"]) == ("emim", 1):
            longer = config("emim", 1, max_epochs=50)
            own = {"config": longer} if row["stage"] == "pretrain" else {}
            rows.append(tmp_path / "rows.jsonl", row | own | {"config_hash": compare.config_hash(longer)})
    text = report.write_report(tmp_path).markdown.read_text()
    assert "knn: evaluations with different settings" in text
    assert "emim: seeds of different configs, max_epochs (50 there, 20 here)" in text
    assert "linear: evaluations" not in text and "vicreg: seeds" not in text


def test_curves_of_a_resumed_run_are_joined(tmp_path):
    (tmp_path / "metrics.0.csv").write_text("epoch,step,val_acc1\n0,1,10\n1,2,20\n2,3,29\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,val_acc1,train_mi\n2,3,30,\n2,3,,5\n3,4,40,6\n4")
    assert read_curves(tmp_path) == {"val_acc1": {1: 10, 2: 20, 3: 30, 4: 40}, "train_mi": {3: 5, 4: 6}}
    assert read_curves(tmp_path / "absent") == {}


# -- bad input ---------------------------------------------------------------------------------------------------


def test_no_folder_no_rows_no_finished_run(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        report.write_report(tmp_path / "absent")
    with pytest.raises(UsageError, match="no results"):
        report.write_report(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UsageError, match="no finished run"):
        report.write_report(tmp_path)


def test_rows_of_different_datasets(tmp_path):
    write_rows(tmp_path, seeds=1)
    lines = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(lines + lines.replace('"custom"', '"cifar10"').replace('"emim"', '"other"'))
    with pytest.raises(UsageError, match="different datasets are mixed: cifar10, digits"):
        report.write_report(tmp_path)


def test_row_of_an_older_schema(tmp_path, refused):
    write_rows(tmp_path, seeds=1)
    rows.append(tmp_path / "rows.jsonl", {"schema": 0, "stage": "pretrain"})
    with refused("rows.schema", "schema 0"):
        report.write_report(tmp_path)


def test_line_cut_short_by_a_kill_is_passed_over(folder, tmp_path):
    whole = (folder / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(whole + whole.splitlines()[0][:100])
    assert report.write_report(tmp_path).markdown.read_text() == (folder / "table.md").read_text()


def test_rows_alone_make_a_report(tmp_path):
    assert report.write_report(write_rows(tmp_path, seeds=2)).html.stat().st_size > 10_000


def test_one_method_alone_makes_a_report(tmp_path):
    text = report.write_report(write_rows(tmp_path, methods={"emim": METHODS["emim"]})).html.read_text()
    assert "Paired differences" not in text


ODD_METHODS = dict(zip(("$emim$", "<b>&\"'^_$x$", "$emim$ null"), METHODS.values(), strict=True))


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> Path:
    """Methods and classes with names that mean something to matplotlib, HTML, SVG or Markdown; no labels and no
    thumbnails in one split."""
    folder = tmp_path_factory.mktemp("odd")
    write_files(write_rows(folder, seeds=2, methods=ODD_METHODS), seeds=2, methods=ODD_METHODS)
    for split, change in (
        ("val", {"classes": [*"01234567", '</script><b>&"', "$x^2$"]}),
        ("train", {"classes": [], "labels": [-1] * 120}),
    ):
        path = folder / "umap" / f"{split}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (folder / "umap" / "train.webp").unlink()
    report.write_report(folder)
    return folder


def test_names_are_text_in_every_chart(odd_folder):
    found = re.findall(r"<svg.*?</svg>", (odd_folder / "report.html").read_text(), flags=re.DOTALL)
    assert len(found) >= 7
    charts_with = Counter()
    for svg in found:
        texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        shown = {"".join(text.itertext()).strip() for text in texts}
        charts_with.update(name for name in ODD_METHODS if name in shown)
    assert charts_with.keys() == ODD_METHODS.keys() and min(charts_with.values()) >= len(found) - 3
    powers = [text for svg in found for text in re.findall(r">(10[⁻⁰¹²³]+)<", svg)]
    assert {"10⁰", "10¹", "10²"} <= set(powers)


def test_stand_ins_for_colours_are_replaced_in_tags_only():
    svg = charts.draw("chart", 'a "title"', lambda axes: axes.set_title('#020201 id="x" url(#a)', color="#020201"))
    assert '#020201 id="x" url(#a)</text>' in svg and "var(--method-1)" in svg
    assert "a &#34;title&#34;" in svg


def test_odd_names_keep_the_columns_of_markdown(tmp_path):
    methods = {"a|b": METHODS["emim"], "$5$": METHODS["vicreg"]}
    text = report.write_report(write_rows(tmp_path, seeds=1, methods=methods)).markdown.read_text()
    assert r"| a\|b |" in text and r"| \$5\$ |" in text


# -- the page ----------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2.1), 1 to 21."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_from_their_ground():
    for light, dark in charts.METHOD_COLOURS:
        assert contrast(light, "#ffffff") > 4.5 and contrast(dark, "#1b1f23") > 4.5
    for _, dark in report.class_colours():
        assert contrast(dark, "#1b1f23") >= 3


def test_contrast_of_known_pairs():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_a_report_of_imagenet_and_twenty_methods_is_small_and_its_labels_stand_apart(tmp_path):
    methods = {f"method_{i}": (60.0 + i % 3, 20.0, 5.0) for i in range(20)}
    write_files(write_rows(tmp_path, seeds=3, methods=methods), seeds=3, images=2000, classes=1000, methods=methods)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    sheet, rng = Image.new("RGB", (45 * 32, 45 * 32)), np.random.default_rng(0)
    for i in range(2000):  # tiles of one colour, as they are, take no room
        left, top, side = (int(rng.integers(*span)) for span in ((0, 500), (0, 300), (60, 120)))
        tile = photographs[i % 2].crop((left, top, left + side, top + side)).resize((32, 32))
        sheet.paste(tile, (i % 45 * 32, i // 45 * 32))
    for split in ("val", "train"):
        sheet.save(tmp_path / "umap" / f"{split}.webp", quality=QUALITY)
    page = report.write_report(tmp_path).html.read_text()
    assert len(page.encode()) < 10 * 2**20
    for chart in ("curve-val_acc1", "score", "spectrum-backbone"):
        svg = re.search(rf'<svg(?:(?!</svg>).)*?id="{chart}-figure_1".*?</svg>', page, re.DOTALL)
        names = re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>method_\d+</text>', svg.group())
        heights = sorted(map(float, names))
        assert len(heights) == 20
        assert min(np.diff(heights)) > 9, "points, the size of the letters"


def test_a_report_is_made_without_loading_torch():
    """It takes seconds, and a report has no use for it."""
    program = "import sys, emim_solo.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_page_holds_everything_itself(folder):
    text = (folder / "report.html").read_text()
    namespaces = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert set(re.findall(r"https?://[\w./]+", text)) <= set(namespaces)
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)", text)
    identifiers = re.findall(r'\sid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    if EXECUTABLE is None:
        pytest.skip("no Chromium or Chrome here: install Debian's package 'chromium' to open the report in a browser")
    pytest.importorskip("websocket", reason="websocket-client (extra 'test') drives the browser")
    page = Page(tmp_path_factory.mktemp("browser"))
    page.resize(1280, 900)
    page.dark(False)
    page.open(folder / "report.html")
    yield page
    page.close()


@pytest.fixture(autouse=True)
def desktop(request):
    """Each test of the page starts from the same place."""
    if "page" in request.fixturenames:
        page = request.getfixturevalue("page")
        page.resize(1280, 900)
        page.dark(False)
        page.evaluate("document.activeElement.blur()")
        page.move(1, 1)


def keep(page: Page, tmp_path: Path, name: str, **how: bool) -> None:
    """A screenshot, for people: in $EMIM_SOLO_SCREENSHOTS if that is set."""
    place = Path(os.environ.get("EMIM_SOLO_SCREENSHOTS") or tmp_path)
    place.mkdir(parents=True, exist_ok=True)
    page.screenshot(place / f"{name}.png", **how)


def place_of(page: Page, panel: int, image: int) -> tuple[float, float]:
    """Where on the screen an image's point is, worked out from the embedded data."""
    data = page.evaluate("JSON.parse(document.getElementById('umap-data').textContent)")
    panels = data["splits"]["val"]["panels"]
    everything = np.concatenate([np.array(own["points"]) for own in panels])
    low, high = everything.min(axis=0), everything.max(axis=0)
    side = 1.1 * (high - low).max()
    x, y = (np.array(panels[panel]["points"][image]) - (low + high) / 2) / side + 0.5
    page.evaluate(f"document.querySelectorAll('.stage')[{panel}].scrollIntoView({{block: 'center'}})")
    box = page.evaluate(f"document.querySelectorAll('.stage')[{panel}].getBoundingClientRect().toJSON()")
    return box["x"] + x * box["width"], box["y"] + (1 - y) * box["height"]


ACTIVE = "[...document.querySelectorAll('.stage')].map(stage => stage.dataset.active ?? null)"


def test_page_opens_without_an_error_or_a_request(page, tmp_path):
    keep(page, tmp_path, "desktop")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    keep(page, tmp_path, "desktop-open")
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = false)")
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "about:"))] == []


def test_values_on_the_page_equal_the_rows(page, folder):
    cells = page.evaluate(
        "[...document.querySelectorAll('#headline td[data-value]')].map(cell => ({...cell.dataset, text: cell.innerText}))"
    )
    seen = defaultdict(set)
    for cell in cells:
        if cell["metric"] in STAGE_OF:
            values = np.array(from_rows(folder, cell["name"], cell["metric"]))
            assert float(cell["value"]) == pytest.approx(np.nanmean(values))
            assert int(cell["n"]) == np.isfinite(values).sum()
            assert cell["text"].startswith(f"{np.nanmean(values):.1f}")
            seen[cell["name"]].add(cell["metric"])
    assert seen == {method: set(STAGE_OF) for method in METHODS}


def test_hovering_shows_the_image_and_marks_it_in_every_panel(page, tmp_path):
    page.move(*place_of(page, panel=1, image=37))
    assert page.evaluate(ACTIVE) == ["37", "37", "37"]
    tip = page.evaluate("document.querySelectorAll('.tip')[1].innerText")
    assert "7" in tip and "image 137" in tip
    hidden = page.evaluate("[...document.querySelectorAll('.tip')].map(tip => tip.hidden)")
    assert hidden == [True, False, True]
    style = page.evaluate("({...document.querySelectorAll('.tip i')[1].style})")
    columns = math.ceil(math.sqrt(120))
    column, row = 37 % columns, 37 // columns
    assert style["backgroundPosition"] == f"{-84 * column}px {-84 * row}px"
    assert style["backgroundImage"].startswith('url("data:image/webp;base64,')
    keep(page, tmp_path, "hover", whole=False)
    page.move(1, 1)
    assert page.evaluate(ACTIVE) == [None, None, None]


def test_arrow_keys_walk_from_image_to_image(page, tmp_path):
    page.evaluate("document.querySelectorAll('.stage')[0].focus({focusVisible: true})")
    start = page.evaluate(ACTIVE)
    assert None not in start
    place = lambda index: page.evaluate(  # noqa: E731
        f"JSON.parse(document.getElementById('umap-data').textContent).splits.val.panels[0].points[{index}]"
    )
    page.press("ArrowRight")
    there = page.evaluate(ACTIVE)
    assert there != start and place(there[0])[0] > place(start[0])[0]
    page.press("ArrowUp")
    above = page.evaluate(ACTIVE)
    assert place(above[0])[1] > place(there[0])[1]
    assert "image" in page.evaluate("document.getElementById('umap-said').textContent")
    keep(page, tmp_path, "keyboard", whole=False)
    page.press("Escape")
    assert page.evaluate(ACTIVE) == [None, None, None]


def test_every_control_is_reached_by_tab(page):
    reached = set()
    for _ in range(60):
        page.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.dataset.copy ?? document.activeElement.dataset.name ?? document.activeElement.tagName"
            )
        )
    assert {"markdown", "latex", *METHODS, "SUMMARY"} <= reached


def test_one_class_can_be_picked_out(page, tmp_path):
    page.click(".legend button:nth-child(3)")
    pressed = "[...document.querySelectorAll('.legend button')].map(button => button.getAttribute('aria-pressed'))"
    assert page.evaluate(pressed).index("true") == 2
    keep(page, tmp_path, "class", whole=False)
    page.click(".legend button:nth-child(3)")
    assert "true" not in page.evaluate(pressed)


def test_training_images_are_one_click_away(page):
    page.click("[data-split=train]")
    assert page.evaluate("document.querySelectorAll('.stage').length") == len(METHODS)
    assert page.evaluate("document.querySelector('[data-split=train]').getAttribute('aria-pressed')") == "true"
    page.click("[data-split=val]")


def test_odd_names_and_images_without_labels(page, odd_folder, folder, tmp_path):
    try:
        page.open(odd_folder / "report.html")
        names = page.evaluate("[...document.querySelectorAll('.panel strong')].map(name => name.innerText)")
        assert names == list(ODD_METHODS)
        legend = "[...document.querySelectorAll('.legend button')].map(name => name.textContent)"
        assert page.evaluate(legend)[-2:] == ['</script><b>&"', "$x^2$"]
        keep(page, tmp_path, "odd-names")
        page.click("[data-split=train]")
        assert page.evaluate(legend) == []
        assert not page.evaluate("document.querySelector('.legend').checkVisibility()")
        assert "silhouette" not in page.evaluate("document.querySelector('.quality').innerText")
        page.evaluate("document.querySelectorAll('.stage')[0].focus({focusVisible: true})")
        assert re.fullmatch(r"image \d+", page.evaluate("document.getElementById('umap-said').textContent"))
        assert re.fullmatch(r"image \d+", page.evaluate("document.querySelector('.tip').innerText").strip())
        assert not page.evaluate("document.querySelector('.tip i').checkVisibility()"), "no picture, no place for one"
        colours = page.evaluate(
            "[...new Uint32Array(document.querySelector('.stage canvas').getContext('2d')"
            ".getImageData(0, 0, 400, 400).data.buffer)].filter(pixel => pixel >>> 24 > 210)"
        )
        assert Counter(colours).most_common(1)[0][1] > len(colours) / 2, "one colour, but for edges and overlaps"
        keep(page, tmp_path, "unlabelled")
        assert page.errors == []
    finally:
        page.open(folder / "report.html")


@pytest.mark.parametrize(("form", "file"), [("latex", "table.tex"), ("markdown", "table.md")])
def test_copying_gives_the_table(page, folder, form, file):
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click(f"[data-copy={form}]")
    page.wait("document.getElementById('copied').textContent !== ''")
    assert page.evaluate("navigator.clipboard.readText()") == (folder / file).read_text()


def test_nothing_is_cut_off_on_a_phone(page, tmp_path):
    page.resize(375, 812, mobile=True)
    page.evaluate("scrollTo(0, 0)")
    keep(page, tmp_path, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    sticking_out = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(part => !part.closest('.scroll, pre, svg, .hidden, .skip, details:not([open])')"
        " && part.getBoundingClientRect().right > 376).map(part => part.outerHTML.slice(0, 80))"
    )
    assert sticking_out == []
    small = page.evaluate(
        "[...document.querySelectorAll('.actions button, .segments button')].filter(b => b.offsetHeight < 44).length"
    )
    assert small == 0, "too small for a thumb"
    text = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))"
    )
    assert text > 8, "text in charts is too small to read"


def test_dark_mode_is_dark_and_legible(page, tmp_path):
    page.dark(True)
    keep(page, tmp_path, "dark")
    pair = page.evaluate("(style => [style.color, style.backgroundColor])(getComputedStyle(document.body))")
    ink, ground = ("#" + "".join(f"{int(c):02x}" for c in re.findall(r"\d+", colour)[:3]) for colour in pair)
    assert contrast(ink, ground) > 10 and contrast(ground, "#000000") < 1.5
    unreadable = page.evaluate("""[...document.querySelectorAll('h2, p, td, th, li, summary, figcaption, svg text')].filter(part => {
        const channels = getComputedStyle(part)[part.closest('svg') ? 'fill' : 'color'].match(/[\\d.]+/g).slice(0, 3).map(Number);
        return Math.max(...channels) < 120;
    }).map(part => part.outerHTML.slice(0, 90))""")
    assert unreadable == []
    page.resize(375, 812, mobile=True)
    keep(page, tmp_path, "phone-dark")
    assert page.errors == []


@pytest.mark.parametrize("name", ["spectra/emim-seed0.json", "umap/val.json", "elsewhere/emim/emim-seed0/metrics.csv"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    write_rows(tmp_path, seeds=1)
    path = tmp_path / name.replace("elsewhere/", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"projector": [1.0, \xff')
    with pytest.raises(UsageError, match=f"{path.name}' is "):
        report.write_report(tmp_path)


def test_barlow_twins_in_several_processes_is_said_to_have_a_share_of_the_gradient(tmp_path):
    write_rows(tmp_path, seeds=1)
    file = tmp_path / "rows.jsonl"
    assert not any("gradient" in note.text for note in results.notes(results.collect(rows.read(file))))
    file.write_text(file.read_text().replace('"devices": [0]', '"devices": [0, 1]'))
    (said,) = [note for note in results.notes(results.collect(rows.read(file))) if "gradient" in note.text]
    assert str(said).startswith("barlow_twins: solo-learn's Barlow Twins has 1/2 of the gradient in 2 processes")


def test_the_terms_of_the_loss_are_drawn_apart(folder):
    found = results.collect(rows.read(folder / "rows.jsonl"))
    curves = {("emim", 0): {"train_entropy": {0: 1.0, 1: 2.0}, "train_residual_entropy": {0: -1.0, 1: -3.0}}}
    svg = charts.learning_curve(found, curves, "train_entropy", "nats", ("train_residual_entropy", "H(Z|Z')"))
    assert ">emim<" in svg
    assert ">emim H(Z|Z')<" in svg
    assert "stroke-dasharray" in svg
