"""Shipped weights, each made by a command in this repository (see README.md beside this file)."""
