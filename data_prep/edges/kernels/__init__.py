"""Compiled loops under the edges: maxima of gradients, connected components, sums.

Others use `pixels.take`, `pixels.maxima`, `components.components` and `jit.kernel`.
"""
