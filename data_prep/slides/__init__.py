"""Opens whole-slide files and pictures, reads rectangles of them at any level, and writes tiled pyramids.

Others use `open.open_slide`, `open.slides_in`, `base.Slide`, `base.SlideError` and `pyramid.write_pyramid`.
"""
