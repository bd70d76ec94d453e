"""The ASGI application: routes, error shapes and the layers around them."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from qlorachat import __version__
from qlorachat.errors import QlorachatError
from qlorachat_http.access import AccessLog
from qlorachat_http.adapters import adapter_routes
from qlorachat_http.errors import api_error, http_error, validation_error
from qlorachat_http.gate import Gate
from qlorachat_http.routes import public_routes
from qlorachat_http.service import Service


def create_app(service: Service) -> FastAPI:
    """The API over one service; from the outside in: access log, CORS, gate, routes."""
    app = FastAPI(
        title="qlorachat",
        version=__version__,
        openapi_url=None,  # no page that needs no key
        redirect_slashes=False,
    )
    app.include_router(public_routes(service))
    app.include_router(adapter_routes(service))
    _handle_errors(app, service)
    app.add_middleware(Gate, options=service.options)
    if origins := service.options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(AccessLog)
    return app


def _handle_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(QlorachatError)
    async def on_engine_error(request: Request, error: QlorachatError) -> JSONResponse:
        return api_error(error, alive=service.engine.alive).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return http_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error).response()
