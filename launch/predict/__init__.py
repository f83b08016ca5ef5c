"""Passes a trained model on.

Others use `export_weights.export_weights`.
"""
