"""The networks that read mammograms, by the first word of their experiments."""

MODELS = ("gmic", "def_gmic", "hct", "hct_softmax", "hct_nystrom")
