"""Evaluation that can be believed: same prompts, same seeds, one measure a file, intervals beside every number."""
