"""`python -m analysis erf`: figures of measured fields, and files that are none."""

import json

import numpy as np
import pytest
from PIL import Image

from analysis.__main__ import main
from analysis.figures.receptive_field import draw, read_field, shrunk


def write(path, values, **about):
    np.savez(
        path,
        map=values,
        profile_row=values.sum(1),
        profile_col=values.sum(0),
        about=json.dumps({"experiment": path.stem, "images": 3, "pictures": "noise", "weights": None, **about}),
    )
    return path


@pytest.fixture
def files(tmp_path):
    y, x = np.mgrid[:600, :400]
    bell = np.exp(-((y - 300) ** 2 + (x - 200) ** 2) / 2 / 40**2) * (np.hypot(y - 300, x - 200) < 120)
    return [
        write(tmp_path / "gmic.npz", bell),
        write(tmp_path / "hct.npz", 0.1 + bell[:, ::-1], weights="runs/hct"),
    ]


def test_figures_of_two_fields(files, tmp_path, capsys):
    assert main(["erf", *map(str, files), "--out", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    assert "gmic: 3 pictures (noise), weights as initialised" in out
    assert "hct: 3 pictures (noise), weights runs/hct" in out
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["erf.pdf", "erf.png", "erf.svg"]
    with Image.open(tmp_path / "plots" / "erf.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 20


@pytest.fixture
def drawing(files):
    return draw([read_field(path) for path in files])


def test_maps_are_drawn_plain_and_as_square_roots(drawing, files):
    assert "gmic reaches 239 x 239 px of 600 x 400; hct reaches 600 x 400 px of 600 x 400" in drawing.alt
    maps = [axis for axis in drawing.figure.axes if axis.images]
    assert [axis.get_ylabel() for axis in maps] == ["field", "square root", "", ""]
    plain, root = (np.asarray(axis.images[0].get_array()) for axis in maps[:2])
    np.testing.assert_allclose(root**2, plain)
    alone = draw([read_field(files[0])])
    assert len([axis for axis in alone.figure.axes if axis.images]) == 2


def test_profiles_of_rows_and_columns_are_in_pixels_and_percent(drawing):
    rows, cols = (axis for axis in drawing.figure.axes if axis.lines)
    x, y = rows.lines[0].get_data()  # 600 rows in means of 6, 400 columns in means of 4
    assert len(x) == 100 and abs(x[np.argmax(y)]) < 6 and x[0] == -297.5 and x[1] - x[0] == 6
    assert 6 * sum(y) == pytest.approx(100)
    x, y = cols.lines[1].get_data()
    assert len(x) == 100 and x[-1] == 197.5 and 4 * sum(y) == pytest.approx(100)
    assert [line.get_label() for line in cols.lines] == ["gmic", "hct"]
    assert [text.get_text() for text in drawing.figure.legends[0].get_texts()] == ["gmic", "hct"]


def test_a_map_of_a_large_frame_is_drawn_in_the_frames_pixels(tmp_path):
    values = np.zeros((80, 80))
    values[30:50, 36:44] = 1.0
    drawing = draw([read_field(write(tmp_path / "apf.npz", values, pixel_px=16))])
    assert "apf reaches 320 x 128 px of 1280 x 1280" in drawing.alt
    assert drawing.figure.axes[0].get_title() == "apf\n1280 x 1280 px"
    rows = next(axis for axis in drawing.figure.axes if axis.lines)
    x, y = rows.lines[0].get_data()
    assert x[1] - x[0] == 16 and 16 * sum(y) == pytest.approx(100) and x[y > 0][[0, -1]].tolist() == [-160, 144]


def test_maps_are_shrunk_by_box_means():
    values = np.arange(7 * 4, dtype=float).reshape(7, 4)
    small = shrunk(values, 3)  # squares of 3: the rest of one row and one column is cut off
    assert small.shape == (2, 1) and small[0, 0] == values[:3, :3].mean()
    assert shrunk(values, 7) is not None and np.array_equal(shrunk(values, 7), values)


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("nowhere.npz", 1, "nowhere.npz: No such file"),
        ("text.npz", 1, "text.npz: not an npz file that `python -m launch erf` wrote"),
        ("other.npz", 1, "other.npz: has no map"),
        ("zero.npz", 1, "zero.npz: map must be two-dimensional, not negative and not all zero"),
    ],
)
def test_what_is_no_field_is_told_in_one_line(tmp_path, capsys, name, code, line):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", a=1)
    write(tmp_path / "zero.npz", np.zeros((4, 4)))
    assert main(["erf", str(tmp_path / name), "--out", str(tmp_path / "plots")]) == code
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and line in errors[0]
    assert not (tmp_path / "plots").exists()


def test_too_many_files_are_refused(files, capsys):
    assert main(["erf", *[str(files[0])] * 6]) == 64
    assert "at most 5 files" in capsys.readouterr().err
