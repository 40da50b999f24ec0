"""The chat page and its files. They need no key, since the page itself asks for it."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from teal_fast.server.errors import ApiError

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # Nothing from elsewhere and no inline script: what a model writes could not run even if it became markup.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # asked for anew with its ETag: an upgrade shows at once
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def page_file(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    if name not in {path.name for path in FOLDER.iterdir() if path.suffix in TYPES}:
        raise ApiError(404, f"the page has no file {name[:100]!r}")
    return FileResponse(FOLDER / name, headers=HEADERS, media_type=TYPES[Path(name).suffix])


PAGE = [Route("/", page_file), Route("/page/{name}", page_file)]
