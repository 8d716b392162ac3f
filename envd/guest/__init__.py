"""The outside of a desktop: its guest server and its Chrome, spoken to over HTTP."""

from .cdp import Cdp
from .client import Executed, Guest

__all__ = ["Cdp", "Executed", "Guest"]
