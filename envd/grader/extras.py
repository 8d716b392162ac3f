"""Metrics and a getter that newer task files name and desktop-env 1.0.2 lacks. A later version's own take precedence.

What they must do follows from the tasks that use them: vlc/5ac2891a (check_play_and_exit), multi_apps/e8172110
(check_structure_sim_with_threshold, option `ssim_threshold`) and chrome/93eabf48 (chrome_appearance_mode_ui gives
light, dark or system).
"""

from __future__ import annotations

import re
from typing import Any

from . import profile

_MODES = {0: "system", 1: "light", 2: "dark"}
"""Chrome's ThemeService::BrowserColorScheme, as its preferences have it."""
_SHOWN = {"light": "light", "dark": "dark", "device": "system", "system": "system"}
"""What the settings page calls them, in English."""

_COLOR_SCHEME_JS = """() => {
  const find = root => {
    for (const element of root.querySelectorAll('*')) {
      if (element.tagName === 'SELECT' && /color.?scheme/i.test(element.id)) return element;
      const inside = element.shadowRoot && find(element.shadowRoot);
      if (inside) return inside;
    }
    return null;
  };
  const select = find(document);
  return select && select.selectedOptions[0] ? select.selectedOptions[0].text : '';
}"""
"""The text of the settings page's dropdown (`colorSchemeModeSelect` in Chromium); shadow roots are nested in it."""


def check_play_and_exit(config_path: str | None, rule: dict[str, Any]) -> float:
    """Whether VLC's `play-and-exit` is what the rule expects. VLC writes settings that differ from their default and
    comments out the others; the default of this one is 0."""
    if config_path is None:
        return 0.0
    with open(config_path, encoding="utf-8", errors="replace") as file:
        written = re.findall(r"(?m)^\s*play-and-exit\s*=\s*(\S+)", file.read())
    return float((written[-1] if written else "0") == str(rule["expected_play_and_exit"]))


def check_structure_sim_with_threshold(
    result_path: str | None, expected_path: str | None, ssim_threshold: float = 0.9
) -> float:
    """Whether two pictures of one size are alike: structural similarity of their RGB of at least the threshold."""
    if result_path is None or expected_path is None:
        return 0.0
    import numpy
    from PIL import Image
    from skimage.metrics import structural_similarity

    with Image.open(result_path) as result, Image.open(expected_path) as expected:
        if result.size != expected.size or min(result.size) < 7:
            return 0.0
        pictures = [numpy.asarray(picture.convert("RGB")) for picture in (result, expected)]
    return float(structural_similarity(*pictures, channel_axis=2) >= ssim_threshold)


def get_chrome_appearance_mode_ui(env: Any, config: dict[str, Any]) -> str:
    """light, dark or system. From a settings page that is open, without touching the tabs; else from the preferences,
    which Chrome writes a few seconds after a change."""
    return _mode_of_open_page(env) or _mode_of_preferences(env)


def _mode_of_open_page(env: Any) -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.connect_over_cdp(f"http://{env.vm_ip}:{env.chromium_port}")
        pages = [page for context in browser.contexts for page in context.pages]
        for page in pages:
            if page.url.startswith("chrome://settings/appearance"):
                shown = page.evaluate(_COLOR_SCHEME_JS).strip().lower()
                if shown in _SHOWN:
                    return _SHOWN[shown]
    return None


def _mode_of_preferences(env: Any) -> str:
    theme = profile.chrome_preferences(env).get("browser", {}).get("theme", {})
    return _MODES.get(theme.get("color_scheme2", theme.get("color_scheme", 0)), "system")
