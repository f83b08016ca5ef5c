"""Finds the edge pixels of a frame, region by region, exactly as OpenCV does on the whole frame.

Others use `canny.luma`, `canny.blur_for`, `scan.RegionSpec`, `scan.scan_region` and `hysteresis.final_counts`.
"""

AUTO_PERCENT = 90  # of the non-zero gradients lie below the higher of the `auto` thresholds
