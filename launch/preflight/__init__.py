"""Checks the nodes of a job before it trains: GEMM, memory, all-reduce, disk, clock.

Others use `nodes.check_nodes`.
"""
