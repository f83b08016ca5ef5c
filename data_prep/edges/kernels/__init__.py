"""Compiled loops under the edges: maxima of gradients, connected components, sums."""
