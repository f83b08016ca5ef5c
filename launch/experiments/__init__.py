"""Named experiments: each is a full configuration.

Others use `load.load` and `load.all_experiments`.
"""
