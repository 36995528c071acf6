"""MkDocs hook that converts LaTeX to MathML, so pages need no external JavaScript."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Converts the math marked by `pymdownx.arithmatex` (with `generic: true`)."""

    def mathml(match: re.Match[str]) -> str:
        if match["block"] is not None:
            return convert(html.unescape(match["block"]).strip(), display="block")
        return convert(html.unescape(match["inline"]))

    return MATH.sub(mathml, content)
