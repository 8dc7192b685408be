"""The page as a web application: one page and one address that draws, nothing else."""

import json
import pathlib
import sys
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from twinflow_jax.errors import UserError
from twinflow_jax.serving.networks import STATES
from twinflow_jax.serving.studio import Studio
from twinflow_jax.serving.wish import COUNTS, EVALUATIONS, LARGEST, Wish

TEMPLATE = pathlib.Path(__file__).with_name("page.html")
# The page fetches nothing from elsewhere, and no other page shows it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def create(studio: Studio, hosts: list[str]) -> Starlette:
    """The application. hosts: the names that it answers to: another site's page cannot reach it
    under a name of its own."""
    about = {
        "checkpoints": [network.about for network in studio.networks],
        "evaluations": EVALUATIONS, "counts": COUNTS, "states": STATES,
    }
    data = json.dumps(about).replace("<", r"\u003c")  # which could end the script that holds it
    page = TEMPLATE.read_text().replace("ABOUT_AS_JSON", data)

    async def show(request: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def draw(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "the request is not the page's"}, 415)
        try:
            wish = Wish.of(await body(request), len(studio.networks))
            studio.check_room()
        except UserError as error:
            print(f"refused: {error}", file=sys.stderr)
            return JSONResponse({"error": str(error)}, 400)

        async def lines() -> AsyncIterator[str]:
            async for event in studio.events(wish):
                yield json.dumps(event) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    routes = [Route("/", show), Route("/draw", draw, methods=["POST"])]
    return Starlette(routes=routes, middleware=[
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    ])


async def body(request: Request) -> bytes:
    """A request's body, or its start where it is longer than any wish."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LARGEST:
            break
    return bytes(found)
