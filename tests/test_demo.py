"""The demo and every command of the README, run as a user runs them (with seconds of training instead of minutes)."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT, shell

EXPERIMENTS = ("demo_apf", "demo_uniform_tokens", "demo_uniform_patch", "demo_tiled_unet")


@pytest.mark.timeout(1200)
def test_demo_ends_with_four_records_a_table_and_a_page(small_demo: tuple[Path, str]):
    folder, printed = small_demo
    for experiment in EXPERIMENTS:
        (path,) = (folder / "runs" / experiment).glob("*/record.json")
        record = json.loads(path.read_text())
        assert record["status"] == "ok", record
        assert record["n_test"] == 6 and record["gpus"] == 2 and record["engine"] == "fsdp"
        assert 0 <= record["dice"] <= record["dice_ceiling"] <= 1
        assert 0.5 < record["train_seconds"] / 3 < 10, "the training clock obeys train.max_seconds"
    tables = folder / "report" / "tables"
    assert {".md", ".csv", ".tex"} <= {p.suffix for p in tables.iterdir()}
    page = (folder / "report" / "index.html").read_text()
    assert "<table" in page and "data:image/" in page
    joined = page[page.index('<section id="joined"') : page.index('<section id="modelled"')]
    for experiment in EXPERIMENTS:  # which row is whose stands in words beside it, so without colour too
        assert re.search(rf">{experiment}</td><td>measured</td>", joined), experiment
    assert joined.count("<td>published</td>") > 60
    assert not re.search(r"<(img|script|link)[^>]+(src|href)=.https?:", page), "the page is self-contained"
    assert (folder / "inspect.png").stat().st_size > 20_000
    assert "tiled" in printed.lower() and "otsu" in printed.lower()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_demo_trains_nothing_again(small_demo: tuple[Path, str]):
    folder, _ = small_demo
    records = {p: p.read_bytes() for p in folder.glob("runs/*/*/record.json")}
    done = shell("bash jobs/demo.sh", DEMO_DIR=str(folder), DEMO_SECONDS="3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.read_bytes() for p in folder.glob("runs/*/*/record.json")} == records


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("command", readme_commands())
@pytest.mark.timeout(900)
def test_readme_command_runs(command: str, small_demo: tuple[Path, str]):
    folder, _ = small_demo  # commands come in the README's order and share `out/`, as a reader's do
    if command in {"make demo", "make test"}:  # the demo's script ran above, and this is the test run
        targets = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{command.split()[1]}:", targets, flags=re.M)
        assert "bash jobs/demo.sh" in targets and "python -m pytest" in targets
        return
    if command.startswith("make "):
        done = shell(f"make -n {command.split()[1]}")
        assert done.returncode == 0, done.stderr
        return
    if command.startswith("sbatch "):  # tests/slurm runs them on a real SLURM; here: is it that script?
        (script,) = re.findall(r"jobs/\w+\.sh", command)
        assert shell(f"bash -n {script}").returncode == 0 and "#SBATCH" in (ROOT / script).read_text()
        return
    done = shell(
        re.sub(r"\bdemo/", f"{folder}/", command)
        .replace(" out/", f" {folder.parent}/mine/")
        .replace("=out/", f"={folder.parent}/mine/")
    )
    if "analysis compare" in command and "--unfair-ok" not in command and done.returncode == 1:
        # Runs of 3 s end a whole step after that, by other times on a busy machine; then the guard must say just this.
        assert re.search(r"must not be compared: training budget [^;]*$", done.stderr.strip()), done.stderr
        return
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_readme_shows_the_measured_table_and_real_files():
    text = (ROOT / "README.md").read_text()
    done = shell("python -m analysis tables analysis/measured/demo_cpu.jsonl")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) >= 8 and all(row in text for row in rows), "README's table follows from the kept runs"
    assert len(text.split()) <= 1500
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (ROOT / link).exists(), link
