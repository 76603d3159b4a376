#!/usr/bin/env python3
"""Writes the tokenizer goldens under tests/data/text/ with the reference libraries.

Run from anywhere with a Python that has `tokenizers` and `sentencepiece` (PyPI); not run in CI:
    python3 scripts/make_tokenizer_goldens.py

nasty.bin holds text that breaks tokenizers; the *.json files are small synthetic tokenizers, one
per mechanism; goldens.json holds ids (or their sha256 as little-endian int32, for long texts).
"""
import hashlib
import json
import random
import struct
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, decoders, processors, trainers

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "data" / "text"


def nasty() -> bytes:
    rng = random.Random(1)
    parts = [
        "plain words, don't I'LL we've they're I'm 'S ''s\n",
        "tabs\t\tand\r\nCRLF\rlone CR \x0b\x0c trailing   \n   \n\n\n  leading",
        "NUL \x00\x00 bell \x07 no-token bytes \x04\x06\x13\x14\x16\x1d end",
        "emoji 🙂👍🏽👩‍👩‍👧‍👦🇩🇪 ❤️ text",
        "CJK 日本語のテキスト、中文字符。한국어 문장입니다",
        "combining e\u0301 n\u0303 a\u0308\u0323 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
        "RTL שלום עולם مرحبا بالعالم ١٢٣ ۴۵۶",
        "digits 12 ½ ²3 Ⅷ 三 ௧௨ ๑๒ ᱑ 𝟘𝟙 ㊿ ⑳ 1234567890",
        "spaces \u0085 \u00a0 \u1680 \u180e \u2003\u2009 \u2028 \u2029 \u202f \u205f \u3000 \u200b \ufeff end",
        "special <|endoftext|><|im_start|> <|im_end|>x <|endoftex|> <|nope|> <s> </s> <unk>",
        "astral 𐍈 𠜎 \U000e0001 \U0010ffff \ufffd \ufffe",
        "math ∑∫√ ±≠ ©®™ ··· …… —– ‘’“”",
        "a" * 20000, " " * 20000, "\n" * 3000, "ab " * 5000,
        "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(20000)),
        "".join(rng.choice("日本語中文字é 1🙂") for _ in range(5000)),
    ]
    text = "\n".join(parts).encode()
    invalid = [b"\x80", b"\xff\xfe", b"\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x28\xa1", b"\xf0\x9f\x99",
               b"\xf0\x28\x8c\xbc", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xe0\x80\xaf",
               b"\xf8\x88\x80\x80\x80", b"ok\xe2\x82\xac\xe2\x82"]
    return text + b"\n" + b" x ".join(invalid)


CORPUS = (ROOT / "data" / "wikitext-2" / "wiki.valid.txt").read_text("utf-8")[:60000].split("\n")


def trained(pre, **model_options):
    tokenizer = Tokenizer(models.BPE(**model_options))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, special_tokens=["<|begin|>", "<|end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def synthetic():
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    t = trained(pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(llama3), "isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    data = json.loads(t.to_str())
    data["model"]["ignore_merges"] = True
    # A word that no merge makes, so that ignore_merges shows.
    data["model"]["vocab"]["Ġzebra"] = len(data["model"]["vocab"])
    t = Tokenizer.from_str(json.dumps(data))
    t.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B",
                                      special_tokens=[("<|begin|>", t.token_to_id("<|begin|>"))])])
    yield "llama3_style", t.to_str(pretty=False)

    t = trained(pre_tokenizers.ByteLevel(add_prefix_space=True))
    data = json.loads(t.to_str())
    data["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    yield "gpt2_prefix_space_string_merges", json.dumps(data, ensure_ascii=False)

    t = trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False),
                                         pre_tokenizers.ByteLevel(add_prefix_space=False)]))
    t.add_tokens([AddedToken("word", single_word=True), AddedToken("<left>", lstrip=True),
                  AddedToken("<right>", rstrip=True), AddedToken("emoji 🙂"), AddedToken("<|end|>x")])
    yield "added_tokens", t.to_str(pretty=False)

    for behavior in ["removed", "merged_with_previous", "merged_with_next", "contiguous"]:
        for invert in [False, True] if behavior == "removed" else [False]:
            t = trained(pre_tokenizers.Sequence([
                pre_tokenizers.Split(" ", behavior, invert=invert) if not invert
                else pre_tokenizers.Split(Regex(r"[\p{L}\s]+"), behavior, invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
            yield "split_" + behavior + ("_invert" if invert else ""), t.to_str(pretty=False)


def digest(ids):
    return {"count": len(ids), "sha256": hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest(),
            "head": ids[:40]}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "nasty.bin").write_bytes(nasty())
    raw_nasty = (OUT / "nasty.bin").read_bytes()
    nasty_text = raw_nasty.decode("utf-8", "replace")
    wiki = (ROOT / "data" / "wikitext-2" / "wiki.test.raw").read_bytes()
    rows = [line if line.strip() else b"" for line in wiki.splitlines(keepends=True)]
    joined = b"\n\n".join(rows)
    short = "a word, words <left> b  <left>c <right>  d swordfish word emoji 🙂 <|end|>x<|end|> 12345 don't\n\n  zebra zebras"
    goldens = {}

    def record(name, encode):
        goldens[name] = {"nasty": digest(encode(nasty_text, raw_nasty)),
                         "wiki": digest(encode(joined.decode(), joined)),
                         "short": encode(short, short.encode())}

    cosmo2 = Tokenizer.from_file(str(ROOT / "data" / "tokenizers" / "cosmo2" / "tokenizer.json"))
    record("cosmo2", lambda text, raw: cosmo2.encode(text).ids)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "data" / "stories260K" / "tok512.model"))
    record("tok512", lambda text, raw: [sp.bos_id()] + sp.encode(raw))
    for name, text in synthetic():
        (OUT / f"{name}.json").write_text(text, "utf-8")
        t = Tokenizer.from_str(text)
        record(name, lambda text, raw, t=t: t.encode(text).ids)
    goldens["short_text"] = short
    (OUT / "goldens.json").write_text(json.dumps(goldens, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print("wrote", OUT, {k: v["wiki"]["count"] for k, v in goldens.items() if isinstance(v, dict)})


if __name__ == "__main__":
    main()
