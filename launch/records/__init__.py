"""What a run writes: its folder, record, metrics, environment, times and FLOPs.

Others use `record.write_record`, `record.read_record`, `run_dir.open_run` and `flops.Speed`.
"""
