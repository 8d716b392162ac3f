"""Chrome's profile in the desktop, as its files have it."""

from __future__ import annotations

import json
from typing import Any


def chrome_preferences(env: Any) -> dict[str, Any]:
    """The preferences of Chrome's first profile, as they are on disk. Raises FileNotFoundError."""
    path = env.controller.execute_python_command(
        "import os; print(os.path.expanduser('~/.config/google-chrome/Default/Preferences'))"
    )["output"].strip()
    content = env.controller.get_file(path)
    if content is None:
        raise FileNotFoundError(path)
    preferences: dict[str, Any] = json.loads(content)
    return preferences
