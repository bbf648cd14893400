"""Hydra configuration groups; installed as ``dqss.conf``."""
