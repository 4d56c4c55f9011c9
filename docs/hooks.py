"""MkDocs hook: docstrings name objects as ``:class:`X```; show X as code, without the role."""

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub(r"<code>\1</code>", html)
