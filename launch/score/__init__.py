"""Scores finished runs again: at other resolutions, and by what their networks see.

Others use `rescore.rescore` and `receptive_field.measure`.
"""
