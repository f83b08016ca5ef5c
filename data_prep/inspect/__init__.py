"""Shows people what the quadtree makes of a slide, and what is wrong with a folder of slides.

Others use `look.look_at`, `figure.inspect_slide` and `doctor.examine`.
"""
