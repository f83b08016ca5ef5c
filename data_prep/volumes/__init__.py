"""Builds token files from the slices of CT volumes, and scores label volumes.

Others use `build.build_volume` and `score.score_labels`.
"""
