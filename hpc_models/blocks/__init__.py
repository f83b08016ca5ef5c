"""Parts that several models share: attention and its kernels, encoders, convolutions, checkpointing.

Others use `attention.Block`, `vit_encoder.ViTEncoder` and `sdpa.attend`.
"""
