"""The `env` that getters are given, and the controller in it.

It has what getters of desktop-env 1.0.2 read (found by reading them), with the meaning that they expect. Other than
upstream's controller, this one never turns a failure into None: None is what the guest itself says is not there.
"""

from __future__ import annotations

import json
from typing import Any

from .ledger import GuestFailure, Ledger
from .network import Guest

PREFIX = "import pyautogui; import time; pyautogui.FAILSAFE = False; "
"""What goes before each program in the guest (osworld guest protocol; tasks rely on these imports)."""


class Controller:
    """The guest server's calls, by the names that getters use. Raises GuestFailure."""

    def __init__(self, guest: Guest, ledger: Ledger) -> None:
        self._guest = guest
        self._ledger = ledger

    def get_screenshot(self) -> bytes:
        body = self._guest.ask("GET", "/screenshot").body
        if not body.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
            raise GuestFailure(f"The guest's /screenshot is no picture but {body[:80]!r}.")
        return body

    def get_accessibility_tree(self) -> str:
        return self._text("GET", "/accessibility", "AT")

    def get_terminal_output(self) -> str | None:
        """None when no terminal is open."""
        answer = self._guest.ask("GET", "/terminal").json()
        if "output" not in answer or not isinstance(answer["output"], str | None):
            raise GuestFailure(f"The guest's /terminal has no output: {str(answer)[:200]}")
        return answer["output"]

    def get_file(self, file_path: str) -> bytes | None:
        """None when the guest says that there is no such file, or that it cannot be read."""
        answer = self._guest.ask("POST", "/file", data={"file_path": file_path}, accept=(200, 400, 404, 500))
        if answer.status == 200:
            return answer.body
        said = answer.json()  # not the guest server's own words: GuestFailure
        if answer.status == 404:
            self._ledger.absent.add(file_path)
        else:
            self._ledger.warn(f"The guest cannot give {file_path}: {str(said)[:300]}")
        return None

    def execute_python_command(self, command: str) -> dict[str, Any]:
        """Its `output` is what getters use, mostly a path: a program that failed has none to give."""
        answer = self._guest.execute(["python", "-c", PREFIX + command])
        if answer["returncode"] != 0:
            raise GuestFailure(
                f"Python in the guest failed with {answer['returncode']}: {str(answer.get('error'))[-400:]}"
            )
        return answer

    def get_vm_platform(self) -> str:
        return str(self.execute_python_command("import platform; print(platform.system())")["output"]).strip()

    def get_vm_machine(self) -> str:
        return str(self.execute_python_command("import platform; print(platform.machine())")["output"]).strip()

    def get_vm_screen_size(self) -> dict[str, Any]:
        return self._size(self._guest.ask("POST", "/screen_size").json())

    def get_vm_window_size(self, app_class_name: str) -> dict[str, Any] | None:
        """None when no window is of that class: old guests answer 500 to that, in HTML, newer ones 404."""
        answer = self._guest.ask(
            "POST", "/window_size", data={"app_class_name": app_class_name}, accept=(200, 404, 500)
        )
        if answer.status == 200:
            return self._size(answer.json())
        self.get_vm_screen_size()  # it fails when the 500 meant that the guest is not well
        self._ledger.warn(f"The guest knows no window of class {app_class_name}.")
        return None

    def get_vm_wallpaper(self) -> bytes | None:
        """None when the guest says that there is none."""
        answer = self._guest.ask("POST", "/wallpaper", accept=(200, 404))
        return answer.body if answer.status == 200 else None

    def get_vm_desktop_path(self) -> str:
        return self._text("POST", "/desktop_path", "desktop_path")

    def get_vm_directory_tree(self, path: str) -> dict[str, Any] | None:
        """None when the guest says that there is no such directory."""
        answer = self._guest.ask("POST", "/list_directory", json={"path": path}, accept=(200, 400))
        said = answer.json()
        if answer.status == 400:
            self._ledger.absent.add(path)
            return None
        tree = said.get("directory_tree")
        if not isinstance(tree, dict):
            raise GuestFailure(f"The guest's /list_directory has no tree: {str(said)[:200]}")
        return tree

    def _text(self, method: str, path: str, key: str) -> str:
        answer = self._guest.ask(method, path).json()
        if not isinstance(answer.get(key), str):
            raise GuestFailure(f"The guest's {path} has no {key}: {str(answer)[:200]}")
        return str(answer[key])

    @staticmethod
    def _size(answer: dict[str, Any]) -> dict[str, Any]:
        if not all(isinstance(answer.get(side), int) for side in ("width", "height")):
            raise GuestFailure(f"The guest tells no size: {json.dumps(answer)[:200]}")
        return answer


class Env:
    """Ports are text, since some getters of 1.0.2 add them to text (getters/chrome.py, get_page_info)."""

    def __init__(self, request: dict[str, Any], cache_dir: str, controller: Controller) -> None:
        guest = request["guest"]
        self.vm_ip = guest["host"]
        self.server_port = str(guest["server_port"])
        self.chromium_port = str(guest["chromium_port"])
        self.vnc_port = str(guest["vnc_port"])
        self.vlc_port = str(guest["vlc_port"])
        self.controller = controller
        self.cache_dir = cache_dir
        self.vm_platform = request["platform"]
        self.vm_machine = request["machine"]
        width, height = request["screen"]
        self.vm_screen_size = {"width": width, "height": height}
        self.screen_width, self.screen_height = width, height
        self.current_use_proxy = bool(request.get("proxy", False))
        self.client_password = request["client_password"]
