"""`/metrics`, for Prometheus."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..telemetry.state import scrape
from .bodies import service_of


async def metrics(request: Request) -> Response:
    """What the daemon counts and measures of itself and its host, as Prometheus reads it: as OpenMetrics, if that is
    accepted. deploy/grafana has a dashboard and alerts for it."""
    text, kind = await scrape(service_of(request), request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": kind, "Cache-Control": "no-store"})


routes = [Route("/metrics", metrics)]
