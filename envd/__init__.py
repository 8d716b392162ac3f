"""envd: the server side of computer desktops for agent training."""

__version__ = "0.1.0"
