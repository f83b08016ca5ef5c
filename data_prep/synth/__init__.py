"""Makes synthetic slides of any size with masks, for tests and trials.

Others use `pictures.SynthSlide` and `tiff.write_slide`.
"""
