"""Verify stores and repair what needs no teacher."""
