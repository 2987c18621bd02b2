"""Worlds: what a run trains in. Nothing else in the system knows whether hosts grow there or poles fall."""
