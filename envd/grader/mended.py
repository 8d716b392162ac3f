"""Getters of desktop-env 1.0.2 whose value says something else than what their tasks ask: ours stand in their place.

data_delete_automacally  asks whether Chrome deletes what sites saved when it closes, by looking whether its
                         preferences have any default for content at all. Chrome and Debian write such defaults by
                         themselves, so the value was "true" on a desktop that nobody had touched (seen with the public
                         task 99146c54).
"""

from __future__ import annotations

from typing import Any

from . import profile

_SESSION_ONLY = 4
"""ContentSetting of cookies that go when the browser closes."""


def get_data_delete_automacally(env: Any, config: dict[str, Any]) -> str:
    """true or false."""
    defaults = profile.chrome_preferences(env).get("profile", {}).get("default_content_setting_values", {})
    return "true" if defaults.get("cookies") == _SESSION_ONLY else "false"
