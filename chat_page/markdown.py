"""Markdown, code and formulas as HTML that is safe to show; run in a process of its own."""

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from itertools import takewhile
from types import MethodType
from typing import Any, NamedTuple

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_inline import StateInline
from markdown_it.rules_inline.state_inline import Scanned
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from engine import answer_questions

# A longer formula is shown as its source: its conversion takes the square of its length.
_MAX_FORMULA = 2000
# Browsers set no space around the name of a function, as in n log n; one with an index gets none.
_ADDRESS = re.compile(r"https?://[^\s<>\"`|\\^{}\[\]]{1,2048}", re.IGNORECASE)
_FUNCTION_NAME = re.compile(r"(?<!<msub>)(?<!<msup>)(?<!<munder>)(<mi>[a-z]{2,}</mi>)")
_SPACED = r'<mrow><mspace width="0.17em"/>\1<mspace width="0.17em"/></mrow>'
_CODE = HtmlFormatter(nowrap=True)
TEXT_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li",
    "ol", "p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
MATH_TAGS = {
    "math", "menclose", "mfenced", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded",
    "mphantom", "mprescripts", "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub",
    "msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover",
}  # fmt: skip
_MATH_ATTRIBUTES = {
    "accent", "columnalign", "columnlines", "columnspacing", "depth", "displaystyle", "fence",
    "form", "height", "linethickness", "lspace", "mathsize", "mathvariant", "maxsize", "minsize",
    "movablelimits", "notation", "rowlines", "rowspacing", "rspace", "separator", "stretchy",
    "symmetric", "voffset", "width",
}  # fmt: skip
ATTRIBUTES: dict[str, set[str]] = {
    "a": {"href", "title", "target"},
    "ol": {"start"},
    "pre": {"data-language"},
    "span": {"class"},
    "td": {"data-align"},
    "th": {"data-align"},
    **dict.fromkeys(MATH_TAGS, _MATH_ATTRIBUTES),
    "math": _MATH_ATTRIBUTES | {"display"},
}


@lru_cache(64)
def _lexer_of(language: str) -> Any:
    """Pygments' lexer for a name such as python; None if it has none."""
    try:
        return get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return None


def _code_block(self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
    """A fenced block, coloured if Pygments knows its language."""
    language = tokens[index].info.strip().partition(" ")[0]
    lexer = _lexer_of(language.lower()) if language else None
    source = tokens[index].content
    body = highlight(source, lexer, _CODE) if lexer else escape(source)
    return f'<pre data-language="{escape(language[:40])}"><code>{body}</code></pre>\n'


def _formula(source: str, display: str) -> str:
    """MathML, or the source where it is not LaTeX that the converter knows."""
    if len(source) <= _MAX_FORMULA:
        try:
            return _FUNCTION_NAME.sub(_SPACED, convert(source, display=display))
        # The converter has no base class for its errors, and fails with others besides.
        except Exception:  # noqa: BLE001 - its errors have no base class
            pass
    return f"<code>{escape(source)}</code>"


def _inline_formula(self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
    return _formula(tokens[index].content, "inline")


def _display_formula(self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
    return f"<p>{_formula(tokens[index].content.strip(), 'block')}</p>\n"


def _display_formula_in_text(self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
    return _formula(tokens[index].content, "block")


def _image(self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
    """A link: the page loads nothing from other hosts."""
    address = str(tokens[index].attrs["src"])
    return f'<a href="{escape(address)}">{escape(tokens[index].content or address)}</a>'


def _table_cell(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    """The style attribute that the page's policy forbids becomes one that its style sheet knows."""
    style = str(tokens[index].attrs.pop("style", ""))
    if style:
        tokens[index].attrSet("data-align", style.removeprefix("text-align:"))
    return str(self.renderToken(tokens, index, options, env))


def _is_wide(char: str) -> bool:
    """Whether a character is one of Chinese, Japanese or Korean, or of their punctuation."""
    return unicodedata.east_asian_width(char) in "WF"


class _State(StateInline):
    """Where stars may begin and end emphasis: beside Chinese, which has no spaces, also where
    punctuation stands on their other side, as in **注意：**这里."""

    def scanDelims(self, start: int, canSplitWord: bool) -> Scanned:  # noqa: N802, N803
        found = super().scanDelims(start, canSplitWord)
        before = self.src[start - 1 : start] or " "
        behind = self.src[start + found.length : start + found.length + 1] or " "
        if self.src[start] != "*" or not (_is_wide(before) or _is_wide(behind)):
            return found
        return Scanned(not behind.isspace(), not before.isspace(), found.length)


def _parse_inline(
    self: ParserInline, src: str, md: MarkdownIt, env: Any, tokens: list[Token]
) -> list[Token]:
    """What the parser does, by our state."""
    state = _State(src, md, env, tokens)
    self.tokenize(state)
    for rule in self.ruler2.getRules(""):
        rule(state)
    return state.tokens


class _Address(NamedTuple):
    """A bare address in a text, as markdown-it's rule for links wants it."""

    url: str
    text: str


class _Addresses:
    """Finds where an address ends that is written without marks.

    It ends where Chinese goes on, which has no spaces, and before punctuation that ends what it
    stands in: as in (see https://example.com/a_(b)), or https://example.com。
    """

    def match_at_start(self, text: str) -> _Address | None:
        found = _ADDRESS.match(text)
        if found is None:
            return None
        url = "".join(takewhile(lambda char: not _is_wide(char), found[0]))
        while url and (
            url[-1] in ".,:;!?'*_~" or (url[-1] == ")" and url.count("(") < url.count(")"))
        ):
            url = url[:-1]
        return _Address(url, url) if _ADDRESS.match(url) else None


def _parser() -> MarkdownIt:
    # A line of an answer is a line on the page, as poems and lists without marks want it.
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": True, "linkify": True})
    markdown.enable(["table", "strikethrough"])
    # The rule that reads "https:" and what follows; not those that guess that a.b is an address.
    markdown.inline.ruler.enable("linkify")
    markdown.linkify = _Addresses()
    markdown.inline.parse = MethodType(_parse_inline, markdown.inline)  # type: ignore[method-assign]
    markdown.use(texmath_plugin, delimiters="brackets")
    # "$5 and $6" are prices.
    markdown.use(
        dollarmath_plugin,
        allow_labels=False,
        allow_space=False,
        allow_digits=False,
        allow_blank_lines=False,
        double_inline=True,
    )
    for name, rule in {
        "fence": _code_block,
        "code_block": _code_block,
        "image": _image,
        "math_inline": _inline_formula,
        "math_block": _display_formula,
        "math_inline_double": _display_formula_in_text,
        "td_open": _table_cell,
        "th_open": _table_cell,
    }.items():
        markdown.add_render_rule(name, rule)
    return markdown


_PARSER = _parser()


def render(text: str) -> str:
    """The text as HTML without anything that could run, load or submit."""
    return nh3.clean(
        _PARSER.render(text),
        tags=TEXT_TAGS | MATH_TAGS,
        attributes=ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _prepare(_: Any) -> Callable[[str], str]:
    if sys.platform != "win32":
        os.nice(10)  # the model needs the processor more
    return render


if __name__ == "__main__":
    answer_questions(_prepare)
