"""How numbers are written and figures look.

Others use `formats.Table`, `formats.markdown`, `figure_style.new_figure`.
"""
