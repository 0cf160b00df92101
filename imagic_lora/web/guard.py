"""Who may speak to the server: the checks that come before every request and every websocket, as ASGI middleware."""

from __future__ import annotations

import asyncio
import hmac
import html
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOCAL = r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?\Z"
MAX_UPLOAD = 100 * 2**20
_MAX_BODY = 2**20  # bytes of every request that is no upload
_COOKIE = "imagic-lora-session"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; "
    "base-uri 'self'; object-src 'none'; frame-ancestors 'none'",  # Vue compiles templates in the browser
}
_LOGIN = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>imagic-lora</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px system-ui;max-width:22rem;margin:15vh auto;padding:1rem;color-scheme:light dark}}
input,button{{font:inherit;width:100%;padding:.5rem;margin:.3rem 0 1rem;box-sizing:border-box}}</style></head>
<body><main><h1>imagic-lora</h1><p role="alert">{message}</p><form method="post" action="/login">{fields}
<button>Sign in</button></form></main></body></html>"""
_FIELD = '<label>{label}<input name="{name}" type="{kind}" autocomplete="{auto}" required></label>'


@dataclass
class Access:
    """Who may enter.

    Args:
        host: the address that the server listens on.
        user: name of ``--auth``; None with ``--token`` or without either.
        secret: the password or the token; None lets everybody on this machine in.
    """

    host: str
    user: str | None = None
    secret: str | None = None
    sessions: set[str] = field(default_factory=set)

    def host_allowed(self, header: str) -> bool:
        """Whether a ``Host`` header names this server: a page of another name could otherwise reach it by rebinding its DNS name."""
        if self.host not in LOOPBACK:
            return bool(header)  # the session cookie belongs to a host
        return re.match(_LOCAL, header) is not None

    def admits(self, cookies: str) -> bool:
        """Whether a ``Cookie`` header holds a session."""
        if self.secret is None:
            return True
        try:
            cookie = SimpleCookie(cookies).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and cookie.value in self.sessions

    def login(self, given: MutableMapping[str, list[str]]) -> str | None:
        """Returns a new session for the right password or token; else None."""
        user, secret = (given.get(name, [""])[0].encode() for name in ("user", "secret"))
        right = hmac.compare_digest(secret, (self.secret or "").encode()) and bool(self.secret)
        if not right or not hmac.compare_digest(user, (self.user or "").encode()):
            return None
        session = secrets.token_urlsafe(32)
        self.sessions.add(session)
        return session


class TooLarge(Exception):
    """The body of a request is larger than allowed."""


class Guard:
    """Lets requests pass that come from this server's own page and from somebody who may enter.

    Args:
        app: what is guarded.
        access: who may enter.
    """

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request or a websocket."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._problem(scope, headers)
        if problem:
            await _refuse(scope, receive, send, *problem)
        elif not self.access.admits(headers.get("cookie", "")):
            await self._sign_in(scope, receive, send)
        else:
            limit = MAX_UPLOAD if "/upload/" in scope["path"] else _MAX_BODY
            await self._limited(scope, receive, send, headers, limit)

    def _problem(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason of a request that does not come from a page of this server."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.access.host_allowed(host):
            return 403, "This server has another name."
        foreign = origin is not None and urlsplit(origin).netloc != host
        safe = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        if foreign or (origin is None and not safe and headers.get("sec-fetch-site", "none") not in ("same-origin", "none")):
            return 403, "Requests of other sites are not accepted."
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return 403, "Requests of other sites are not accepted."
        return None

    async def _sign_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers somebody without a session: with the page to sign in, or with a session."""
        if scope["type"] == "websocket":
            await _refuse(scope, receive, send, 403, "Sign in first.")
            return
        given, message = parse_qs(scope["query_string"].decode("latin-1")), ""
        given = {"secret": given["token"]} if scope["method"] == "GET" and "token" in given and self.access.user is None else {}
        if scope["method"] == "POST" and scope["path"] == "/login":
            body = await _body(receive)
            given = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10)
        if given:
            session = self.access.login(given)
            if session:
                cookie = f"{_COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/"
                await _answer(send, 303, "", {"Location": "/", "Set-Cookie": cookie})
                return
            await asyncio.sleep(1)  # guessing takes time
            message = "That is not right. Try again."
        fields = [("User", "user", "text", "username"), ("Password", "secret", "password", "current-password")]
        if self.access.user is None:
            fields = [("Token, as the terminal shows it", "secret", "password", "off")]
        inputs = "".join(_FIELD.format(label=label, name=name, kind=kind, auto=auto) for label, name, kind, auto in fields)
        await _answer(send, 401, _LOGIN.format(message=html.escape(message), fields=inputs), {})

    async def _limited(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], limit: int) -> None:
        """Passes a request on, up to a number of bytes of its body, and adds headers to the answer."""
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > limit:
            await _refuse(scope, receive, send, 413, f"More than {limit:,} bytes.")
            return
        received, started = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if received > limit:
                raise TooLarge
            return message

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(n.lower().encode(), v.encode()) for n, v in _HEADERS.items() if n.lower().encode() not in present]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await self.app(scope, counted, with_headers)
        except TooLarge:
            if not started:
                await _refuse(scope, receive, send, 413, f"More than {limit:,} bytes.")


async def _body(receive: Receive) -> bytes:
    """The body of a small request."""
    body, more = b"", True
    while more and len(body) < 10_000:
        message = await receive()
        body, more = body + message.get("body", b""), bool(message.get("more_body"))
    return body


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    """Answers with an error."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
    else:
        await _answer(send, status, f"<!doctype html><title>imagic-lora</title><p>{html.escape(reason)}</p>", {"Connection": "close"})


async def _answer(send: Send, status: int, page: str, headers: dict[str, str]) -> None:
    """Sends a page."""
    pairs = _HEADERS | {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(page.encode()))} | headers
    raw = [(name.lower().encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": page.encode()})
