"""What a training step costs on any number of gpus, found without any, and what it cost when measured.

Others use `step.count`, `cost.cost`, `report.table`, `inventory.inventory` and `bench.measure`.
`ledger` counts what a step does, and `world` pretends to be one rank of many.
"""
