"""Reads token files and pictures, augments them, and makes batches.

Others use `pictures.open_files`, `token_files.TokenFiles` and `batches.collate`.
"""
