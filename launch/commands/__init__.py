"""The command lines of `python -m launch`.

Others use `jobs.add_job_commands`.
"""
