"""Cuts a frame into the leaves of a quadtree, or into equal squares.

Others use `quadtree.Leaves`, `quadtree.budget_tree`, `quadtree.threshold_tree` and `uniform.uniform_leaves`.
"""
