"""Shares work among processes and MPI ranks, so that each slide is done once.

Others use `queue.Queue`, `pool.run_pool` and `mpi.share`.
"""
