"""Reads the accessibility tree, as a program of its own: `python3 atspi.py tree|terminal SECONDS`.

The bindings of AT-SPI are Debian packages, so this runs with the system's interpreter and not in the agent; a fault in
them, or an application that does not answer, then costs one answer only. It prints one JSON object:
`{"AT": xml, "truncated": bool}` for the tree, `{"output": text or null}` for the terminal that has the focus.
"""

import json
import re
import sys
import time
from importlib import import_module
from typing import Any
from xml.etree import ElementTree

NAMESPACE = "https://accessibility.ubuntu.example.org/ns/"
PREFIXES = {
    "st": "state",
    "attr": "attributes",
    "cp": "component",
    "doc": "document",
    "docattr": "document/attributes",
    "txt": "text",
    "val": "value",
    "act": "action",
}
MAX_DEPTH = 50
MAX_WIDTH = 1024
CALL_MILLISECONDS = 1500
TERMINAL_DEPTH = 16
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NOT_IN_NAMES = re.compile(r"[^\w.-]+")


def main() -> None:
    what, seconds = sys.argv[1], float(sys.argv[2])
    gi: Any = import_module("gi")
    if what == "terminal" and not anything_accessible():
        json.dump({"output": None}, sys.stdout)
        return
    gi.require_version("Atspi", "2.0")
    atspi: Any = import_module("gi.repository.Atspi")
    atspi.init()
    atspi.set_timeout(CALL_MILLISECONDS, CALL_MILLISECONDS)
    reader = Reader(atspi, import_module("gi.repository.GLib").Error, time.monotonic() + seconds)
    desktop = atspi.get_desktop(0)
    if what == "terminal":
        answer: dict[str, Any] = {"output": reader.focused_terminal(desktop)}
    else:
        for prefix, name in PREFIXES.items():
            ElementTree.register_namespace(prefix, NAMESPACE + name)
        tree = reader.tree(desktop)
        answer = {"AT": ElementTree.tostring(tree, encoding="unicode"), "truncated": reader.truncated}
    json.dump(answer, sys.stdout)


def anything_accessible() -> bool:
    """Whether an accessibility bus was ever started. Asked like this, it is not started by the question."""
    gio: Any = import_module("gi.repository.Gio")
    glib: Any = import_module("gi.repository.GLib")
    bus = gio.bus_get_sync(gio.BusType.SESSION)
    question = glib.Variant("(s)", ("org.a11y.Bus",))
    where = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameHasOwner")
    answer = bus.call_sync(*where, question, None, gio.DBusCallFlags.NONE, CALL_MILLISECONDS, None)
    return bool(answer.unpack()[0])


class Reader:
    """Walks accessible objects until `deadline`; what does not answer is left out."""

    def __init__(self, atspi: Any, error: type[Exception], deadline: float) -> None:
        self.atspi = atspi
        self.error = error
        self.deadline = deadline
        self.truncated = False

    def tree(self, desktop: Any) -> ElementTree.Element:
        root = ElementTree.Element("desktop-frame")
        for application in self.children(desktop):
            self.add(root, application, 1)
        for element in root:
            # Evaluators find the browser's address bar under the name that OSWorld's images have for it.
            if element.get("name") == "Chromium":
                element.set("name", "Google Chrome")
        return root

    def add(self, parent: ElementTree.Element, node: Any, depth: int) -> None:
        if depth > MAX_DEPTH or time.monotonic() > self.deadline:
            self.truncated = True
            return
        try:
            element = self.element(node)
        except self.error:  # it went away, or hangs
            return
        parent.append(element)
        for child in self.children(node):
            self.add(element, child, depth + 1)

    def element(self, node: Any) -> ElementTree.Element:
        role = NOT_IN_NAMES.sub("-", (node.get_role_name() or "").strip()) or "unknown"
        element = ElementTree.Element(role, {"name": clean(node.get_name())})
        states = {state.value_nick.replace("-", "_") for state in node.get_state_set().get_states()}
        for state in sorted(states):
            element.set(qualified("st", state), "true")
        for name, value in (node.get_attributes() or {}).items():
            if name:
                element.set(qualified("attr", name), clean(value))
        for describe in (self.document, self.component, self.value, self.actions, self.text):
            try:
                describe(node, element, states)
            except self.error:  # this one interface does not answer
                continue
        return element

    def document(self, node: Any, element: ElementTree.Element, states: set[str]) -> None:
        if (document := node.get_document_iface()) is not None:
            for name, value in (document.get_document_attributes() or {}).items():
                if name:
                    element.set(qualified("docattr", name), clean(value))

    def component(self, node: Any, element: ElementTree.Element, states: set[str]) -> None:
        if not {"visible", "showing"} <= states or (component := node.get_component_iface()) is None:
            return
        box = component.get_extents(self.atspi.CoordType.SCREEN)
        if box.x >= 0 and box.y >= 0 and box.width > 0 and box.height > 0:
            element.set(qualified("cp", "screencoord"), f"({box.x}, {box.y})")
            element.set(qualified("cp", "size"), f"({box.width}, {box.height})")

    def value(self, node: Any, element: ElementTree.Element, states: set[str]) -> None:
        if (value := node.get_value_iface()) is not None:
            element.set(qualified("val", "value"), str(value.get_current_value()))
            element.set(qualified("val", "min"), str(value.get_minimum_value()))
            element.set(qualified("val", "max"), str(value.get_maximum_value()))
            element.set(qualified("val", "step"), str(value.get_minimum_increment()))

    def actions(self, node: Any, element: ElementTree.Element, states: set[str]) -> None:
        if (action := node.get_action_iface()) is None:
            return
        for index in range(action.get_n_actions()):
            name = (action.get_action_name(index) or "").replace(" ", "-")
            if name:
                element.set(qualified("act", f"{name}_desc"), clean(action.get_action_description(index)))
                element.set(qualified("act", f"{name}_kb"), clean(action.get_key_binding(index)))

    def text(self, node: Any, element: ElementTree.Element, states: set[str]) -> None:
        if (text := node.get_text_iface()) is not None and (length := text.get_character_count()) > 0:
            # U+FFFC stands for an embedded object, which is there as a child of its own.
            element.text = clean(text.get_text(0, length)).replace("\ufffc", "").replace("\ufffd", "") or None

    def focused_terminal(self, desktop: Any) -> Any:
        """The text of the terminal that has the focus, or None. Documents are not searched."""
        active = self.atspi.StateType.ACTIVE
        for application in self.children(desktop):
            for window in self.children(application):
                if self.has(window, active) and (found := self.terminal_in(window, 0)) is not None:
                    return found
        return None

    def terminal_in(self, node: Any, depth: int) -> Any:
        role = node.get_role()
        if role == self.atspi.Role.TERMINAL:
            if not self.has(node, self.atspi.StateType.FOCUSED):
                return None
            text = node.get_text_iface()
            return text.get_text(0, text.get_character_count()).rstrip()
        if depth >= TERMINAL_DEPTH or role == self.atspi.Role.DOCUMENT_WEB or time.monotonic() > self.deadline:
            return None
        for child in self.children(node):
            if (found := self.terminal_in(child, depth + 1)) is not None:
                return found
        return None

    def has(self, node: Any, state: Any) -> bool:
        try:
            return bool(node.get_state_set().contains(state))
        except self.error:
            return False

    def children(self, node: Any) -> Any:
        try:
            count = node.get_child_count()
        except self.error:
            return
        self.truncated = self.truncated or count > MAX_WIDTH
        for index in range(min(count, MAX_WIDTH)):
            try:
                child = node.get_child_at_index(index)
            except self.error:
                continue
            if child is not None:
                yield child


def qualified(prefix: str, name: str) -> str:
    local = NOT_IN_NAMES.sub("-", name)
    if not (local[0].isalpha() or local[0] == "_"):
        local = f"_{local}"
    return f"{{{NAMESPACE}{PREFIXES[prefix]}}}{local}"


def clean(text: Any) -> str:
    return NOT_IN_XML.sub("", text or "")


if __name__ == "__main__":
    main()
