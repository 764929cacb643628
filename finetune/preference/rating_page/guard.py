"""Who may talk to the rating page: requests to our own address, from our own page, with the token of this session."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.datastructures import Headers, QueryParams
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-brushwork-token"
# Static code without a secret in it; a <script> tag cannot send a token header.
OPEN_PATHS = frozenset({"/page.css", "/page.js", "/texts.js", "/views.js", "/outbox.js"})
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


def allowed_hosts(host: str, port: int) -> frozenset[str]:
    """Host headers that name this server: what it listens on, and the loopback names when that is loopback."""
    names = {host}
    if is_loopback(host):
        names |= {"127.0.0.1", "localhost", "[::1]"}
    return frozenset(f"{f'[{name}]' if ':' in name and not name.startswith('[') else name}:{port}" for name in names)


def is_loopback(host: str) -> bool:
    """Whether this address is only reachable from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses foreign hosts (DNS rebinding), foreign origins (other sites' scripts) and missing tokens; adds the headers."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]):
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items())]
            await send(message)

        refusal = self._refusal(scope)
        answer = self.app if refusal is None else PlainTextResponse(refusal, 403)
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        if headers.get("host") not in self.hosts:
            return "This server answers only to its own address."
        origin = headers.get("origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.hosts}:
            return "Requests from other pages are refused."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope["path"] != "/":
            return "Requests from other pages are refused."
        if scope["path"] in OPEN_PATHS:
            return None
        given = headers.get(TOKEN_HEADER)
        if given is None and scope["path"] == "/":
            given = QueryParams(scope["query_string"]).get("token")
        if not hmac.compare_digest((given or "").encode(), self.token.encode()):
            return "The token is missing or wrong: open the address that `brushwork prefer rate` printed."
        return None
