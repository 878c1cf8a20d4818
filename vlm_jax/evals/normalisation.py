"""The normal form in which VQAv2 compares answers, and its accuracy (1505.00468; the release's vqaEval.py)."""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}

SINGLE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
SEVERAL = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at"""
CONTRACTIONS = {word.replace("'", ""): word for word in SINGLE.split()} | {"somebody'd": "somebodyd"}
"""As people type them, without one of the apostrophes -> as they are written; the last is the release's own."""
CONTRACTIONS |= {
    word[: found.start()] + word[found.end() :]: word for word in SEVERAL.split() for found in re.finditer("'", word)
}


def without_punctuation(answer: str) -> str:
    """Marks beside a space, or all where a comma parts digits, are left out, others become one; so are full stops."""
    glued = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        apart = glued or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if apart else " ")
    return re.sub(r"\.(?!\d)", "", text)


def normalised(answer: str) -> str:
    """In lower case, without punctuation and articles, numbers up to ten as digits, contractions with apostrophes."""
    found = (NUMBERS.get(word, word) for word in without_punctuation(plain(answer)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ARTICLES)


def plain(answer: str) -> str:
    """One line."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def consensus(answer: str, references: Sequence[str]) -> float:
    """VQAv2's accuracy: of the people left after each is left out in turn, min(1, those who agree / 3), on average.

    Answers are normalised where those of the people differ; where these are one, the model's must be the same.
    """
    form = normalised if len({plain(each) for each in references}) > 1 else plain
    agree = [form(each) == form(answer) for each in references]
    return sum(min(1.0, (sum(agree) - one) / 3) for one in agree) / len(agree)
