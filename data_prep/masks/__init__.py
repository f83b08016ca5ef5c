"""Opens annotations, as pictures of class ids or as polygons, and reads them like slides.

Others use `masks.find_masks`, `masks.open_mask`, `masks.Mask` and `convert.convert_mask`.
"""
