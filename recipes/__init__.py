"""Hydra YAML only: one file an experiment, and the config groups they compose (``pkg://grpo.recipes``)."""
