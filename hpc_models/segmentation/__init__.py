"""Networks that answer for every cell: UNETR and its decoders, TransUNet, Swin UNETR, U-Net.

Others use `hpc_models.build` with a registered name, and `sliding_window.sliding_window`.
"""
