"""The command ``web``."""

from __future__ import annotations

import secrets
from pathlib import Path

from ...core.errors import ImagicError
from ..console import err, plain
from ..options import DEFAULT_STORE, Flag, StoreDir, Whole


def web(
    *,
    port: Whole = 7860,
    host: str = "127.0.0.1",
    auth: str | None = None,
    token: Flag = False,
    base: str | None = None,
    store: StoreDir = DEFAULT_STORE,
    open_browser: Flag = False,
) -> None:
    """Open the studio: fits, edits, sweeps and comparisons in the browser.

    The page is served from this machine alone and loads nothing from the network. Jobs run in processes of their own, one at a time on
    each card: closing the page changes nothing. Ctrl-C ends the server; a fit saves a checkpoint first, and the page offers to resume it.

        imagic-lora web
        imagic-lora web --host 0.0.0.0 --token    # for other machines of a trusted network; not encrypted

    Parameters
    ----------
    port
        Port to listen on.
    host
        Address to listen on. Another one than that of this machine alone needs --auth or --token.
    auth
        USER:FILE: ask for this name and for the password in the first line of the file.
    token
        Ask for a random token, which is printed.
    base
        Base that the form of a new fit starts with.
    open_browser
        Open the page in the browser.
    """
    from ...web.guard import LOOPBACK, Access

    secret, user = _secret(auth, token)
    if host not in LOOPBACK and secret is None:
        got = f"--host {host} without --auth and --token"
        raise ImagicError(got, "a password or a token for an address that others reach", "add --token, or leave out --host")
    if not 1 <= port <= 65535:
        raise ImagicError(f"--port {port}", "a number from 1 to 65535", "use for example --port 7860")
    try:
        from ...web.server import serve
        from ...web.studio import Studio
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("imagic_lora"):
            raise
        raise ImagicError(f"{error.name} is not installed", "the extra web", "pip install 'imagic-lora[web]'") from error
    _check_port(host, port)
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"
    err.print(
        f"The studio is at {plain(address)}{f'?token={secret}' if token else ''}, the adapters are in {plain(store)}", highlight=False
    )
    err.print("Ctrl-C ends it.", highlight=False)
    serve(Studio.of(store, base), Access(host, user, secret), port, open_browser)


def _secret(auth: str | None, token: bool) -> tuple[str | None, str | None]:
    """Returns the password or token, and the user."""
    if auth is not None and token:
        raise ImagicError("--auth together with --token", "one of them", "leave out one")
    if token:
        return secrets.token_urlsafe(24), None
    if auth is None:
        return None, None
    user, colon, file = auth.partition(":")
    try:
        password = Path(file).read_text("utf-8").split("\n")[0].strip() if colon and user and file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ImagicError(f"--auth {auth}: the file cannot be read ({error})", "a text file with a password", "check the path") from error
    if not password:
        raise ImagicError(f"--auth {auth}", "USER:FILE, where the first line of the file is a password", "write the password into a file")
    return password, user


def _check_port(host: str, port: int) -> None:
    """Raises ImagicError if the address is in use or is not one of this machine."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        got = f"--host {host} --port {port} cannot be listened on ({error.strerror or error})"
        raise ImagicError(got, "a free port of this machine", "choose another --port") from error
