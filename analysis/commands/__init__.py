"""The command lines of `python -m analysis`.

Others use `add_verb` of each module.
"""
