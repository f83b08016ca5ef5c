"""Writes one self-contained page of a folder of runs.

Others use `page.write_report`.
"""
