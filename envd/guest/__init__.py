"""The outside of a desktop: its guest server and its Chrome, spoken to over HTTP."""

from .cdp import Browser, Cdp
from .client import Executed, Guest

__all__ = ["Browser", "Cdp", "Executed", "Guest"]
