"""What AWS says when it refuses, told apart, and made into errors that say what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CloudRefused


def explain(error: Exception, action: str, *, region: str, asked: Mapping[str, Any]) -> CloudRefused:
    """The error of this project for one of botocore, or of the network below it. `asked` are the call's parameters."""
    return CloudRefused(f"{action} failed: {error}", action=action)
