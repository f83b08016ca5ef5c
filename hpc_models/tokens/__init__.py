"""Batches of tokens, where their leaves lie, and how they become pictures.

Others use `batch.Batch`, `geometry` and `layout`.
"""
