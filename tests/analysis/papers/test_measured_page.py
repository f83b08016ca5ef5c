"""Every number in the tables of analysis/measured/README.md, and those its sentences quote, follow from the studies."""

import re
from functools import cache

import pytest

from analysis.comparison.gains import Gain, find_pairs, gains
from analysis.runs.groups import group_runs
from analysis.runs.records import Row, load, rows_of
from tests.helpers.repository import ROOT

MEASURED = ROOT / "analysis" / "measured"
PAGE = (MEASURED / "README.md").read_text()
STANDARDISED, RESOLUTION, ABLATIONS = "open_cpu_standardised", "open_cpu_resolution", "open_cpu_ablations"
# Columns of the page: the study, and what the * of a row's experiments stands for.
SETS = {
    "glomeruli": (STANDARDISED, "glomeruli"),
    "nuclei": (STANDARDISED, "nuclei"),
    "vessels, 1024 px": (STANDARDISED, "vessels"),
    "vessels, 2048 px": (RESOLUTION, "vessels_2k"),
    "1024 px": (STANDARDISED, "vessels"),
    "2048 px": (RESOLUTION, "vessels_2k"),
    "4096 px": (RESOLUTION, "vessels_4k"),
}
ROWS = {
    "`apf_std`": "apf_std",
    "tiled U-Net": "unet",
    "tiled U-Net, standardised": "unet_std",
    "tiled U-Net, same filters": "unet_std",
    "TransUNet, narrow": "transunet",
    "its own network on equal patches": "uniform_leaf_unet_std",
    "the network of `apf_std` on equal patches": "uniform_leaf_unet_std",
    "`apf`, plain filters": "apf",
    "U-Net of 1024 px, answers enlarged": "unet_std_1k",
    "`apf_std` of 1024 px, answers enlarged": "apf_std_1k",
}
CHANGES = {
    "split by the luma's variance": "apf_variance",
    "split by its entropy": "apf_entropy",
    "fixed thresholds 100, 200": "apf_fixed",
    "bicubic patches": "apf_cubic",
    "half as many leaves": "apf_half",
    "four transformer blocks": "apf_deep",
    "no position code": "apf_blind",
    "linear head": "apf_token",
    "the paper's raster decoder": "apf_raster",
}


@cache
def study(name: str) -> dict[str, Row]:
    """The rows of a study by their experiment."""
    return {row.experiment: row for row in rows_of(frame(name))}


@cache
def frame(name: str):
    return group_runs(load(MEASURED / f"{name}.jsonl").ok)


@cache
def over(name: str, a: str, b: str) -> dict[str, Gain]:
    """How much more one row has than another, by data set."""
    return {gain.name: gain for gain in gains(find_pairs(frame(name), f"open_*_{a}", f"open_*_{b}", []))}


def table(text: str, head: str) -> dict[str, dict[str, str]]:
    """The rows of the Markdown table whose head begins so: by their first cell, the others by head."""
    lines = text[text.index(f"\n{head}") + 1 :].split("\n\n")[0].splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


def close(said: str, value: float) -> bool:
    """Whether a printed number is the value, to the digits that are printed."""
    digits = len(said.partition(".")[2])
    return abs(float(said) - value) <= 0.5 * 10**-digits + 1e-9


def check_gain(said: str, gain: Gain) -> None:
    found = re.fullmatch(r"([+-][\d.]+) % \[([+-][\d.]+), ([+-][\d.]+)\]", said)
    assert found, said
    for number, value in zip(found.groups(), (gain.gain, gain.low, gain.high), strict=True):
        assert value is not None
        assert close(number, 100 * value), (said, gain)


def check_dice(said: str, row: Row) -> None:
    dice = [run.dice for run in row.runs]
    found = re.fullmatch(r"([\d.]+)(?: \(([\d.]+) to ([\d.]+)\))?(?:, one seed)?", said)
    assert found, said
    assert close(found[1], row.dice), (said, row.dice)
    assert found[2] is None or (close(found[2], min(dice)) and close(found[3], max(dice))), (said, dice)
    assert ("one seed" in said) == (len(dice) == 1), said


def check_rows(found: dict[str, dict[str, str]]) -> int:
    """Hold every cell against its study; returns how many cells were."""
    checked = 0
    for label, cells in found.items():
        for column, said in cells.items():
            name, data = SETS[column]
            row = study(name).get(f"open_{data}_{ROWS.get(label)}")
            if said in ("not run", "-"):
                assert row is None or said == "-", (label, column)
            elif label == "Otsu's threshold":
                assert close(said, study(name)[f"open_{data}_apf_std"].floors["otsu"]), (label, column)
            elif label != "squares that the tree keeps":
                dice, _, gain = said.partition(": ")
                check_dice(dice, row)
                if gain:
                    check_gain(gain, over(name, "apf_std", ROWS[label])[data])
            checked += 1
    return checked


def test_rows_against_other_models_follow_from_the_studies():
    assert check_rows(table(PAGE, "| row | glomeruli |")) == 28


def test_rows_of_larger_frames_follow_from_the_studies():
    assert check_rows(table(PAGE, "| row | 1024 px |")) == 15


def test_the_worth_of_each_choice_follows_from_the_ablations():
    found = table(PAGE, "| change | glomeruli |")
    assert set(found) == set(CHANGES)
    for label, cells in found.items():
        for data, said in cells.items():
            check_gain(said, over(ABLATIONS, "apf", CHANGES[label])[data])


def test_the_first_page_repeats_rows_of_the_studies():
    assert check_rows(table((ROOT / "README.md").read_text(), "| | glomeruli |")) == 16


@pytest.mark.parametrize(
    ("name", "row", "data"),
    [
        ("open_cpu_controls", "uniform_tokens", ("glomeruli", "nuclei", "vessels")),
        ("open_cpu_controls_short", "apf", ("glomeruli", "nuclei", "vessels")),
        ("open_cpu_300s", "apf", ("glomeruli", "nuclei", "vessels")),
        ("open_cpu_300s", "unet", ("glomeruli", "nuclei", "vessels")),
        (STANDARDISED, "swin_unetr", ("nuclei", "vessels")),
    ],
)
def test_sentences_quote_the_studies(name: str, row: str, data: tuple[str, ...]):
    """The page says these means in a row, one for each data set."""
    *first, last = (study(name)[f"open_{one}_{row}"].dice for one in data)
    said = ", ".join(f"{value:.3f}" for value in first) + f"( on nuclei)? and {last:.3f}"
    assert re.search(said, PAGE), said


@pytest.mark.parametrize(
    ("name", "a", "b", "data", "said"),
    [
        (RESOLUTION, "apf_std", "unet_std", "vessels_4k", "+2.8 % [-2.1, +7.8]"),
        (ABLATIONS, "apf_unturned", "apf_drop", "nuclei", "2.8 % [1.4, 4.4]"),
        (STANDARDISED, "apf_token_still", "apf_token_strip", "nuclei", "45 % [33, 65]"),
    ],
)
def test_sentences_quote_the_gains(name: str, a: str, b: str, data: str, said: str):
    assert said in PAGE
    check_gain(re.sub(r"(?<![\d.+-])(?=\d)", "+", said), over(name, a, b)[data])


def test_every_study_is_named_and_nothing_else_lies_there():
    for path in MEASURED.glob("*.jsonl"):
        assert f"`{path.stem}`" in PAGE, path.stem
    assert sum(path.is_file() for path in MEASURED.rglob("*")) <= 30
    assert [path.name for path in MEASURED.rglob("*.md")] == ["README.md"]
    assert len(PAGE.split()) <= 1500
