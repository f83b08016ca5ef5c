"""Finds the edge pixels of a frame, region by region, exactly as OpenCV does on the whole frame.

Others use `canny.luma`, `canny.blur_for`, `region_spec.RegionSpec`, `scan.scan_region` and `region.final_counts`.
"""

AUTO_PERCENT = 90  # of the non-zero gradients lie below the higher of the `auto` thresholds
