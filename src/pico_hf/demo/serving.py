"""Serves the demo page on this machine, without an address outside it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from pico_hf.demo.library import gradio

HOST = "127.0.0.1"
# The browser refuses what gradio or an extension of it might ask other hosts for.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
# Captions below their images and whole, and no scroll bar beside a gallery that is all there.
CSS = """
#found .grid-wrap{max-height:none;overflow:visible}
#found .thumbnail-lg{display:flex;flex-direction:column;height:auto;aspect-ratio:auto}
#found .thumbnail-lg img{aspect-ratio:1;height:auto;min-height:0}
#found .caption-label{position:static;width:100%;max-width:none;border:0;box-shadow:none;
white-space:normal;overflow-wrap:anywhere;text-align:center;background:none;line-height:1.25}
"""
_OUTSIDE = re.compile(rb'<(meta|link)\b[^>]*"https?://(?!127\.0\.0\.1[:/])[^>]*>')
Message = dict[str, Any]


class InsideOnly:
    """ASGI middleware: pages name no other host, and the browser may ask none.

    Args:
        app: The application.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def cleaned(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and _is_page(message):
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    page = without_outside(body)
                    await send({**start, "headers": _headers(start, len(page))})
                    await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, cleaned)


def without_outside(page: bytes) -> bytes:
    """HTML without tags of its head that name another host.

    Example:
        >>> without_outside(b'<meta charset="utf-8"><link href="https://fonts.example/a.css">')
        b'<meta charset="utf-8">'
    """
    return _OUTSIDE.sub(b"", page)


def _is_page(start: Message) -> bool:
    kind = dict(start["headers"]).get(b"content-type", b"")
    return kind.startswith(b"text/html")


def _headers(start: Message, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in start["headers"] if name != b"content-length"]
    own = {b"content-length": str(length), b"content-security-policy": POLICY}
    return [*kept, *((name, value.encode()) for name, value in own.items())]


def looks(gr: Any) -> dict[str, Any]:
    """Options of `launch` that say what the page looks like: fonts of the system, no footer."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Base(primary_hue="teal", **fonts)
    return {"theme": theme, "css": CSS, "footer_links": []}


def serve(page: Any, port: int | None = None, open_browser: bool = False) -> str:
    """Starts the page in the background, for this machine alone.

    Args:
        page: Of `build_page`; its `close` ends it.
        port: None: the first free one from 7860 on.
        open_browser: True opens it.

    Returns:
        Its address.

    Raises:
        OSError: If the port is taken.
    """
    from starlette.middleware import Middleware

    _, address, _ = page.queue(api_open=False).launch(
        server_name=HOST,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        app_kwargs={"middleware": [Middleware(InsideOnly)]},
        **looks(gradio()),
    )
    return str(address)
