"""What `import envd` gives, and what it must not cost."""

from __future__ import annotations

import subprocess
import sys

import pytest

import envd


def test_the_public_names_are_these() -> None:
    assert envd.__all__ == [
        "BlockingRemoteEnvWorker",
        "Client",
        "RemoteEnvWorker",
        "__version__",
        "create_app",
        "errors",
    ]
    for name in envd.__all__:
        assert getattr(envd, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        envd.nothing  # noqa: B018 - reading it is the test


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param("import envd", ["pydantic", "aiohttp", "starlette"], id="envd costs nothing"),
        pytest.param("import envd.client", ["starlette", "hypercorn", "torch", "PIL"], id="the client needs no server"),
        pytest.param(
            "import envd.daemon, envd.asgi, envd.drivers.sim",
            ["aiodocker", "aioboto3", "pyautogui", "Xlib", "mss", "numpy", "desktop_env"],
            id="the core needs no extra",
        ),
    ],
)
def test_an_import_loads_only_what_it_needs(statement: str, absent: list[str]) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
