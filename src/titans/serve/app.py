"""The application: all routes, and errors in one form."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from titans.serve import completions, memory_routes
from titans.serve.errors import ApiError, failure_of
from titans.serve.guard import Guard, error_response
from titans.serve.service import Service

# The page is one file, talks to this server alone, and may not be framed.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def application(service: Service) -> ASGIApp:
    """The routes of a server, behind its guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    routers = [completions.routes(service), memory_routes.routes(service)]
    for router in routers:
        app.include_router(router)

    api = dict.fromkeys(
        route.path_format for router in routers for route in router.routes if isinstance(route, Route)
    )
    unknown = f"there is no such route; there are {', '.join(api)}"

    @app.get("/")
    async def page() -> Response:
        content = files("titans.serve").joinpath("page.html").read_text(encoding="utf-8")
        headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff"}
        return HTMLResponse(content, headers=headers)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(
            service.metrics.text(service.gauges()), media_type="text/plain; version=0.0.4"
        )

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def unknown_route(request: Request, error: HTTPException) -> Response:
        messages = {404: unknown, 405: "this route does not take this method"}
        message = messages.get(error.status_code, str(error.detail)[:300])
        response = error_response(ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        # It is raised again after this, and the guard logs it.
        return error_response(failure_of(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    return Guard(app, service)
