"""Compiled loops under the edges: maxima of gradients, connected components, sums.

Others use `maxima.maxima`, `sums.take` and `jit.compiled`.
"""
