"""Turns the leaves of a frame into tokens, with the exact mask counts of their cells.

Others use `token_set.TokenSet`, `token_set.rebuild` and `ceiling.ceiling`.
"""
