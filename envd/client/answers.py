"""An answer of the server, read whole: as JSON, or as the error that it stands for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import ValidationError

from ..errors import EnvdError, InfraError, Problem, RequestError, ServerUnreachable, from_problem


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    content_type: str
    retry_after: float | None
    body: bytes
    request: str
    """Method and URL, for messages."""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Raises InfraError when the body is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise InfraError(
                f"{self.request} was answered with {self.content_type or 'no content type'} where JSON was due: "
                f"{_excerpt(self.body)}",
                hint="Is it an envd server that listens there, and nothing in between?",
            ) from error

    def object(self) -> dict[str, Any]:
        """Raises InfraError when the body is not a JSON object."""
        value = self.json()
        if not isinstance(value, dict):
            raise InfraError(f"{self.request} was answered with {_excerpt(self.body)} where a JSON object was due.")
        return value

    def error(self) -> EnvdError:
        """The typed error that a non-2xx answer stands for."""
        if self.content_type == "application/problem+json":
            try:
                error = from_problem(Problem.model_validate_json(self.body))
            except ValidationError:
                pass
            else:
                error.retry_after = self.retry_after if error.retry_after is None else _bounded(error.retry_after)
                return error
        detail = f"{self.request} was answered {self.status}: {_excerpt(self.body)}"
        if self.status in (502, 503, 504) and self.content_type != "application/json":
            return ServerUnreachable(
                detail,
                hint="A proxy in between does not reach envd: is it running?",
                retry_after=self.retry_after,
                outcome="unknown",
            )
        # An older server's words, or something else on that port.
        cls = InfraError if self.status >= 500 else RequestError
        return cls(detail, retry_after=self.retry_after, http_status=self.status)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from either form that RFC 9110 allows; None when it is absent or unreadable."""
    value = headers.get("Retry-After", "").strip()
    try:
        return _bounded(float(value))
    except ValueError:
        pass
    try:
        return _bounded(parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _bounded(seconds: float) -> float:
    """From nothing to a day, also of what is no number."""
    return min(max(0.0, seconds), 86_400.0)


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:2000].decode(errors="replace").split())
    return text[:200] + ("…" if len(text) > 200 else "") if text else "an empty body"
