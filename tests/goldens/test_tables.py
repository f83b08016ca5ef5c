"""Digests of the tables of the papers and of every kept study: a refactoring changes none.

`GOLDEN_RECORD=1 python -m pytest tests/goldens` writes tables.json anew; with GOLDEN_TEXTS=FOLDER also the texts.
"""

from pathlib import Path

import pytest

from tests.goldens.commands import FOLDER, ROOT, changed, digest, flat, keep_texts, said, without_paths

GOLDEN = FOLDER / "tables.json"
MEASURED = ROOT / "analysis" / "measured"
# Kept folders with records of runs; a kept study without any has rows of its own.
STUDIES = (
    "demo_cpu", "open_cpu", "open_cpu_13s", "open_cpu_300s", "open_cpu_300s_short", "open_cpu_4_blocks",
    "open_cpu_ablations", "open_cpu_controls", "open_cpu_controls_short", "open_cpu_grid", "open_cpu_resolution",
    "open_cpu_standardised",
)  # fmt: skip
FORMATS = ("md", "csv", "tex")


def kept(study: str) -> Path:
    """Where a kept study lies."""
    one_file = MEASURED / f"{study}.jsonl"
    return one_file if one_file.exists() else MEASURED / study


def clean(text: str, study: str, out: Path) -> str:
    """The text without absolute paths, and without how the study is kept."""
    return without_paths(text.replace(str(kept(study)), f"STUDY_{study}"), OUT=out)


def of_study(study: str, out: Path) -> dict[str, str]:
    """Everything that `tables` and `gains` say about a study, and every file they write."""
    texts = {}
    commands = {
        "tables": ["tables", kept(study)],
        "tables all": ["tables", kept(study), "--which", "all", "--out", out / "records"],
        "tables joined": ["tables", kept(study), "--which", "all", "--source", "joined", "--out", out / "joined"],
        "gains": ["gains", kept(study), "--out", out / "gains"],
    }
    for name, words in commands.items():
        code, said_out, said_err = said("analysis", *words)
        texts[f"{name}.out"] = f"exit code {code}\n{said_out}"
        texts[f"{name}.err"] = said_err
    for path in sorted(out.rglob("*.*")):
        texts[f"{path.parent.name}/{path.name}"] = path.read_text()
    return {name: clean(text, study, out) for name, text in texts.items()}


def of_papers(out: Path) -> dict[str, str]:
    """The published tables, each in every format."""
    code, said_out, said_err = said("analysis", "tables", "--source", "reference", "--which", "all", "--out", out)
    assert code == 0, said_err
    texts = {path.name: path.read_text() for path in sorted(out.iterdir())}
    texts["terminal.md"] = said_out
    for form in FORMATS:
        texts[f"terminal.{form}"] = said("analysis", "tables", "--format", form)[1]
    return {name: without_paths(text, OUT=out) for name, text in texts.items()}


def test_tables_are_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found = {"papers": of_papers(tmp_path / "papers")} | {name: of_study(name, tmp_path / name) for name in STUDIES}
    texts = flat(found)
    keep_texts("tables", texts)
    digests = {group: {name: digest(text) for name, text in named.items()} for group, named in found.items()}
    wrong = changed(GOLDEN, digests, texts)
    if wrong:
        pytest.fail(wrong, pytrace=False)


def test_no_kept_study_is_forgotten():
    there = {path.stem for path in MEASURED.iterdir() if path.suffix == ".jsonl" or any(path.glob("*.record.json"))}
    there |= {path.parts[len(MEASURED.parts)] for path in MEASURED.glob("*/**/record.json")}
    assert there == set(STUDIES)
