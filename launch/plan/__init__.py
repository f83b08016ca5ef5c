"""`python -m launch plan`: what a training step costs on any number of gpus, found without any; imports nothing itself.

`ledger` counts what a step does, `world` pretends to be one rank of many, `step` makes the step, `cost` turns counts
into seconds and a verdict with a site's facts, `command` looks for a change that fits, `report` prints.
"""
