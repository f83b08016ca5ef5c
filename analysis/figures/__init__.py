"""Draws the figures of runs and papers.

Others use `draw.draw_all` and `published.draw_published`.
"""
