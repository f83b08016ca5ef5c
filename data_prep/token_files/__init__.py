"""Writes, reads, checks, packs and exports the tokens of one slide as one file.

Others use `token_file.read_tokens`, `token_file.write_tokens` and `verify.verify_file`.
"""
