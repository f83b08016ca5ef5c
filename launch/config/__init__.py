"""The checked settings of a run, and the facts of a site.

Others use `config.Config`, `config.ConfigError`, `sites.load_site`. Imports no other room of `launch`.
"""
