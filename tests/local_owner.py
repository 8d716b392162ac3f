"""A process that makes one `local` desktop and then only waits: what a daemon is to its desktops.

    python tests/local_owner.py STATE_DIR UNSANDBOXED

Prints the desktop's guest URL once it has one.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from envd.drivers.base import InstanceSpec, Report
from envd.drivers.local import LocalDriver
from envd.settings import Settings


async def main(state_dir: str, unsandboxed: str) -> None:
    settings = Settings(provider="local", state_dir=Path(state_dir), local_unsandboxed=unsandboxed == "True")
    async with LocalDriver(settings, "owner") as driver:
        made = await driver.create(InstanceSpec("a-1", (800, 600)), Report())
        sys.stdout.write(made.endpoints.guest + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
