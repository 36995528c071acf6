"""A hook of MkDocs that turns LaTeX into MathML, so that pages need no JavaScript from other sites."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

MATH = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces what `pymdownx.arithmatex` (`generic: true`) marked as math."""

    def mathml(match: re.Match[str]) -> str:
        if match["block"] is not None:
            return convert(html.unescape(match["block"]).strip(), display="block")
        return convert(html.unescape(match["inline"]))

    return MATH.sub(mathml, content)
