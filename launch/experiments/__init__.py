"""Named experiments, each with a full configuration.

Others use `load.load` and `load.all_experiments`.
"""
