import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.__main__ import main
from analysis.comparison.table import as_markdown, compare, comparison_csv, comparison_table
from analysis.output.formats import (
    Column,
    Table,
    csv_text,
    escape_html,
    escape_latex,
    escape_markdown,
    latex,
    markdown,
    significant,
    whole,
    write_files,
)
from analysis.papers.tables import contradictions_table, paper_table, table_cells
from analysis.runs.records import Runs, load
from tests.helpers.repository import ROOT
from tests.helpers.run_folders import FLOORS, SHAPES, record, write_run


@pytest.fixture
def four(tmp_path: Path) -> Path:
    for name in SHAPES:
        write_run(tmp_path, record(name))
    return tmp_path


def rows_of(table: Table) -> dict[str, dict[str, str | None]]:
    heads = [c.head for c in table.columns]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in table.rows}


# ---- the comparison


def test_the_table_of_the_demo(four: Path):
    table = comparison_table(compare(load(four)))
    rows = rows_of(table)
    assert list(rows)[:4] == ["demo_apf", "demo_uniform_patch", "demo_uniform_tokens", "demo_tiled_unet"]
    apf = rows["demo_apf"]
    assert (apf["L"], apf["tokens/image"], apf["steps"], apf["train (s)"], apf["n"]) == (
        "256",
        "256",
        "940",
        "120",
        "6",
    )
    assert apf["speedup"] == "15.4x (a)"
    assert re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", apf["Dice [95 % CI]"])
    assert rows["demo_uniform_patch"]["speedup"] == "1.00x (a)"
    assert table.notes[0] == (
        "(a) speedup: s/image of demo_uniform_patch (unetr, uniform, p=16, L=4096) divided by s/image of the row"
    )


def test_floors_are_rows_of_their_own_kind(four: Path):
    table = comparison_table(compare(load(four)))
    floors = [row for row, kind in zip(table.rows, table.kinds, strict=True) if kind == "floor"]
    assert [row[0] for row in floors] == ["floor: all foreground", "floor: all background", "floor: Otsu threshold"]
    assert [row[11] for row in floors] == ["0.091", "0.000", "0.103"]
    assert {row[-1] for row in floors} == {""}


def test_a_floor_that_depends_on_the_cells_is_a_range(tmp_path: Path):
    write_run(tmp_path, record("demo_apf", floors={**FLOORS, "otsu": 0.2}))
    write_run(tmp_path, record("demo_uniform_patch"))
    comparison = compare(load(tmp_path))
    table = comparison_table(comparison)
    assert rows_of(table)["floor: Otsu threshold"]["Dice [95 % CI]"] == "0.103 to 0.200"
    assert any("a range where" in note for note in table.notes)
    lines = [r for r in csv.DictReader(io.StringIO(comparison_csv(comparison))) if r["label"] == "Otsu threshold"]
    assert [(r["experiment"], r["dice"]) for r in lines] == [("demo_uniform_patch", "0.1034"), ("demo_apf", "0.2")]


def test_floors_of_other_data_are_rows_of_their_own(tmp_path: Path):
    write_run(tmp_path, record("demo_apf"))
    write_run(tmp_path, record("other", split_sha256="cc", floors={"otsu": 0.5}, run_id="o", experiment="other"))
    rows = rows_of(comparison_table(compare(load(tmp_path))))
    assert rows["floor: Otsu threshold (demo_apf)"]["Dice [95 % CI]"] == "0.103"
    assert rows["floor: Otsu threshold (other)"]["Dice [95 % CI]"] == "0.500"


def test_an_accuracy_is_never_in_the_column_of_the_dice(tmp_path: Path):
    write_run(tmp_path, record("demo_apf"))
    plain = {"dice": None, "dice_pooled": None, "dice_per_slide": None, "dice_ceiling": None}
    scores = {"task": "classification", "accuracy": 0.8, "auc": 0.9, "floors": {"most_frequent_class": 0.55}}
    write_run(tmp_path, record(experiment="who", run_id="w", model="vit", **plain, **scores))
    comparison = compare(load(tmp_path))
    rows = rows_of(comparison_table(comparison))
    assert (rows["who"]["accuracy"], rows["who"]["AUC"], rows["who"]["Dice [95 % CI]"]) == ("0.800", "0.900", "")
    assert (rows["demo_apf"]["accuracy"], rows["demo_apf"]["ceiling"]) == ("", "0.987")
    floor = rows["floor: most frequent class"]
    assert (floor["accuracy"], floor["Dice [95 % CI]"]) == ("0.550", "")
    assert rows["floor: Otsu threshold"]["accuracy"] == ""
    lines = {r["label"]: r for r in csv.DictReader(io.StringIO(comparison_csv(comparison)))}
    assert (lines["most frequent class"]["accuracy"], lines["most frequent class"]["dice"]) == ("0.55", "")
    assert (lines["who"]["task"], lines["who"]["auc"]) == ("classification", "0.9")


def test_classification_alone_has_no_dice_column(tmp_path: Path):
    write_run(tmp_path, record(task="classification", accuracy=0.8, dice=None, dice_per_slide=None, floors=None))
    heads = [c.head for c in comparison_table(compare(load(tmp_path))).columns]
    assert "accuracy" in heads
    assert "Dice [95 % CI]" not in heads
    assert "ceiling" not in heads


def test_missing_stays_missing(tmp_path: Path):
    names = (
        "decoder",
        "length",
        "tokens_per_image",
        "steps",
        "train_seconds",
        "seconds_per_image",
        "dice",
        "dice_ceiling",
    )
    write_run(tmp_path, record("demo_apf", **dict.fromkeys(names), dice_per_slide=None, n_test=None, floors=None))
    comparison = compare(load(tmp_path))
    (row,) = rows_of(comparison_table(comparison)).values()
    missing = {head for head, cell in row.items() if cell is None}
    assert missing == {
        "decoder",
        "L",
        "tokens/image",
        "steps",
        "train (s)",
        "s/image",
        "Dice [95 % CI]",
        "n",
        "ceiling",
    }
    assert row["speedup"] == "- (a)"
    line = next(line for line in markdown(comparison_table(comparison)).splitlines() if line.startswith("| demo_apf"))
    assert line.count(" - ") == len(missing) + 1, "and the refused speedup"
    (cells,) = csv.DictReader(io.StringIO(comparison_csv(comparison)))
    assert cells["dice"] == cells["seconds_per_image"] == cells["speedup"] == ""


def test_a_refused_speedup_says_why(tmp_path: Path):
    write_run(tmp_path, record("demo_apf"))
    write_run(tmp_path, record("demo_uniform_patch", gpus=8))
    text = as_markdown(compare(load(tmp_path)))
    assert "no speedup against demo_uniform_patch (unetr, uniform, p=16, L=4096): GPUs 2 against 8" in text


def test_everything_left_out_is_under_the_table(four: Path):
    write_run(four, record("demo_apf", seed=1, status="oom", reason="out of memory at step 3"))
    (four / "cut").mkdir()
    (four / "cut" / "record.json").write_text("{")
    text = as_markdown(compare(load(four)))
    assert "Not in the table (2)" in text
    assert "out of memory at step 3" in text
    assert re.search(r"\| broken +\| cut +\|", text)


RAWS = [
    *(record(name) for name in SHAPES),
    record("demo_apf", seed=1, seconds_per_image=0.07, floors={**FLOORS, "otsu": 0.11}),
    record("demo_apf", seed=2, gpus=4, run_id="four"),
    record("other", resolution=2048, run_id="big"),
]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("many")
    for raw in RAWS:
        write_run(root, raw)
    return load(root)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(len(RAWS))))
def test_the_table_does_not_depend_on_the_order_of_records(many: Runs, order):
    shuffled = Runs(many.root, many.ok.iloc[list(order)], many.problems)
    assert as_markdown(compare(shuffled)) == as_markdown(compare(many))
    assert comparison_csv(compare(shuffled)) == comparison_csv(compare(many))


def test_the_table_does_not_depend_on_folder_names(tmp_path: Path):
    for root, names in (("a", range(len(RAWS))), ("b", reversed(range(len(RAWS))))):
        for name, raw in zip(names, RAWS, strict=True):
            write_run(tmp_path / root, raw, folder=f"{name:02d}")
    assert as_markdown(compare(load(tmp_path / "a"))) == as_markdown(compare(load(tmp_path / "b")))


def test_several_seeds_get_a_column(many: Runs):
    rows = rows_of(comparison_table(compare(many)))
    seeds = {label: row["seeds"] for label, row in rows.items() if not label.startswith("floor")}
    assert sorted(seeds.values()) == ["1", "1", "1", "1", "1", "2"]


# ---- escaping

NASTY = 'a|b_c*d`e<f>&g\\h#i%j$k{l}m~n^o"p\n[q](r)'


def test_escape_markdown():
    assert escape_markdown("demo_apf") == "demo_apf"
    assert escape_markdown("_x_") == "\\_x\\_"
    assert escape_markdown("a|b") == "a\\|b"
    assert escape_markdown("a\nb") == "a b"
    assert escape_markdown("$x$") == "\\$x\\$"
    assert escape_markdown("<b>&") == "&lt;b&gt;&amp;"
    assert escape_markdown("[a](b)") == "[a]\\(b)"


def test_escape_latex():
    assert escape_latex("50% of a_b & c#d $x$ {y}") == r"50\% of a\_b \& c\#d \$x\$ \{y\}"
    assert escape_latex("a\\b~c^d") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"
    assert escape_latex("[0.1, 0.2]").startswith("{[}")


def test_escape_html():
    assert escape_html('<a href="x">\'&') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;"
    assert escape_html("a\x00b\ud800") == "a\ufffdb\ufffd"


@given(st.lists(st.text(max_size=12), min_size=2, max_size=2), st.text(max_size=12))
def test_any_text_keeps_the_shape_of_a_markdown_table(cells, note):
    text = markdown(Table("t", [Column("x"), Column("y", True)], [cells], ["run"], [note]))
    lines = text.split("\n")
    row = lines[4].replace("\\\\", "")
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


@given(st.text(max_size=40))
def test_latex_has_no_live_character_left(text):
    escaped = escape_latex(text).replace("-{}", "-")  # two hyphens are kept apart
    for command in ("backslash", "asciicircum", "asciitilde", "less", "greater", "bar", "quotedbl"):
        escaped = escaped.replace(f"\\text{command}{{}}", "")
    bare = re.sub(r"\\[{}$&#%_]", "", escaped).replace("{[}", "")
    assert not re.search(r"[\\{}$&#%_^~]", bare)


@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"])), min_size=2, max_size=2)
    )
)
def test_csv_comes_back(rows):
    found = list(csv.reader(io.StringIO(csv_text(["a", "b"], rows), newline="")))
    assert found[1:] == rows


def test_a_nasty_experiment_breaks_no_form(tmp_path: Path):
    write_run(tmp_path, record("demo_apf", experiment=NASTY), folder="x")
    comparison = compare(load(tmp_path))
    table = comparison_table(comparison)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown(table).splitlines() if line.startswith("|")}
    assert widths == {len(table.columns) + 1}
    assert next(csv.DictReader(io.StringIO(comparison_csv(comparison))))["experiment"] == NASTY
    tabular = latex(table)
    assert tabular.count(r"\toprule") == tabular.count(r"\bottomrule") == 1
    body = [line for line in tabular.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(table.columns) - 1}


def test_numbers():
    assert [significant(v) for v in (0.061, 0.94, 15.41, 1234.5, 0, None)] == [
        "0.0610",
        "0.940",
        "15.4",
        "1,234",
        "0",
        None,
    ]
    assert significant(float("inf")) == "inf"
    assert [whole(v) for v in (4096, 4096.0, 255.5, None)] == ["4,096", "4,096", "255.5", None]


def test_a_table_whose_rows_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Table("t", [Column("x")], [["a", "b"]], ["run"])


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is missing")
def test_latex_compiles(tmp_path: Path):
    write_run(tmp_path / "runs", record("demo_apf", experiment=NASTY.replace("\n", " ")), folder="x")
    write_run(tmp_path / "runs", record("demo_uniform_patch"))
    texts = [latex(comparison_table(compare(load(tmp_path / "runs")))), latex(contradictions_table())]
    texts += [latex(paper_table(name, table_cells(name))) for name in ("apf2", "apf3", "hct")]
    packages = "\\usepackage{booktabs,graphicx,longtable}\\usepackage[T1]{fontenc}\\usepackage[margin=2cm]{geometry}"
    page = f"\\documentclass{{article}}{packages}\\begin{{document}}" + "\\clearpage".join(texts) + "\\end{document}"
    (tmp_path / "all.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Float too large" not in done.stdout


def test_a_table_for_one_page_is_shrunk_and_a_longer_one_breaks():
    def table(rows: int) -> str:
        return latex(Table("t", [Column("x"), Column("y")], [["a", "b" * 40]] * rows, ["run"] * rows))

    assert "\\begin{table*}" in table(40)
    assert "\\resizebox{\\ifdim\\width>\\textwidth" in table(40)
    assert "{lp{16em}}" in table(40)
    assert "\\begin{longtable}" in table(41)
    assert "table*" not in table(41)


# ---- files and command line


def test_written_files(four: Path, capsys):
    out = four / "out"
    assert main(["tables", str(four), "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "comparison.csv",
        "comparison.md",
        "comparison.tex",
        "problems.csv",
    ]
    assert (out / "comparison.md").read_text() == capsys.readouterr().out
    assert (out / "problems.csv").read_text() == "what,run folder,why\n"
    assert [r["kind"] for r in csv.DictReader((out / "comparison.csv").open())] == ["run"] * 4 + ["floor"] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["tables", "ROOT/gone"], 64, "no such folder"),
        (["tables", "ROOT"], 1, "no record.json"),
        (["plots", "ROOT/gone"], 64, "no such folder"),
        (["report", "ROOT/gone", "--out", "ROOT/o"], 64, "no such folder"),
        (["report", "ROOT"], 64, "--out"),
        (["draw", "ROOT"], 64, "invalid choice"),
        ([], 64, "required"),
    ],
)
def test_wrong_arguments_are_one_line_and_a_code(tmp_path: Path, capsys, arguments, code, says):
    assert main([a.replace("ROOT", str(tmp_path)) for a in arguments]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_baseline_is_an_argument_error(four: Path, capsys):
    assert main(["tables", str(four), "--baseline", "nobody"]) == 64
    assert capsys.readouterr().err.startswith("error: baseline 'nobody' is not among the runs; there are: demo_apf,")


def test_only_failures_is_exit_1_with_the_list(tmp_path: Path, capsys):
    write_run(tmp_path, record(status="failed", reason="power cut"))
    assert main(["tables", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "power cut" in captured.out
    assert "no finished run" in captured.err


def test_an_out_folder_that_is_a_file_is_one_line(four: Path, capsys):
    (four / "taken").write_text("")
    assert main(["tables", str(four), "--out", str(four / "taken")]) == 64
    error = capsys.readouterr().err
    assert error.startswith(f"error: {four / 'taken'}")
    assert error.count("\n") == 1


def test_a_full_disk_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "x"
    write_files(tmp_path, {"x": "old"})
    code = (
        "import resource, sys; from pathlib import Path; from analysis.output.formats import write_files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_files(Path(sys.argv[1]).parent, {'x': 'n' * 5000})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"{target}: cannot be written"), done.stderr
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_ctrl_c_is_one_line(tmp_path: Path):
    """In the middle of reading: the record is a pipe, whose open comes back when its reader is there."""
    os.mkfifo(tmp_path / "record.json")
    command = [sys.executable, "-m", "analysis", "report", str(tmp_path), "--out", str(tmp_path / "out")]
    # A shell's background job, as CI may be, hands down that the signal is ignored.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with (tmp_path / "record.json").open("w"):
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_help_teaches():
    done = subprocess.run(
        [sys.executable, "-m", "analysis", "tables", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for word in ("examples:", "exit codes:", "--baseline", "comparison.md"):
        assert word in done.stdout
