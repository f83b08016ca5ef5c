"""Geometry against plain loops: exact, for random trees."""

import numpy as np
import pytest
import torch

from hpc_models.tokens.batch import cut_patches, join_patches, uniform_batch
from hpc_models.tokens.geometry import halo_patches, morton_code, owner_map, paint, raster_to_cells, tokens_to_grid
from tests.helpers.trees import painted, random_batch


def where(batch):
    return batch["leaf_xy"], batch["leaf_size"], batch["valid"]


def test_morton_interleaves_bits_with_x_lowest_up_to_31_bits():
    rng = np.random.default_rng(0)
    xy = rng.integers(0, 2**31, (200, 2))
    codes = morton_code(torch.from_numpy(xy)).tolist()
    for (x, y), code in zip(xy.tolist(), codes, strict=True):
        assert code == sum((x >> i & 1) << 2 * i | (y >> i & 1) << 2 * i + 1 for i in range(31))


@pytest.mark.parametrize("side", [1, 4, 8, 16, 64, 128])
@pytest.mark.parametrize("shuffle", [False, True])
def test_owner_map_is_the_leaf_that_covers_the_centre(side, shuffle):
    batch, _, _ = random_batch(side, 64, 4, images=3)
    if shuffle:
        order = torch.randperm(batch["valid"].shape[1], generator=torch.Generator().manual_seed(0))
        batch = {k: v[:, order] for k, v in batch.items()}
    owner = owner_map(*where(batch), 64, side)
    for b in range(3):
        for r in range(side):
            for c in range(side):
                x, y = (2 * c + 1) * 64 // (2 * side), (2 * r + 1) * 64 // (2 * side)
                i = int(owner[b, r, c])
                assert batch["valid"][b, i]
                (lx, ly), s = batch["leaf_xy"][b, i].tolist(), int(batch["leaf_size"][b, i])
                assert lx <= x < lx + s and ly <= y < ly + s


def test_a_missing_leaf_leaves_a_hole():
    batch, _, _ = random_batch(3, 32, 4, images=1)
    gone = 2
    hole = batch["leaf_xy"][0, gone].tolist(), int(batch["leaf_size"][0, gone])
    batch["valid"][0, gone] = False
    owner = owner_map(*where(batch), 32, 32)[0]
    (x, y), s = hole
    assert (owner[y : y + s, x : x + s] == -1).all()
    assert (owner == -1).sum() == s * s
    grid = tokens_to_grid(torch.ones(1, batch["valid"].shape[1], 2), owner[None])
    assert torch.equal(grid[0, 0] == 0, owner == -1)
    picture = paint(torch.ones(1, batch["valid"].shape[1], 4, 4, 1), *where(batch), 32, 16)
    assert torch.equal(picture[0, 0] == 0, owner[::2, ::2] == -1)


@pytest.mark.parametrize("side", [128, 64, 32, 8, 2, 1])
def test_paint_is_the_box_mean_of_the_full_picture(side):
    batch, _, _ = random_batch(5, 64, 4, images=2, classes=1)
    out = paint(batch["tokens"], *where(batch), 64, side)
    for b in range(2):
        full = painted(batch["tokens"][b].numpy(), batch, b, 64)
        if side >= 64:
            expected = full.repeat(side // 64, 0).repeat(side // 64, 1)
        else:
            expected = full.reshape(side, 64 // side, side, 64 // side, 3).mean((1, 3))
        np.testing.assert_allclose(out[b].permute(1, 2, 0), expected, atol=1e-6)
    if side == 64:
        assert torch.equal(
            out[0, 0].double(), torch.from_numpy(painted(batch["tokens"][0].numpy(), batch, 0, 64))[..., 0]
        )


@pytest.mark.parametrize("side", [128, 64, 32, 8, 1])
def test_raster_to_cells_is_the_mean_or_the_nearest(side):
    batch, _, _ = random_batch(6, 64, 4, images=2)
    raster = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    cells = raster_to_cells(raster, *where(batch)[:2], 64, 4)
    for b in range(2):
        for i in torch.nonzero(batch["valid"][b])[:, 0].tolist():
            (x, y), s = batch["leaf_xy"][b, i].tolist(), int(batch["leaf_size"][b, i])
            for r in range(4):
                for c in range(4):
                    y0, y1 = ((4 * y + k * s) * side / 256 for k in (r, r + 1))
                    x0, x1 = ((4 * x + k * s) * side / 256 for k in (c, c + 1))
                    a, d = int(y0), max(int(y0) + 1, int(y1))
                    e, f = int(x0), max(int(x0) + 1, int(x1))
                    expected = raster[b, :, a:d, e:f].mean((1, 2))
                    torch.testing.assert_close(cells[b, i, r, c], expected, atol=1e-6, rtol=0)


def test_paint_then_read_gives_the_cells_back_exactly():
    batch, _, _ = random_batch(7, 64, 4, images=2)
    picture = paint(batch["tokens"], *where(batch), 64, 64)
    back = raster_to_cells(picture, *where(batch)[:2], 64, 4)
    torch.testing.assert_close(back[batch["valid"]], batch["tokens"][batch["valid"]], atol=1e-6, rtol=0)


def test_frame_of_65536_pixels_does_not_overflow():
    size = 65536
    xy = torch.tensor([[[0, 0], [size // 2, 0], [0, size // 2], [size // 2, size // 2]]])
    batch = (xy, torch.full((1, 4), size // 2), torch.ones(1, 4, dtype=torch.bool))
    assert owner_map(*batch, size, 4)[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    values = torch.arange(16.0).reshape(1, 4, 2, 2, 1)
    picture = paint(values, *batch, size, 4)
    assert picture[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(raster_to_cells(picture, xy, batch[1], size, 2), values)


@pytest.mark.parametrize("halo", [1, 2])
def test_halo_of_uniform_leaves_is_the_picture_around_them(halo):
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    batch = uniform_batch(image, 8)
    wide = halo_patches(batch["tokens"], *where(batch), 32, halo)
    around = torch.nn.functional.pad(image, (halo,) * 4)
    for i, (x, y) in enumerate(batch["leaf_xy"][0].tolist()):
        expected = around[:, :, y : y + 8 + 2 * halo, x : x + 8 + 2 * halo].permute(0, 2, 3, 1)
        assert torch.equal(wide[:, i], expected)


def test_halo_of_a_tree_samples_the_neighbour_at_the_cells_centre():
    batch, _, _ = random_batch(8, 64, 4, images=1)
    wide = halo_patches(batch["tokens"], *where(batch), 64, 2)[0].numpy()
    full = painted(batch["tokens"][0].numpy(), batch, 0, 64)
    for i in torch.nonzero(batch["valid"][0])[:, 0].tolist():
        (x, y), cell = batch["leaf_xy"][0, i].tolist(), int(batch["leaf_size"][0, i]) // 4
        for r in range(-2, 6):
            for c in range(-2, 6):
                py, px = y + r * cell + cell // 2, x + c * cell + cell // 2
                expected = full[py, px] if 0 <= py < 64 and 0 <= px < 64 else np.zeros(3)
                np.testing.assert_array_equal(wide[i, r + 2, c + 2], expected.astype(np.float32))


def test_cut_and_join_are_inverse_and_uniform_batch_is_in_morton_order():
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(join_patches(cut_patches(image, 8), 4, 4), image)
    batch = uniform_batch(image, 8)
    codes = morton_code(batch["leaf_xy"][0])
    assert (codes[1:] > codes[:-1]).all()
    for i, (x, y) in enumerate(batch["leaf_xy"][0].tolist()):
        assert torch.equal(batch["tokens"][:, i], image[:, :, y : y + 8, x : x + 8].permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="multiple of 8"):
        uniform_batch(torch.rand(1, 3, 20, 20), 8)
