"""Trains one model on all ranks, saves and resumes it, and scores it on the test slides.

Others use `run.train`, `trainer.build_model` and `checkpoint.find_sound`.
"""
