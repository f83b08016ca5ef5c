"""The settings of each model.

Others use `table.MODELS`.
"""
