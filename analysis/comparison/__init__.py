"""Compares runs: the table, speedups, pairs, equal quality, gains, trivial baselines.

Others use `table.compare`, `table.comparison_table` and `pair.compare_pair`.
"""
