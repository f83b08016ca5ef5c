import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.__main__ import main
from analysis.comparison.table import compare
from analysis.figures.draw import _smooth, dice_per_slide, draw_all
from analysis.figures.published import draw_published
from analysis.figures.uniform import published_against_uniform
from analysis.output.figure_style import COLOURS, encode, look, spread, style
from analysis.papers.tables import contradictions_table
from analysis.report.page import page
from analysis.runs.records import load
from analysis.runs.run_files import RunFiles, find_data, picture_stems, read_curve, read_lengths, read_pictures
from tests.helpers.run_folders import STEMS, record, rows_in, runs_in, write_build_log, write_metrics, write_run

KINDS = ("measured", "joined", "modelled")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def drawings(runs_dir: Path):
    return draw_all(compare(load(runs_dir)))


@pytest.fixture(scope="module")
def html(report: Path) -> str:
    assert [p.name for p in report.parent.iterdir()] == ["index.html"]
    return report.read_text()


# ---- the page


def test_the_page_is_well_formed_and_self_contained(html: str):
    found = Page(html)
    assert not found.all("script")
    assert not found.all("link")
    for _, attrs in found.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href"):
            assert not re.match(r"(https?:)?//", attrs.get(name) or ""), attrs
    assert "@import" not in html
    assert "url(" not in html
    assert all(img["src"].startswith("data:image/") for img in found.all("img"))


def test_everything_on_the_page_has_a_name(html: str):
    found = Page(html)
    assert found.all("html") == [{"lang": "en"}]
    assert len(found.all("h1")) == len(found.all("main")) == len(found.all("title")) == 1
    assert len(found.all("img")) == 7 + 1 + 3, "of the runs, of the model, of the papers"
    assert all(len(img["alt"]) > 40 for img in found.all("img"))
    assert all(th.get("scope") in ("col", "row") for th in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table")) > 20


def test_the_page_can_be_walked_without_a_mouse(html: str):
    found = Page(html)
    idents = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(idents) == len(set(idents))
    pointed = [a["href"][1:] for a in found.all("a") if a["href"].startswith("#")]
    pointed += [attrs["aria-labelledby"] for _, attrs in found.tags if "aria-labelledby" in attrs]
    assert set(pointed) <= set(idents)
    regions = [d for d in found.all("div") if d.get("role") == "region"]
    assert regions
    assert all(d["tabindex"] == "0" for d in regions), "wide tables scroll by keyboard"


def test_measured_and_published_numbers_stand_apart(html: str):
    """Each table says what it is in its caption (CSS adds a badge), and a joined one in every row."""
    measured, joined, modelled, published = (html.index(f'<div class="{k}"') for k in (*KINDS, "published"))
    assert measured < joined < modelled < published
    assert "78.32" not in html[:joined] and "78.32" in html[joined:modelled]
    assert "78.32" not in html[modelled:published] and "78.32" in html[published:]
    assert "as published" in html[published:] and "(published, measured, modelled)" in html[joined:modelled]
    assert "Modelled, not measured" in html[modelled:published] and "Nobody has measured" in html[joined:published]
    rows = re.findall(r'<tr class="(\S+)"><th scope="row">.*?</tr>', html[joined:modelled])
    told = re.findall(r"<td>(published|measured|modelled)</td>", html[joined:modelled])
    assert told == [row.removesuffix("-first") for row in rows] and set(told) == {"published", "measured", "modelled"}


def test_the_page_lists_the_contradictions(html: str):
    text = " ".join(Page(html).texts)
    assert f"Contradictions among the published numbers ({len(contradictions_table().rows)})" in text
    assert "geometric mean 6.9x" in text and "one block looks copied" in text


def test_further_figures_come_with_their_files(tmp_path: Path):
    runs = tmp_path / "runs"
    write_run(runs, record(dice_per_slide=None, data="gone"))
    about = json.dumps({"experiment": "gmic", "images": 3, "pictures": "noise", "weights": None})
    fields = [str(tmp_path / name) for name in ("a.npz", "b.npz")]
    for field in fields:
        np.savez(field, map=np.ones((20, 30)), about=about)
    assert main(["report", str(runs), "--out", str(tmp_path), "--site", "lumi,h200-box", "--erf", *fields]) == 0
    text = (tmp_path / "index.html").read_text()
    assert 'id="figure-erf"' in text and text.count('<th scope="row">lumi</th>') == text.count(">h200-box</th>") == 15
    assert main(["report", str(runs), "--out", str(tmp_path), "--site", "summit"]) == 64
    assert main(["report", str(runs), "--out", str(tmp_path), "--erf", str(tmp_path / "no.npz")]) == 1


def test_plots_of_published_numbers_need_no_runs(tmp_path: Path):
    assert main(["plots", "--out", str(tmp_path)]) == 0
    names = {p.stem for p in tmp_path.iterdir()}
    assert names == {"published_against_uniform", "published_tokens", "published_cost"}
    for drawing in draw_published():
        assert drawing.caption.startswith("Published") and "no measurement of this suite" in drawing.caption
    alt = published_against_uniform().alt
    for ratio in ("7.49", "7.61", "5.77", "2.29", "2.91", "3.80", "2.31"):  # facts, Table II
        assert f"{ratio} times faster" in alt
    assert main(["plots", "--out", str(tmp_path), "--baseline", "x"]) == 64


def test_problems_provenance_and_links(html: str, runs_dir: Path):
    text = " ".join(Page(html).texts)
    assert "out of <b>memory</b>" in text
    assert "<b>memory</b>" not in html
    assert "8cfaba8" in text
    assert "torch 2.13.0" in text
    assert "09ab" * 16 in text
    links = [a["href"] for a in Page(html).all("a") if not a["href"].startswith("#")]
    assert len(links) == 4
    for link in links:
        assert (runs_dir.parent / "page" / link / "record.json").is_file()


def test_the_page_is_the_same_every_time(runs_dir: Path, drawings, html: str):
    assert page(compare(load(runs_dir)), drawings, runs_dir.parent / "page") == html


def test_hostile_text_stays_text(tmp_path: Path):
    evil = "<script>alert('x')</script>\"&|$_%$\\frac$"
    raw = record(
        "demo_apf",
        experiment=evil,
        model=evil,
        commit=evil,
        data=evil,
        floors={evil: 0.1},
        dice=0.5,
        dice_per_slide={evil: 0.4, "b": 0.6},
    )
    run = write_run(tmp_path / "runs", raw, folder="x")
    write_metrics(run, raw)
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    found = Page(text)
    assert not found.all("script")
    assert evil in found.texts


def test_a_page_without_a_finished_run_says_so(tmp_path: Path):
    write_run(tmp_path / "runs", record(status="failed", reason="no luck"))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    text = " ".join(Page((tmp_path / "out" / "index.html").read_text()).texts)
    assert "No finished run" in text
    assert "no luck" in text


def test_a_bare_record_is_enough_for_a_page(tmp_path: Path):
    empty = dict.fromkeys(
        ("dice", "seconds_per_image", "tokens_per_image", "dice_per_slide", "floors", "data", "resolution")
    )
    run = write_run(tmp_path / "runs", record(**empty))
    for name in ("env.json", "config.yaml"):
        (run / name).unlink()
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "The runs left no data to draw" in (tmp_path / "out" / "index.html").read_text()


# ---- the figures


def test_every_figure_has_its_data(drawings):
    assert {d.slug for d in drawings} == {
        "training_curves",
        "sequence_lengths",
        "dice_against_cost",
        "dice_per_slide",
        "predictions",
        "against_tokens",
        "preparation",
    }


def test_figures_are_written_in_three_forms(tmp_path: Path):
    write_run(tmp_path / "runs", record(data="gone"))
    out = tmp_path / "plots"
    assert main(["plots", str(tmp_path / "runs"), "--out", str(out)]) == 0
    names = {p.stem for p in out.iterdir()}
    assert names == {"sequence_lengths", "dice_against_cost", "dice_per_slide", "preparation"}
    for name in names:
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 900
            assert np.asarray(picture.convert("L")).std() > 5, "not an empty canvas"
        assert (out / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
        root = ElementTree.fromstring((out / f"{name}.svg").read_text())
        assert root.tag.endswith("svg")


def test_files_are_the_same_every_time(drawings):
    for suffix in ("png", "jpg", "svg"):
        assert encode(drawings[0].figure, suffix) == encode(drawings[0].figure, suffix)


def test_words_of_the_figures_say_what_is_seen(drawings):
    words = {d.slug: d for d in drawings}
    assert "uniform, p=16: 4,096 on all 24 slides" in words["sequence_lengths"].alt
    assert re.search(r"apf, p=16: \d+ to \d+, median \d+, n=24", words["sequence_lengths"].alt)
    assert "demo_apf: Dice 0.6" in words["dice_against_cost"].alt
    assert "95 % bootstrap" in words["dice_against_cost"].caption


def test_looks_differ_beyond_colour():
    looks = [look(i) for i in range(14)]
    assert len({(x.colour, x.marker) for x in looks}) == 14
    assert len({x.marker for x in looks[:7]}) == len(COLOURS) == 7


def test_more_runs_than_can_be_told_apart_are_counted(tmp_path: Path):
    for i in range(16):
        write_run(tmp_path, record(f"e{i:02d}"))
    with style():
        drawing = dice_per_slide(compare(load(tmp_path)))
    assert "2 more of 16 runs are in the table and not drawn" in drawing.caption


def test_labels_are_spread():
    assert spread([0.0, 0.5], 0.1) == [0.0, 0.5]
    moved = spread([0.10, 0.10, 0.11], 0.05)
    assert min(np.diff(moved)) >= 0.05 - 1e-6
    assert np.mean(moved) == pytest.approx(np.mean([0.10, 0.10, 0.11]))


def test_the_running_mean_by_hand():
    values = np.arange(1.0, 61.0)  # 5 % of 60 points: windows of three
    smooth = _smooth(values)
    assert list(smooth[:4]) == [1.0, 1.5, 2.0, 3.0]
    assert smooth[-1] == 59.0
    assert _smooth(np.array([2.0])) == [2.0]


# ---- what the figures are made of


def test_curves_skip_what_is_not_a_number(tmp_path: Path):
    run = write_run(tmp_path, record())
    lines = [
        '{"step": 1, "train_seconds": 0.5, "loss": 0.9}',
        '{"step": 2, "train_seconds": 1.0, "loss": null}',
        '{"step": 2, "val_dice": 0.25}',
        "not json",
        '{"step": 3, "train_seconds": 1.5, "loss": 0.7}',
        '{"step": 3, "test_dice": 0.5}',
        '{"step": 4, "train_s',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    curve = read_curve(RunFiles(run))
    assert curve.step.tolist() == [1, 3]
    assert curve.loss.tolist() == [0.9, 0.7]
    assert (curve.val_seconds.tolist(), curve.val_dice.tolist()) == ([1.0], [0.25])


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[]\n"])
def test_no_curve_without_metrics(tmp_path: Path, content):
    run = write_run(tmp_path, record())
    if content is not None:
        (run / "metrics.jsonl").write_bytes(content)
    assert read_curve(RunFiles(run)) is None


def test_lengths_take_the_last_word_of_the_log(tmp_path: Path):
    data = tmp_path / "tokens"
    write_build_log(data, [10, 20, None, 30], ["a", "b", "c", "a"])
    with (data / "build_log.jsonl").open("a") as log:
        log.write('{"slide": "b", "status": "skipped", "tokens": 25}\n{"slide": "d", "sta')
    write_run(tmp_path / "runs", record(data=str(data)))
    (lengths,) = read_lengths(rows_in(tmp_path / "runs"))
    assert lengths.counts.tolist() == [25, 30]


def test_lengths_fall_back_to_the_record(tmp_path: Path):
    write_run(tmp_path, record(data="gone", tokens_per_image=200.5))
    (lengths,) = read_lengths(rows_in(tmp_path))
    assert (lengths.counts.tolist(), lengths.source) == ([200.5], "mean in the record")


def test_a_relative_data_folder_is_found_from_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_build_log(tmp_path / "project" / "demo" / "tokens", [5])
    write_run(tmp_path / "project" / "runs", record(data="demo/tokens"))
    (run,) = runs_in(tmp_path / "project")
    assert find_data(run.files) == tmp_path / "project" / "demo" / "tokens"


def test_pictures_are_read_and_wrong_ones_refused(runs_dir: Path, tmp_path: Path):
    run = next(r.files for r in runs_in(runs_dir) if r.experiment == "demo_apf")
    assert picture_stems(run) == set(STEMS)
    pictures = read_pictures(run, STEMS[0])
    assert pictures.image.shape == (*pictures.truth.shape, 3)
    assert 0 < pictures.truth.mean() < 1
    assert read_pictures(run, "nobody") is None
    bare = RunFiles(write_run(tmp_path, record()))
    folder = bare.folder / "predictions"
    folder.mkdir()
    gray = np.array([[0, 127, 255]], np.uint8)  # two classes: 127 is class 1, 255 is class 2
    Image.fromarray(np.zeros((1, 3, 3), np.uint8)).save(folder / "image_s.png")
    Image.fromarray(gray).save(folder / "truth_s.png")
    Image.fromarray(gray).save(folder / "pred_s.png")
    np.savez(folder / "s.npz", counts=np.zeros((2, 3)))
    assert read_pictures(bare, "s").truth.tolist() == [[False, True, True]]
    Image.fromarray(gray.T).save(folder / "pred_s.png")
    assert read_pictures(bare, "s") is None
    (folder / "pred_s.png").write_bytes(b"cut")
    assert read_pictures(bare, "s") is None
