"""Builds the token files of many slides, resumes after a kill, and keeps the log.

Others use `options.BuildOptions`, `run.build` and `slide.cut_slide`.
"""
