"""A thought ends after so many tokens, with the marker, whatever its tokens are."""

import pytest

from engine.guided.thinking_budget import ThinkingBudget


def spell(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def answer(says: str, most: int, is_open: bool = False) -> str:
    """What comes of an answer in which each character is a token."""
    closing = "</t>"
    budget = ThinkingBudget(most, "<t>", closing, tuple(map(ord, closing)), spell, is_open).copy()
    written: list[int] = []
    for wished in says:
        token = ord(wished) if budget.next_id is None else budget.next_id
        written.append(token)
        budget.note(token)
    return spell(written)


@pytest.mark.parametrize(
    ("says", "most", "is_open", "written"),
    [
        ("<t>abcdefghij", 3, False, "<t>abc</t>hij"),
        ("abcdefghij", 3, True, "abc</t>hij"),
        ("abcdefghij", 0, True, "</t>efghij"),
        ("<t>abcdefg", 0, False, "<t></t>efg"),
        ("<t>ab</t>cdefgh", 3, False, "<t>ab</t>cdefgh"),
        ("<t>ab</t>cdefgh", 5, False, "<t>ab</t>cdefgh"),
        ("\n <t>abcdefghij", 3, False, "\n <t>abc</t>hij"),
        ("<a>bcdefghij", 0, False, "<a>bcdefghij"),
        ("abcdefghij", 3, False, "abcdefghij"),
    ],
)
def test_thought_ends_at_its_budget(says, most, is_open, written):
    assert answer(says, most, is_open) == written
