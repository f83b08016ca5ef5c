"""Scores finished runs again: at other resolutions, and by what their networks see.

Others use `rescore.add_rescore_command` and `receptive_field.add_erf_command`.
"""
