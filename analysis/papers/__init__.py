"""The papers' tables as data, alone and joined with measured runs.

Others use `reference`, `tables.paper_table` and `measured_rows.measured_cells`.
"""
