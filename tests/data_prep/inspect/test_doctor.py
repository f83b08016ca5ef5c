"""The doctor finds what is wrong with slides and masks, says what to do, and changes nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from data_prep.__main__ import main
from data_prep.inspect.burdens import read_burdens
from data_prep.inspect.doctor import _mask_findings, over_the_folder
from data_prep.slides.base import SlideError
from data_prep.slides.open import open_slide
from tests.helpers.damaged_slides import damaged_slide
from tests.helpers.repository import GLOMERULI, WSI


def doctor(capsys, *args: object) -> tuple[int, str]:
    code = main(["doctor", *map(str, args), "--jobs", "2"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out + captured.err


def write(path: Path, values: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, values, **options)
    return path


def slide(path: Path, mpp: float = 0.5, size: int = 300) -> Path:
    rgb = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    density = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"}
    return write(path, rgb, tile=(128, 128), photometric="rgb", **density)


def test_sound_slides_and_masks(tmp_path: Path, capsys):
    shutil.copy(GLOMERULI / "images" / "10003.jpg", tmp_path)
    shutil.copy(WSI / "CMU-1-Small-Region.svs", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, text = doctor(capsys, tmp_path)
    assert code == 0 and " 0 errors" in text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damage_of_all_kinds(tmp_path: Path, capsys):
    tile = damaged_slide(tmp_path / "tile.tif")
    whole = (WSI / "CMU-1-Small-Region.svs").read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.svs").write_bytes(b"")
    code, text = doctor(capsys, tmp_path, "--json", tmp_path / "found.json")
    assert code == 1
    assert f"tile.tif: a tile of level 0 cannot be decoded: x={tile[1]} y={tile[2]}" in text
    assert "cut.svs: not a slide that can be read" in text and "empty.svs: the file is empty" in text
    found = json.loads((tmp_path / "found.json").read_text())
    assert {f["slide"] for f in found if f["severity"] == "error"} == {"tile.tif", "cut.svs", "empty.svs"}
    assert all(f["remedy"] for f in found)


def test_masks(tmp_path: Path, capsys):
    slides, masks = tmp_path / "s", tmp_path / "m"
    slides.mkdir()
    masks.mkdir()
    for name in ("good", "size", "none", "empty", "colour"):
        slide(slides / f"{name}.tif")
    ids = np.zeros((300, 300), np.uint8)
    ids[50:90, 50:90] = 1
    write(masks / "good.tif", ids, tile=(128, 128))
    write(masks / "size.tif", ids[:200], tile=(128, 128))
    write(masks / "empty.tif", ids * 0, tile=(128, 128))
    write(masks / "colour.tif", np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8), photometric="rgb")
    code, text = doctor(capsys, slides, "--masks", masks)
    assert code == 1
    assert "error    size.tif: mask size.tif is 300 x 200, the slide 300 x 300" in text
    assert "error    none.tif: no mask in" in text
    assert "warning  empty.tif: mask empty.tif is empty" in text
    assert "error    colour.tif: mask colour.tif: a colour picture" in text
    assert "good.tif" not in text


def test_fields_of_view(tmp_path: Path, capsys):
    for part in ("s", "m", "f"):
        (tmp_path / part).mkdir()
    ids = np.zeros((300, 300), np.uint8)
    ids[50:90, 50:90] = 1
    for name in ("good", "size", "none", "empty", "drawn"):
        slide(tmp_path / f"s/{name}.tif")
        write(tmp_path / f"m/{name}.tif", ids, tile=(128, 128))
    for name, view in (("good", ids * 255), ("size", ids[:200]), ("empty", ids * 0)):
        write(tmp_path / f"f/{name}.tif", view, tile=(128, 128))
    ring = [[[10, 10], [200, 10], [200, 200], [10, 10]]]
    drawn = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": ring}, "properties": {"name": "disc"}}
    (tmp_path / "f/drawn.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [drawn]}))
    args = (tmp_path / "s", "--masks", tmp_path / "m", "--fov", tmp_path / "f")
    code, text = doctor(capsys, *args)
    assert code == 1 and ": 3 errors" in text
    assert "error    size.tif: field of view size.tif is 300 x 200, the slide 300 x 300" in text
    assert f"error    none.tif: no field of view in {tmp_path / 'f'}" in text
    assert "error    empty.tif: field of view empty.tif is empty: nothing of the slide would count" in text
    assert "good.tif" not in text


def test_pairs_of_paip(tmp_path: Path, capsys):
    whole = np.zeros((300, 300), np.uint8)
    whole[50:200, 50:200] = 1
    viable = np.zeros_like(whole)
    viable[60:120, 60:120] = 1
    for name, a, b in (("a", whole, viable), ("swapped", viable, whole), ("apart", whole, np.roll(viable, 100, 0))):
        slide(tmp_path / f"{name}.tif")
        write(tmp_path / f"{name}_whole.tif", a)
        write(tmp_path / f"{name}_viable.TIF", b)
    slide(tmp_path / "b_rescan.tif")
    table = tmp_path / "burden.csv"
    table.write_text("wsi_id,pixel ratio\na,0.16\nswapped,16.0\napart.svs,0.9\n")
    code, text = doctor(capsys, tmp_path, "--masks", tmp_path, "--burden", table)
    assert code == 1
    assert "error    swapped.tif: swapped_whole.tif lies inside swapped_viable.TIF: are they swapped?" in text
    assert "warning  apart.tif: " in text and "pixels of apart_viable.TIF lie outside of apart_whole.tif" in text
    assert "note     b_rescan.tif: its name says rescan" in text
    assert "a.tif: burden" in text  # this table mixes percent and fractions, so none of it fits
    assert "a_whole.tif: " not in text


def test_burden_tables(tmp_path: Path):
    one, two, bad = (tmp_path / f"{n}.csv" for n in "123")
    one.write_text("wsi_id,tumor burden\n01_01_0083,0.5\n01_01_0085,0.912\n")
    two.write_text("\ufeffID;;\n", encoding="utf-8")
    with pytest.raises(SlideError, match=r"2\.csv: no column"):
        read_burdens(two)
    two.write_text("name, viable %, note\n01_01_0083.svs, 50%, fine\n01_01_0085.SVS, 91.2, x\n")
    assert read_burdens(one) == pytest.approx({"01_01_0083": 0.5, "01_01_0085": 0.912})
    assert read_burdens(two) == pytest.approx(read_burdens(one))
    assert read_burdens(two, ["tumor burden", "Viable %"]) == read_burdens(two)
    with pytest.raises(SlideError, match=r"1\.csv: 0 columns called area; its columns are wsi_id, tumor burden"):
        read_burdens(one, ["area"])
    two.write_text("name,area,burden\na,512,0.3\nb,77,\n")
    with pytest.raises(SlideError, match=r"2\.csv: several columns of numbers \(area, burden\); say with"):
        read_burdens(two)
    assert read_burdens(two, ["burden"]) == {"a": 0.3}
    bad.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SlideError, match=r"3\.csv: cannot be read"):
        read_burdens(bad)
    bad.write_text("")
    with pytest.raises(SlideError, match=r"3\.csv: no column of numbers"):
        read_burdens(bad)


def test_resolutions_that_no_scanner_has(tmp_path: Path, capsys):
    paths = [slide(tmp_path / f"s{number}.tif", mpp=35.278) for number in range(2)]  # 720 dots per inch
    code, text = doctor(capsys, tmp_path)
    assert code == 0
    assert f"warning  {tmp_path.name}: all 2 slides that say it have 35.278 um per pixel, which no slide" in text
    assert text.count("35.278") == 1 and "2 slides: 0 errors, 1 warning, 0 notes" in text
    found = over_the_folder([*paths, tmp_path / "a.tif"], {paths[0]: 35.278, paths[1]: 0.5, tmp_path / "a.tif": 0.5})
    assert (found[0].slide, found[0].text[:28]) == ("s0.tif", "35.278 um per pixel, which n")


def test_masks_that_are_slow_or_tell_something(tmp_path: Path, monkeypatch):
    slides, masks = tmp_path / "s", tmp_path / "m"
    slides.mkdir()
    masks.mkdir()
    ids = np.zeros((300, 300), np.uint8)
    ids[50:90, 50:90] = 1
    for name in ("strips", "tiles", "drawn"):
        slide(slides / f"{name}.tif")
    write(masks / "strips.tif", ids)
    write(masks / "tiles.tif", ids, tile=(128, 128))
    (masks / "drawn.geojson").write_text(
        json.dumps(
            {
                "type": "FeatureCollection",
                "features": [
                    {"type": "Feature", "geometry": {"type": kind, "coordinates": where}}
                    for kind, where in (("Point", [1, 2]), ("Polygon", [[[0, 0], [9, 0], [9, 9]]]))
                ],
            }
        )
    )
    with open_slide(slides / "drawn.tif") as opened:
        (note,) = _mask_findings(slides / "drawn.tif", opened, masks)
    assert note.severity == "note" and note.text == (
        "mask drawn.geojson: 1 thing drawn has no area and is left out: feature 0 (Point)"
    )
    with open_slide(slides / "strips.tif") as opened:
        assert _mask_findings(slides / "strips.tif", opened, masks) == []
    monkeypatch.setattr("data_prep.inspect.doctor.SLOW_S", 0.0)
    with open_slide(slides / "strips.tif") as opened:
        found = [f.text for f in _mask_findings(slides / "strips.tif", opened, masks)]
    assert len(found) == 1 and found[0].startswith("mask strips.tif has no tiles and took 0.")
    with open_slide(slides / "tiles.tif") as opened:
        assert _mask_findings(slides / "tiles.tif", opened, masks) == []


def test_over_the_folder(tmp_path: Path, capsys):
    for number in range(4):
        slide(tmp_path / f"s{number}.tif")
    slide(tmp_path / "odd.tif", mpp=0.25)
    slide(tmp_path / "UP.TIF")
    shutil.copy(GLOMERULI / "images" / "10003.jpg", tmp_path / "s1.jpg")
    code, text = doctor(capsys, tmp_path)
    assert code == 1
    assert "same name before the suffix: s1.jpg, s1.tif" in text
    assert "odd.tif: 0.250 um per pixel, most have 0.500" in text
    assert "suffixes in two cases: .TIF, .jpg, .tif" in text
    assert "warning  s1.jpg: does not say its micrometres per pixel" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["none"], "no such file or folder"),
        ([".", "--masks", "none"], "--masks none: no such folder"),
        ([".", "--masks", ".", "--fov", "none"], "--fov none: no such folder"),
        ([".", "--fov", "."], "--fov .: only with --masks"),
        ([".", "--masks", ".", "--fov", "."], "--fov .: is the folder of --masks"),
        ([".", "--burden", "x.csv"], "--burden: needs --masks"),
        ([".", "--burden-column", "x"], "--burden-column: needs --burden"),
        ([".", "--json", "none/x.json"], "--json none/x.json: no such folder"),
    ],
)
def test_bad_arguments(args: list[str], words: str, capsys):
    code, text = doctor(capsys, *args)
    assert code == 64 and words in text
