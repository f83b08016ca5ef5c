"""Networks that answer once per picture: ViT, HIPT, HCT, GMIC, HIRI-ViT, RIViT.

Others use `hpc_models.build` with a registered name.
"""
