"""What tests measured, for the end of the run: lines that are printed after its summary."""

from __future__ import annotations

FIGURES: list[str] = []
