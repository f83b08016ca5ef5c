"""Opens annotations, as pictures of class ids or as polygons, and reads them like slides.

Others use `masks.find_masks`, `masks.open_mask`, `masks.Mask` and `convert.convert_mask`.
"""

#: What a build takes of an annotation with whole tumour and viable tumour (PAIP 2019), and their class ids.
KINDS = ("viable", "whole", "both")
WHOLE, VIABLE = 1, 2
