"""A model of the time of a step, fitted to runs and held against Table III.

Others use `prediction.predict`, `model.fit_records` and `table3.published_table`.
"""
