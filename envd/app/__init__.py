"""The HTTP face: knows requests, knows no provider. `create_app` puts the routes together."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware

from ..service import Service
from .gate import Gate
from .lasting import Lasting
from .problems import Boundary, exception_handlers
from .routes import ROUTES


def create_app(service: Service) -> Starlette:
    """The ASGI application over a running service."""
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(Boundary, service.metrics, service.tracing),
            Middleware(Gate, service.access, service.settings.request_rate),
            Middleware(Lasting, service.store),
        ],
        exception_handlers=exception_handlers,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app
