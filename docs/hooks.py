"""MkDocs hook: the docstrings' few reStructuredText marks, as Markdown would show them."""

import re
from typing import Any

# :class:`X` shows X as code; "Example::" shows one colon.
_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub(r"<code>\1</code>", html).replace("Example::</p>", "Example:</p>")
