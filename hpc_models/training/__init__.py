"""Losses, exact metrics, distillation, ASAM and receptive fields, all on one device.

Others use `losses.bce_dice`, `metrics` and `receptive_field.effective_receptive_field`.
"""
