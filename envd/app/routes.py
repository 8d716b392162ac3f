"""Every route of the app, in the order in which they are tried. What is here is in the OpenAPI document, too."""

from __future__ import annotations

from starlette.routing import BaseRoute

from . import dashboard, docs, leases, legacy, logs, metrics, recorded, through, v1

ROUTES: tuple[BaseRoute, ...] = (
    *legacy.routes,
    *v1.routes,
    *recorded.routes,
    *through.routes,
    *leases.routes,
    *metrics.routes,
    *logs.routes,
    *docs.routes,
    *dashboard.routes,
)
