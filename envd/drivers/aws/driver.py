"""`PROVIDER=aws`: each desktop is an EC2 instance of its own."""

from __future__ import annotations

from types import TracebackType
from typing import ClassVar, Self

from ...errors import StartError
from ...settings import Settings
from ..base import Death, Driver, InstanceSpec, Made, Report


class AwsDriver(Driver):
    """Desktops of one daemon in one account and region."""

    name: ClassVar[str] = "aws"

    def __init__(self, settings: Settings, daemon_id: str) -> None:
        self._settings = settings
        self._daemon_id = daemon_id

    async def __aenter__(self) -> Self:
        raise StartError("PROVIDER=aws cannot be used yet.")

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def create(self, spec: InstanceSpec, report: Report) -> Made:
        raise NotImplementedError

    async def destroy(self, instance_id: str) -> None:
        raise NotImplementedError

    async def list(self) -> frozenset[str]:
        raise NotImplementedError

    async def wait(self, instance_id: str) -> Death:
        raise NotImplementedError

    async def log_tail(self, instance_id: str, lines: int = 40) -> tuple[str, ...]:
        return ()
