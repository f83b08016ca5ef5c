"""Configuration, data loading, engines, training and records: the only folder that knows ranks and schedulers."""
