"""Powers of two, the sides of frames, regions, leaves and patches."""

from __future__ import annotations


def is_power_of_two(value: int) -> bool:
    """True for 1, 2, 4, 8, ..."""
    return value >= 1 and value & (value - 1) == 0


def tree_depth(size_px: int, p_min: int) -> int:
    """Number of splits from the frame to the smallest leaf, log2(size_px / p_min).

    Raises:
        ValueError: p_min or size_px / p_min is not a power of two.
    """
    if not is_power_of_two(p_min):
        raise ValueError(f"the patch must be a power of two, got {p_min}")
    if size_px % p_min or not is_power_of_two(size_px // p_min):
        raise ValueError(f"the resolution must be the patch times a power of two, got {size_px} with patch {p_min}")
    return (size_px // p_min).bit_length() - 1
