"""Leaves shrunk by interpolation: OpenCV's on each leaf alone; tree, counts and ceiling are those of means."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.build.options import BuildOptions, OptionError
from data_prep.inspect.look import look_at
from data_prep.token_files.token_file import read_meta, read_tokens, token_path
from data_prep.token_files.verify import verify_file
from tests.helpers.builds import some_slides

P = 16
TREE = ["--resolution", "2048", "--patch", str(P), "--length", "1500"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One field in a frame twice as wide, so that there is padding, shrunk both ways."""
    folder = tmp_path_factory.mktemp("resample")
    images, masks = some_slides(folder, 1)
    for how in ("mean", "cubic"):
        words = ["build", str(images), "--masks", str(masks), "--out", str(folder / how), *TREE, "--resample", how]
        assert main(words) == 0
    return folder


def test_every_leaf_is_opencvs_interpolation_of_its_pixels(built):
    (path,) = (built / "images").iterdir()
    frame = np.full((2048, 2048, 3), 255, np.uint8)
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    frame[: image.shape[0], : image.shape[1]] = image
    cubic, meta = read_tokens(token_path(built / "cubic", path.stem))
    means, _ = read_tokens(token_path(built / "mean", path.stem))
    for (x, y), side, token in zip(cubic.leaf_xy, cubic.leaf_size, cubic.tokens, strict=True):
        leaf = frame[y : y + side, x : x + side]
        np.testing.assert_array_equal(token, cv2.resize(leaf, (P, P), interpolation=cv2.INTER_CUBIC))
    small = cubic.leaf_size == P
    assert small.any() and np.array_equal(cubic.tokens[small], means.tokens[small])
    large = (cubic.leaf_size > 2 * P) & cubic.content_counts.any((1, 2))
    differ = (cubic.tokens[large] != means.tokens[large]).any(axis=(1, 2, 3))
    assert differ.mean() > 0.7  # all but leaves of one colour
    for name in ("leaf_xy", "leaf_size", "content_counts", "mask_counts"):
        np.testing.assert_array_equal(getattr(cubic, name), getattr(means, name))
    assert meta["params"]["resample"] == "cubic" and verify_file(token_path(built / "cubic", path.stem)) == []
    assert "resample" not in read_meta(token_path(built / "mean", path.stem))["params"]


def test_inspect_shows_the_tokens_of_the_build(built):
    (path,) = (built / "images").iterdir()
    look = look_at(path, BuildOptions(2048, P, length=1500, resample="cubic"))
    np.testing.assert_array_equal(look.token_set.tokens, read_tokens(token_path(built / "cubic", path.stem))[0].tokens)


def test_another_way_is_built_again(built, tmp_path: Path, capsys):
    words = ["build", str(built / "images"), "--out", str(tmp_path), *TREE]
    assert main(words) == main([*words, "--resample", "cubic"]) == 0
    assert "rebuilt: parameter resample None -> cubic" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        {"patching": "uniform", "length": None},
        {"resolution": 8192},
        {"tile_px": 512},
    ],
)
def test_where_it_cannot_be(more):
    with pytest.raises(OptionError, match=r"^--resample cubic: only ") as caught:
        BuildOptions(**{"resolution": 1024, "patch": P, "length": 64, "resample": "cubic"} | more)
    assert "\n" not in str(caught.value)
    assert BuildOptions(8192, P, length=64, resample="cubic", tile_px=8192).resample == "cubic"
