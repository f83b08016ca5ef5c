"""Opens whole-slide files and pictures and reads rectangles of them at any level.

Others use `open.open_slide`, `open.slides_in`, `base.Slide` and `base.SlideError`.
"""
