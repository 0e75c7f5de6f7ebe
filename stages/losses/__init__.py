"""Distillation losses, one paper per file."""
