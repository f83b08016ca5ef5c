"""Mask files of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep.masks.masks import check_mask_size, find_masks, open_mask
from data_prep.slides.base import SlideError
from data_prep.slides.open import open_slide
from tests.helpers.repository import GLOMERULI
from tests.helpers.slide_files import CMU, KIDNEY

# ---- masks


def mask_values(path: Path) -> np.ndarray:
    with open_mask(path) as mask:
        ids = mask.read(0, 0, *mask.size_wh)
        np.testing.assert_array_equal(mask.read(1, 2, 50, 40), ids[2:42, 1:51])
    assert ids.dtype == np.uint8
    return ids


def test_masks_of_every_kind(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 4, (150, 130), dtype=np.uint8)
    two = (ids > 1).astype(np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    pictures = {
        "gray.png": (Image.fromarray(ids), ids),
        "gray16.png": (Image.fromarray(ids.astype(np.uint16)), ids),
        "palette.png": (palette, ids),
        "bit.png": (Image.fromarray(two.astype(bool)), two),
        "rgb.png": (Image.fromarray(ids[..., None].repeat(3, axis=2)), ids),
        "drawn.png": (Image.fromarray(two * 255), two),
        "drawn_rgba.png": (Image.fromarray(np.dstack([two * 255] * 3 + [np.full_like(ids, 255)])), two),
        "la.png": (Image.fromarray(np.dstack([ids, np.full_like(ids, 255)])), ids),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name)
        np.testing.assert_array_equal(mask_values(tmp_path / name), expected, err_msg=name)
    arrays = {
        "ids": (ids, {"photometric": "minisblack"}, ids),
        "drawn": (two * 255, {"photometric": "minisblack"}, two),
        "bit": (two.astype(bool), {"photometric": "minisblack"}, two),
        "bit_inverted": (~two.astype(bool), {"photometric": "miniswhite"}, two),
        "ids16": (ids.astype(np.uint16), {"photometric": "minisblack"}, ids),
        "colours": (ids, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, ids),
    }
    for name, (array, options, expected) in arrays.items():
        for tile in (None, (64, 32)):
            for compression in (None, "deflate", "lzw"):
                path = tmp_path / f"{name}.tif"
                tifffile.imwrite(path, array, tile=tile, compression=compression, metadata=None, **options)
                np.testing.assert_array_equal(mask_values(path), expected, err_msg=f"{name} {tile} {compression}")


def test_255_is_an_id_where_other_ids_are_present(tmp_path: Path) -> None:
    """The rule looks at the whole mask: a corner that happens to hold only 0 and 255 keeps its 255."""
    ids = np.zeros((5000, 2100), np.uint8)
    ids[:100] = 255
    ids[4999, 2099] = 7
    tifffile.imwrite(tmp_path / "x.tif", ids, tile=(256, 256), compression="deflate")
    with open_mask(tmp_path / "x.tif") as mask:
        assert mask.read(0, 0, 1, 1)[0, 0] == 255
    ids[4999, 2099] = 0
    tifffile.imwrite(tmp_path / "x.tif", ids, tile=(256, 256), compression="deflate")
    with open_mask(tmp_path / "x.tif") as mask:
        assert mask.read(0, 0, 1, 1)[0, 0] == 1


def test_bad_masks(tmp_path: Path, rgb: np.ndarray) -> None:
    def mask_error(path: Path) -> str:
        with pytest.raises(SlideError) as caught, open_mask(path) as mask:
            mask.read(0, 0, *mask.size_wh)
        assert str(path) in str(caught.value)
        return str(caught.value)

    Image.fromarray(rgb).save(tmp_path / "colour.png")
    assert "a colour picture, not a mask" in mask_error(tmp_path / "colour.png")
    Image.fromarray(np.full((9, 9), 300, np.uint16)).save(tmp_path / "large.png")
    assert "class id 300 is larger than 255" in mask_error(tmp_path / "large.png")
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((9, 9), np.float32))
    assert "no fixed range" in mask_error(tmp_path / "float.tif")
    assert "must be lossless" in mask_error(KIDNEY)
    assert "no such mask file" in mask_error(tmp_path / "none.png")
    (tmp_path / "text.tif").write_text("nothing")
    assert "not a readable TIFF" in mask_error(tmp_path / "text.tif")


def test_find_a_mask_and_its_size(tmp_path: Path) -> None:
    masks = GLOMERULI / "masks"
    (path,) = find_masks(KIDNEY, masks)
    assert path == masks / "10003.png"
    assert find_masks(CMU, masks) == []
    with pytest.raises(SlideError, match="no such folder of masks"):
        find_masks(KIDNEY, tmp_path / "none")
    Image.new("L", (30, 20)).save(tmp_path / "10003.PNG")
    (found,) = find_masks(KIDNEY, tmp_path)
    with open_slide(KIDNEY) as slide, open_mask(path) as right, open_mask(found) as wrong:
        check_mask_size(slide, right)
        with pytest.raises(SlideError, match=r"mask is 30 x 20 pixels, its slide 10003\.jpg is 1024 x 1024"):
            check_mask_size(slide, wrong)
    (tmp_path / "10003.tif").touch()
    with pytest.raises(SlideError, match=r"several masks for 10003\.jpg: 10003\.PNG, 10003\.tif"):
        find_masks(KIDNEY, tmp_path)


def test_find_masks_of_paip(tmp_path: Path) -> None:
    """Names and suffixes in any case; viable over whole; what is not settled is an error that lists the files."""
    slide = tmp_path / "01_01_0001.SVS"
    masks = tmp_path / "masks"
    masks.mkdir()
    assert find_masks(slide, masks) == find_masks(slide, masks, "both") == []
    xml = masks / "01_01_0001.XML"
    xml.write_text("<Annotations/>")
    (masks / "01_01_00011.xml").write_text("<Annotations/>")
    assert find_masks(slide, masks) == [xml]
    assert find_masks(slide, masks, "viable") == find_masks(slide, masks, "both") == [xml]
    whole, viable = masks / "01_01_0001_WHOLE.TIF", masks / "01_01_0001_viable.tif"
    ids = np.zeros((20, 30), np.uint8)
    ids[2:12, 2:12] = 255
    tifffile.imwrite(whole, ids)
    assert find_masks(slide, masks, "both") == [xml]
    xml.unlink()
    with pytest.raises(SlideError, match=r"01_01_0001\.SVS has 01_01_0001_WHOLE\.TIF but no mask of viable tumour"):
        find_masks(slide, masks, "both")
    ids[:, 6:] = 0
    ids[15] = 1
    tifffile.imwrite(viable, ids // 255 | ids & 1)
    assert find_masks(slide, masks, "viable") == [viable]
    assert find_masks(slide, masks, "whole") == [whole]
    several = r"several masks for .*: 01_01_0001_WHOLE\.TIF, 01_01_0001_viable\.tif; choose with --mask-kind"
    with pytest.raises(SlideError, match=several):
        find_masks(slide, masks)
    with pytest.raises(ValueError, match="choose from viable, whole, both"):
        find_masks(slide, masks, "none")
    with open_mask(find_masks(slide, masks, "both")) as mask:
        drawn = mask.read(0, 0, 30, 20)
        np.testing.assert_array_equal(mask.read(5, 1, 9, 12), drawn[1:13, 5:14])
    expected = np.zeros((20, 30), np.uint8)
    expected[2:12, 2:12] = 1
    expected[2:12, 2:6] = 2
    expected[15] = 2
    np.testing.assert_array_equal(drawn, expected)
    tifffile.imwrite(whole, ids[:19])
    with pytest.raises(SlideError, match=r"mask is 30 x 20 pixels, 01_01_0001_WHOLE\.TIF is 30 x 19"):
        open_mask(find_masks(slide, masks, "both"))
    (masks / "01_01_0001_viable.tiff").touch()
    with pytest.raises(SlideError, match=r"several masks .*_viable\.tif, 01_01_0001_viable\.tiff$"):
        find_masks(slide, masks, "viable")
