"""Calibration and validation data, one group a file."""
