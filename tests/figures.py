"""What tests have counted and somebody may want to read: printed below their summary (conftest.py)."""

FIGURES: list[str] = []
"""Lines."""
