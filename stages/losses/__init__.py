"""Distillation losses, one paper per file.

Start at `base.py`, the contract of a loss; `registry.py` lists all, and `distillation.py` computes their weighted sum.
"""
