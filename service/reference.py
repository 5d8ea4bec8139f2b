"""The pages that show the API in a browser, `/docs` and `/redoc`; their viewers are files of a package, so no page needs the internet."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

_VIEWERS = "/docs/viewers"

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def swagger(request: Request) -> HTMLResponse:
    root = _root(request)
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{root}{_VIEWERS}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{_VIEWERS}/swagger-ui.css",
        swagger_favicon_url=f"{root}{_VIEWERS}/favicon.png",
    )


@router.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    root = _root(request)
    return get_redoc_html(
        openapi_url=f"{root}/openapi.json",
        title=request.app.title,
        redoc_js_url=f"{root}{_VIEWERS}/redoc.standalone.js",
        redoc_favicon_url=f"{root}{_VIEWERS}/favicon.png",
        with_google_fonts=False,
    )


def add_reference(app: FastAPI) -> None:
    """Adds both pages to an application made with `docs_url=None` and `redoc_url=None`."""
    app.mount(_VIEWERS, StaticFiles(directory=str(files("fastapi_offline") / "static")), name="viewers")
    app.include_router(router)


def _root(request: Request) -> str:
    """What a proxy took off the front of the path."""
    return str(request.scope.get("root_path", "")).rstrip("/")
