"""Markup: text stays text, whoever wrote it; numbers read well."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.report.markup import (
    TEXT_MAX,
    Markup,
    duration,
    element,
    escaped,
    fixed,
    join,
    number,
    short,
    signed,
    utc,
)

TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        '" onload="x',
        "' onload='x",
        "&lt;",
        "]]>",
        "--><b>",
        "</style>",
        "\x00\x1b[2J",
    ]
)


class Reader(HTMLParser):
    """What a browser would take from a piece of markup."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(markup: str) -> Reader:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


def visible(text: str) -> str:
    """As a document may hold it."""
    return "".join(
        "\ufffd"
        if (ord(c) < 32 and c not in "\t\n\r") or 0x7F <= ord(c) < 0xA0 or ord(c) in (0xFFFE, 0xFFFF)
        else c
        for c in text
    )


@given(TEXT, TEXT)
def test_text_comes_out_as_text(inside: str, value: str) -> None:
    found = read(element("p", inside, title=value))
    assert found.tags == [("p", {"title": visible(value)})]
    assert found.text.replace("\r\n", "\n").replace("\r", "\n") == visible(inside).replace(
        "\r\n", "\n"
    ).replace("\r", "\n")


@given(st.text())
def test_every_text_can_be_written(text: str) -> None:
    element("p", text).encode()


def test_halves_of_characters_are_replaced() -> None:
    assert escaped("a\udce9b") == "a\ufffdb"


def test_markup_stays_markup_and_nests() -> None:
    inner = element("b", "x & y")
    assert element("p", [inner, None, ["<", 2, 1.5]], class_="a", aria_label="n", hidden=None) == (
        '<p class="a" aria-label="n"><b>x &amp; y</b>&lt;21.5</p>'
    )
    assert join(Markup("<i>")) == "<i>"


def test_empty_elements_are_closed_as_their_kind_is() -> None:
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert element("rect", x=1.0, y=-0.5) == '<rect x="1" y="-0.5"/>'
    assert element("td") == "<td></td>"
    assert element("rect", element("title", "t")) == "<rect><title>t</title></rect>"


def test_a_text_without_end_is_cut_and_says_so() -> None:
    assert escaped("x" * (TEXT_MAX + 7)).endswith("… and 7 more characters")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(1.0), "1"),
        (number(1.234), "1.23"),
        (number(7), "7"),
        (number(100), "100"),
        (fixed(-1234.5, 1), "−1,234.5"),
        (fixed(-0.001, 2), "0.00"),
        (signed(0.5, 1), "+0.5"),
        (signed(-0.5, 1), "−0.5"),
        (signed(0.0, 1), "0.0"),
        (short(0.05), "0.05"),
        (short(12_345), "12.3k"),
        (short(-2_000_000), "−2M"),
        (short(150_000), "150k"),
        (short(3e9), "3G"),
        (short(999), "999"),
        (duration(0.2), "0 s"),
        (duration(61), "1 min 1 s"),
        (duration(3600 * 25), "1 d 1 h"),
        (duration(7200), "2 h"),
        (utc(0.0), "1970-01-01 00:00:00 UTC"),
        (utc(float("nan")), "never"),
    ],
)
def test_numbers_for_people(written: str, expected: str) -> None:
    assert written == expected
