"""The web server of a game: one page, and a WebSocket that carries commands and pictures.

It listens on this machine alone, or with a token that the page's address has to have. A page of another site may open
WebSockets to this machine, and a name of another site may be made to lead here: so the origin has to be this server's
own, and without a token its name has to be one of this machine.
"""

import asyncio
import collections
import contextlib
import hashlib
import json
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from worldmodel.play.game import REFUSED, Game, said
from worldmodel.runs.fields import ConfigurationError
from worldmodel.runs.optional_dependencies import missing

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect
except ImportError as error:
    raise missing(error, "play in a browser (or give --text)", "pip install 'wmkernels[play]'") from error

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_COMMAND = 4096  # characters
MOST_WAITING = 64  # messages that a page has not taken
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Server:
    """Serves ``game``; several pages see the same worlds.

    Args:
        game: that is played.
        token: that addresses have to have; None for this machine alone.
    """

    def __init__(self, game: Game, token: str | None = None) -> None:
        self.game, self.token = game, token
        self._pages: set[_Page] = set()
        files = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
        routes = [Route(path, self._file(name)) for path, name in files.items()]
        self.app = Starlette(routes=[*routes, WebSocketRoute("/play", self._play)])

    def _file(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        """Sends the file ``name`` whatever the request's URL is, which the client's Host header is a part of."""

        async def send(request: Request) -> Response:
            if reason := self._refuses(request, name == "page.html"):
                return PlainTextResponse(reason, 403, _HEADERS)
            return Response((STATIC / name).read_bytes(), headers=_HEADERS, media_type=_TYPES[Path(name).suffix])

        return send

    def _refuses(self, connection: HTTPConnection, secret: bool) -> str:
        """Why a connection is refused, empty if it is not."""
        if self.token is None:
            name = connection.url.hostname
            return "" if name in LOOPBACK else f"this server has no name {name!r}: use http://127.0.0.1"
        given = connection.query_params.get("token", "")
        if secret and not secrets.compare_digest(_digest(given), _digest(self.token)):
            return "the address has to end with ?token=... as `python -m worldmodel play` printed it"
        return ""

    async def _play(self, socket: WebSocket) -> None:
        origin, scheme = socket.headers.get("origin"), {"ws": "http", "wss": "https"}[socket.scope["scheme"]]
        own = f"{scheme}://{socket.headers.get('host', '')}"
        if self._refuses(socket, True) or (origin is not None and origin != own):
            await socket.close(1008)
            return
        await socket.accept()
        page = _Page(socket)
        self._pages.add(page)
        sending = asyncio.create_task(page.send())
        try:
            for message in self._welcome():
                page.tell(message)
            while True:
                self._answer(page, await socket.receive_text())
        except (WebSocketDisconnect, KeyError):  # it goes away whenever it likes, or sends what is no text
            pass
        finally:
            self._pages.discard(page)
            sending.cancel()

    def _welcome(self) -> list[dict[str, Any]]:
        worlds = range(len(self.game.worlds))
        return [self.game.hello(), *(m for index in worlds for m in (*self.game.frames(index), self.game.map(index)))]

    def _answer(self, page: "_Page", text: str) -> None:
        """Obeys a command; all pages see what it changed, and the one that gave it what was wrong."""
        try:
            if len(text) > MOST_COMMAND:
                raise ValueError(f"a command has {len(text):,} characters, expected at most {MOST_COMMAND:,}")
            messages = self.game.obey(json.loads(text))
        except (*REFUSED, RecursionError) as error:
            page.tell(said(error))
            return
        for message in messages:
            for other in self._pages:
                other.tell(message)


class _Page:
    """A connected page; of one that takes no messages, the oldest are dropped."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._waiting: collections.deque[str] = collections.deque(maxlen=MOST_WAITING)
        self._arrived = asyncio.Event()

    def tell(self, message: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(message))
        self._arrived.set()

    async def send(self) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):  # it went away
            while await self._arrived.wait():
                while self._waiting:
                    await self._socket.send_text(self._waiting.popleft())
                self._arrived.clear()


def serve(game: Game, host: str, port: int, say: Any = print) -> None:
    """Serves until Ctrl-C; says the address once it can be opened, of all addresses one of each kind.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    token = None if host in LOOPBACK else secrets.token_urlsafe(16)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"--host {host} --port {port} cannot be listened on: {error}; --port 0 finds a free one"
        ) from error
    with listening:
        path = "" if token is None else f"?token={token}"
        for name in _names(host):
            say(f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}/{path}", flush=True)
        server = Server(game, token)
        config = uvicorn.Config(
            server.app, log_level="warning", ws_max_size=2**16, timeout_graceful_shutdown=1, lifespan="off"
        )
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _names(host: str) -> list[str]:
    """What a browser can open: for the address that stands for all, this machine's in its network, and loopback."""
    wildcards = {"0.0.0.0": ("127.0.0.1", "192.0.2.1"), "": ("127.0.0.1", "192.0.2.1"), "::": ("::1", "2001:db8::1")}
    if host not in wildcards:
        return [host]
    loopback, elsewhere = wildcards[host]
    family = socket.AF_INET6 if ":" in loopback else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))  # of UDP: nothing is sent, and the address it would be sent from is known
            return [probe.getsockname()[0], loopback]
    except OSError:  # no network
        return [loopback]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
