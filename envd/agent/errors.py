"""What the agent refuses or cannot do, as JSON that says what to do about it.

AgentError                500, something in the desktop failed
├── BadRequest            400, the request cannot be understood
├── NotFound              404, it names something that is not there
└── MissingTool           500, a program of the desktop is not installed
"""

from __future__ import annotations

from typing import Any

from aiohttp import web


class AgentError(Exception):
    """A failure with its HTTP status. `fields` are further members of the JSON answer."""

    status = 500

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def response(self) -> web.Response:
        return problem(self.status, self.message, **self.fields)


class BadRequest(AgentError):
    status = 400


class NotFound(AgentError):
    status = 404


class MissingTool(AgentError):
    def __init__(self, tool: str, package: str) -> None:
        super().__init__(
            f"{tool} is not installed in this desktop: install the Debian package {package} in it",
            tool=tool,
            package=package,
        )


def problem(status: int, message: str, **fields: Any) -> web.Response:
    """An error answer. Old clients read `message` on some endpoints and `error` on others, so both are there."""
    return web.json_response({"status": "error", "message": message, "error": message} | fields, status=status)
