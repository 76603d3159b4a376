#!/usr/bin/env python3
"""Writes tests/data/text/wikitext_goldens.json: lm-eval's view of WikiText, in Python.

Run from anywhere; needs the standard library only; not run in CI:
    python3 scripts/make_wikitext_goldens.py

The functions restate EleutherAI/wikitext_document_level (pages) and lm_eval/tasks/wikitext
(detokenizer, word count) of EleutherAI/lm-evaluation-harness.
"""
import hashlib
import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "data" / "text" / "wikitext_goldens.json"


def pages(text):
    result, page = [], []
    for line in text.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            if "\n".join(page).strip():
                result.append("\n".join(page))
            page = []
        page.append(line)
    result.append("\n".join(page))
    return result


def detokenize(s):
    s = s.replace("s '", "s'")
    s = re.sub(r"/' [0-9]/", r"/'[0-9]/", s)
    for old, new in [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
                     (" ! ", "! "), (" ? ", "? "), (" , ", ", ")]:
        s = s.replace(old, new)
    s = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", s)
    s = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", s)
    s = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", s)
    s = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', s)
    s = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", s)
    for old, new in [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" " + chr(176) + " ", chr(176)),
                     (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]:
        s = s.replace(old, new)
    return s


def words(page):
    return len(re.split(r"\s+", page))


SPACES = [chr(c) for c in [*range(9, 14), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
                           0x202F, 0x205F, 0x3000]]
NOT_SPACES = [chr(c) for c in [0x00, 0x08, 0x0E, 0x1B, 0x7F, 0x180E, 0x200B, 0x200C, 0x2060, 0xFEFF, 0x1F642]]


def nasty():
    yield from ["", " ", "\n", "x", " = T = ", " = T = \n", "\n = T = \n\n = U = \n", "= = T = =", " = = = T = = = \n",
                "text before\n = A = \n a \n = = S = = \n s \n = B = \nb", " =  = \n", "\u3000= T =\u2003\nx", "= =", "= x =\n= y =",
                "=\n = = = =", " = A = B = \n x \n = \n"]
    yield from ["/' 5/ and /' x/ /' /' 7/ /'  8/ /' 9", "( a ( b ) c ) [ [ d ] ] { { e } } ) (", "\" a \" b \" c \" d \"",
                "\" quote \n over \n lines \" and ' more \n here '", "it 's dogs ' tails ' s ' ' '", "( ) (\u00a0\u2009) [\u3000x\u3000]",
                "' ' ' a ' '", "3 @,@ 000 @.@ 5 @-@ metre , , , . . ! ? : ; 5 \u00b0 C \u00b0 \u00b0 D N N N 's", "(\x1c\x1d a \x1e\x1f)",
                "{ \u200b a \u200b }", "\" \u201c ' mixed \" quotes ' ( \" in ) side \""]
    yield "".join(f"(a{c}b{c})'{c}x{c}'" for c in SPACES + NOT_SPACES)
    yield "".join(SPACES) + "x" + "".join(SPACES)
    rng = random.Random(2)
    pieces = list("()[]{}\"'=@-,.:;!?N/5s") + [" ", " ", " ", " ", "\n", "\n ", " \n", " = ", "= =", " @-@ ", " 's", "s '", "/' ", "word",
                                               "\u00b0", "é", "\U0001f642"] + SPACES[:6] + rng.sample(SPACES, 4)
    for length in [10, 30, 100, 300] * 8:
        yield "".join(rng.choice(pieces) for _ in range(length))


def main():
    wiki = pages((ROOT / "data" / "wikitext-2" / "wiki.test.raw").read_bytes().decode())
    texts = [detokenize(page) for page in wiki]
    goldens = {
        "wiki": {"pages": len(wiki), "bytes": sum(len(page.encode()) for page in wiki), "words": sum(map(words, wiki)),
                 "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()},
        # The whole text as one page, its pages before the detokenizer, its words.
        "nasty": [{"raw": raw, "text": detokenize(raw), "pages": pages(raw), "words": words(raw)} for raw in nasty()],
    }
    OUT.write_text(json.dumps(goldens, ensure_ascii=True, indent=1) + "\n", "utf-8")
    print("wrote", OUT, goldens["wiki"], len(goldens["nasty"]), "nasty texts")


if __name__ == "__main__":
    main()
