"""Reads run folders and groups the runs that are compared.

Others use `records.load`, `groups.group_runs`, `run_files.read_curve` and `stats`.
"""
