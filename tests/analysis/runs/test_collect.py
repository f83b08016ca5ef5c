"""A collected study says what its folder says, in every command, and a damaged one is one line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.runs.records import RunsError, load
from launch.experiments.load import load as load_experiment
from tests.helpers.run_folders import demo_runs, record, runs_in, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs of the demo with settings, curves, tokens and pictures, classifiers with scores, and what went wrong."""
    root = demo_runs(tmp_path_factory.mktemp("collected"))
    root = root.rename(root.with_name("runs.found"))  # as long as runs.jsonl, for a table in which the path stands
    for run in runs_in(root):
        settings = load_experiment(run.experiment, ["train.batch=2", "data.dir=x"]).model_dump(mode="json")
        (run.folder / "config.yaml").write_text(json.dumps(settings))
    plain = {"dice": None, "dice_pooled": None, "dice_per_slide": None, "dice_ceiling": None, "floors": None}
    for name, shift in (("open_x_vit", 0.1), ("open_y_vit", 0.2)):
        raw = record(name, **plain, task="classification", model="vit", accuracy=0.75, auc=0.75, run_id=name)
        run = write_run(root, raw)
        (run / "predictions").mkdir()
        rows = [f"s{i},{i % 2},{1 - p:.3f},{p:.3f}" for i, p in enumerate(np.linspace(shift, 0.9, 8))]
        (run / "predictions" / "scores.csv").write_text("\n".join(["name,label,p0,p1", *rows]) + "\n")
    for seed in range(2):
        for name in ("open_x_apf", "open_x_unet", "open_y_apf", "open_y_unet"):
            write_run(root, record(name, seed=seed, run_id=f"{name}{seed}"))
    write_run(root, record("lost", status="oom", reason="out of memory"))
    write_run(root, {**record("odd"), "mfu": float("nan"), "floors": {"otsu": float("inf")}}, folder="odd")
    write_run(root, record("odd", finished_at="2020"), folder="odd_again")
    (write_run(root, record("broken")) / "record.json").write_text("{")
    (write_run(root, record("older")) / "record.json").write_text('{"schema_version": 0}')
    (write_run(root, record("unfinished")) / "record.json").unlink()
    return root


@pytest.fixture(scope="module")
def study(folder: Path) -> Path:
    path = folder.parent / "runs.jsonl"
    assert main(["collect", str(folder), "--out", str(path), "--pictures"]) == 0
    return path


COMMANDS = {
    "tables": ["tables", "RUNS", "--which", "all", "--source", "joined", "--out", "OUT"],
    "gains": ["gains", "RUNS", "--out", "OUT"],
    "compare": ["compare", "RUNS/demo_apf", "RUNS/demo_uniform_patch", "--unfair-ok", "--json", "--out", "OUT"],
    "refused": ["compare", "RUNS/demo_apf", "RUNS/demo_tiled_unet"],
    "seeds": ["compare", "RUNS/open_x_apf", "RUNS/open_x_unet", "--out", "OUT"],
    "auc": ["auc", "RUNS/open_x_vit/open_x_vit", "--baseline", "RUNS/open_y_vit/open_y_vit", "--out", "OUT"],
    "plots": ["plots", "RUNS", "--out", "OUT"],
    "scaling": ["scaling", "RUNS", "--gpus", "1,8"],
    "report": ["report", "RUNS", "--out", "OUT"],
    "nothing": ["tables", "RUNS/gone"],
}


def said(words: list[str], root: Path, out: Path, capsys) -> tuple[int, str, str, dict[str, bytes]]:
    """What a command returned and said, and the files it wrote, without the name of the folder or study."""
    shutil.rmtree(out, ignore_errors=True)
    code = main([w.replace("RUNS", str(root)).replace("OUT", str(out)) for w in words])
    told = capsys.readouterr()
    files = {p.name: p.read_bytes().replace(str(root).encode(), b"RUNS") for p in out.rglob("*") if p.suffix != ".pdf"}
    return code, told.out.replace(str(root), "RUNS"), told.err.replace(str(root), "RUNS"), files


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_the_same_of_a_folder_and_of_its_study(name, folder: Path, study: Path, tmp_path, capsys):
    code, out, err, files = said(COMMANDS[name], folder, tmp_path / "out", capsys)
    again, out_again, err_again, files_again = said(COMMANDS[name], study, tmp_path / "out", capsys)
    assert code == again and out == out_again
    if name == "nothing":
        assert code == 64 and "no such folder" in err and "has no run of that name" in err_again
        return
    assert err == err_again
    if name == "report":  # the page links to the folders of the runs, or to the file
        page, other = (
            re.sub(rb'<a href="[^#"]*">|<dt>(run folder|collected run)|<title>.*?</title>|<h1>.*?</h1>', b"", f["index.html"])
            for f in (files, files_again)
        )
        assert page == other
        return
    assert files.keys() == files_again.keys() and all(files[n] == files_again[n] for n in files)
    assert name not in ("tables", "gains", "compare", "auc", "plots") or (code == 0 and files)


def test_a_study_in_a_folder_of_runs_is_read_with_them(study: Path, tmp_path: Path):
    write_run(tmp_path / "here", record("mine"))
    shutil.copy(study, tmp_path / "here" / study.name)
    (tmp_path / "here" / "other.jsonl").write_text('{"slide": "a"}\n')
    alone, together = load(study), load(tmp_path / "here")
    assert set(together.ok.experiment) == {*alone.ok.experiment, "mine"}
    assert len(together.problems) == len(alone.problems)


def test_a_study_of_a_study_is_the_same(study: Path, tmp_path: Path):
    again = tmp_path / study.name
    assert main(["collect", str(study), "--out", str(again), "--pictures"]) == 0
    assert again.read_bytes() == study.read_bytes()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [*lines[:3], lines[3][:50], *lines[4:]], 4),
        (lambda lines: [*lines[:2], '{"a": 1}', *lines[3:]], 3),
        (lambda lines: [*lines[:2], '{"folder": "x"}', *lines[3:]], 3),
        (lambda lines: [*lines[:2], '{"folder": "x", "problem": 3}', *lines[3:]], 3),
        (lambda lines: [*lines[:2], "[]", *lines[3:]], 3),
        (lambda lines: lines[:5], 6),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0].replace('"schema_version": 1', '"schema_version": 9'), *lines[1:]], 1),
        (lambda lines: ["hello"], 1),
        (lambda lines: [], 1),
    ],
    ids=["cut", "foreign", "bare", "half", "list", "end", "no head", "newer", "text", "empty"],
)
def test_a_damaged_study_is_one_line_with_file_and_line(damage, line, study: Path, tmp_path: Path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(f"{text}\n" for text in damage(study.read_text().splitlines())))
    with pytest.raises(RunsError, match=rf"bad\.jsonl:{line}: "):
        load(bad)
    assert main(["tables", str(bad)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_bytes_that_are_no_text_and_a_wrong_name(study: Path, folder: Path, tmp_path: Path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"\n".join(study.read_bytes().splitlines()[:2]) + b"\n\xff\xfe\n")
    assert main(["tables", str(bad)]) == 1
    assert re.search(r"bad\.jsonl:\d+: ", capsys.readouterr().err)
    assert main(["collect", str(folder), "--out", str(tmp_path / "study.json")]) == 64
    assert main(["collect", str(tmp_path), "--out", str(tmp_path / "none.jsonl")]) == 1
    assert not (tmp_path / "none.jsonl").exists()


def test_pictures_are_kept_only_when_asked_for(folder: Path, study: Path, tmp_path: Path):
    assert main(["collect", str(folder), "--out", str(tmp_path / "small.jsonl")]) == 0
    assert (tmp_path / "small.jsonl").stat().st_size < study.stat().st_size / 2
    assert "pictures" in study.read_text() and '"pictures"' not in (tmp_path / "small.jsonl").read_text()
