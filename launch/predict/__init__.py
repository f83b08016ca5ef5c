"""Passes a trained model on.

Others use `export_weights.add_export_command`.
"""
