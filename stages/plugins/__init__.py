"""Registries of plug-ins, references to user code, and the identity of its source."""
