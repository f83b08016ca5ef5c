"""Turns experiments into sbatch scripts and submits, resumes and sweeps them.

Others use `render.write_all`, `submit.submit_again` and `slurm.sbatch`.
"""
