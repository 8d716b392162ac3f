"""The outside of an envd server, for trainers and scripts: `Client`, and `RemoteEnvWorker` in the shape that existing
trainers know. Needs aiohttp, anyio and pydantic; Pillow to decode images."""

from .client import Client, Drain, Limits, Queue, Readiness
from .handle import EnvHandle
from .worker import BlockingRemoteEnvWorker, Observation, RemoteEnvWorker

__all__ = [
    "BlockingRemoteEnvWorker",
    "Client",
    "Drain",
    "EnvHandle",
    "Limits",
    "Observation",
    "Queue",
    "Readiness",
    "RemoteEnvWorker",
]
