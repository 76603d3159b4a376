#!/usr/bin/env python3
"""Writes tokenizer goldens with the reference libraries, for the tests and for `hla tokenize --check`.

Run from anywhere with a Python that has `tokenizers` and `sentencepiece` (PyPI); not run in CI:
    python3 scripts/make_tokenizer_goldens.py                       the tests' own
    python3 scripts/make_tokenizer_goldens.py --folder PATH…        those of tokenizers

--folder takes a model folder, or a file NAME.json or NAME.model. It writes tokenizer_goldens.json into the
folder, or NAME_goldens.json beside the file, over the one that is there:
    {"source": LIBRARY AND VERSION, "pairs": [{"text": TEXT, "ids": [ID, …]}, …]}
ids without special tokens added; the first pairs also have "ids_with_special", with those that the tokenizer
adds by default. The committed ones are of data/tokenizers/cosmo2 and data/stories260K/tok512.model.

Without --folder it writes tests/data/text/. nasty.bin holds text that breaks tokenizers; the *.json files are small synthetic tokenizers, one
per mechanism; goldens.json holds ids (or their sha256 as little-endian int32, for long texts).
"""
import argparse
import hashlib
import json
import random
import struct
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, decoders, processors, trainers

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


def characters():
    """BPE on characters, as transformers writes it for models that came with a SentencePiece file."""
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    mark = "\u2581"
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    # Not split, so that there are tokens with marks at any place, and of several marks.
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark, prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=specials + bytes_)
    t.train_from_iterator(CORPUS + ["a" + " " * 8 + "b"] * 200, trainer)
    data = json.loads(t.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in specials]
    data["model"].update(byte_fallback=True, fuse_unk=True)
    count = len(data["model"]["vocab"])
    for i, (content, normalized) in enumerate([("<|im_start|>", True), ("<tool>", False), (mark + "<PRE>", False)]):
        data["added_tokens"].append({"id": count + i, "content": content, "single_word": False, "lstrip": False,
                                     "rstrip": False, "normalized": normalized, "special": not normalized})

    def made(pre, decoder, **model):
        t = Tokenizer.from_str(json.dumps({**data, "pre_tokenizer": pre, "model": {**data["model"], **model}}))
        t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                         special_tokens=[("<s>", 1)])
        t.decoder = decoder
        return t

    t = made(None, decoders.Sequence([decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)]))
    t.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    yield "llama2_style", t.to_str(pretty=False)
    for scheme, split, model in [("first", False, {}), ("always", True, {"byte_fallback": False}),
                                 ("never", True, {"byte_fallback": False, "fuse_unk": False})]:
        pre = {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme, "split": split}
        t = made(pre, decoders.Metaspace(replacement=mark, prepend_scheme=scheme, split=split), **model)
        yield f"metaspace_{scheme}", t.to_str(pretty=False)


def digest(ids):
    return {"count": len(ids), "sha256": hashlib.sha256(struct.pack(f"<{len(ids)}i", *ids)).hexdigest(),
            "head": ids[:40]}


# What tokenizers get wrong: each line goes at one mechanism.
TEXTS = [
    "Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces\n\n end",
    "",
    " ",
    "     five spaces, then      six, and at the end   ",
    "line\nline\n\n\nline\r\nCRLF\rCR\n",
    "\ttab\t\ttabs \t mixed\n\t",
    "don't I'LL we've they're I'm 'S ''s it\u2019s",
    "abc 12 x3.5",
    "1234567890 3.14159 1,000,000 -5 1e-3 0x1F 2024-01-31",
    "½ ²3 Ⅷ",
    "١٢٣ ௧௨ 𝟘𝟙 ㊿ 三",
    "naïve 日本語 🙂",
    "naïve café Ångström über São Łódź",
    "e\u0301 n\u0303 a\u0308\u0323 are combined",
    "日本語のテキスト、中文字符。한국어 문장입니다",
    "Привет, мир! Γειά σου Κόσμε",
    "שלום עולם مرحبا بالعالم",
    "हिन्दी ไทย தமிழ்",
    "👍🏽👩‍👩‍👧‍👦🇩🇪 ❤️ text",
    "astral 𐍈 𠜎 \U000e0001 \U0010ffff \ufffd",
    "spaces \u0085 \u00a0 \u2003\u2009 \u2028 \u3000 \u200b \ufeff end",
    "math ∑∫√ ±≠ ©®™ …… —– ‘’“”",
    "a\x04b",
    "NUL \x00 bell \x07 escape \x1b[0m delete \x7f",
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": not x}  # comment\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }\n\treturn sum;",
    "<html><body class=\"x\">&amp;</body></html>",
    "https://example.com/a_b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt",
    "ALL CAPS CamelCase snake_case kebab-case",
    "punctuation ... !!! ?! --- *** ((())) [[]] {{}} ~~ ``` $$ @@ ^^",
    "Pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism",
    "xqzvkjwpfh qzxjkv",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    " " * 70 + "x",
    "\n" * 20,
    "ab" * 40,
    "special <|endoftext|><|im_start|>user\nHi<|im_end|>x <|endoftex|> <|nope|> <s> </s> <unk> [INST]",
]
WITH_SPECIAL = 4


def folder_goldens(path):
    """Writes the goldens of one tokenizer; returns the file."""
    file = path
    if path.is_dir():
        file = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
        if file is None:
            raise SystemExit(f"make_tokenizer_goldens: error: {path}: no tokenizer.json and no tokenizer.model")
    texts = list(TEXTS)
    if file.suffix == ".json":
        source = f"tokenizers {tokenizers.__version__}"
        reference = Tokenizer.from_file(str(file))

        def encode(text, special):
            return reference.encode(text, add_special_tokens=special).ids

        added = [token.content for _, token in sorted(reference.get_added_tokens_decoder().items())]
        # The tokenizer's own, in the middle of words, between spaces and doubled.
        texts += [f"a{token}b {token} {token}{token}" for token in added[:3]]
    else:
        import sentencepiece

        source = f"sentencepiece {sentencepiece.__version__}"
        reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
        config_file = file.parent / "tokenizer_config.json"
        config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
        # Llama's defaults.
        bos = config.get("add_bos_token") is not False
        eos = config.get("add_eos_token") is True

        def encode(text, special):
            return reference.encode(text.encode(), add_bos=bos and special, add_eos=eos and special)

    lines = []
    for i, text in enumerate(texts):
        pair = {"text": text, "ids": encode(text, False)}
        if i < WITH_SPECIAL:
            pair["ids_with_special"] = encode(text, True)
        # ASCII, so that no editor changes a space or a control character of another kind.
        lines.append("  " + json.dumps(pair, separators=(",", ":")))
    out = file.with_name(file.stem + "_goldens.json")
    body = ",\n".join(lines)
    out.write_text(f'{{"source": {json.dumps(source)},\n "pairs": [\n{body}\n]}}\n', "utf-8")
    return out


def test_goldens():
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "nasty.bin").write_bytes(nasty())
    raw_nasty = (OUT / "nasty.bin").read_bytes()
    nasty_text = raw_nasty.decode("utf-8", "replace")
    wiki = (ROOT / "data" / "wikitext-2" / "wiki.test.raw").read_bytes()
    rows = [line if line.strip() else b"" for line in wiki.splitlines(keepends=True)]
    joined = b"\n\n".join(rows)
    short = "a word, words <left> b  <left>c <right>  d swordfish word emoji 🙂 <|end|>x<|end|> 12345 don't\n\n  zebra zebras"
    tricky = "    x<tool>the <|im_start|>the </s><s> y    z \u2581<PRE>q<|end|>  "
    goldens = {}

    def record(name, encode):
        goldens[name] = {"nasty": digest(encode(nasty_text, raw_nasty)),
                         "wiki": digest(encode(joined.decode(), joined)),
                         "short": encode(short, short.encode())}

    cosmo2 = Tokenizer.from_file(str(ROOT / "data" / "tokenizers" / "cosmo2" / "tokenizer.json"))
    record("cosmo2", lambda text, raw: cosmo2.encode(text).ids)
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "data" / "stories260K" / "tok512.model"))
    record("tok512", lambda text, raw: [sp.bos_id()] + sp.encode(raw))
    for name, text in [*synthetic(), *characters()]:
        (OUT / f"{name}.json").write_text(text, "utf-8")
        t = Tokenizer.from_str(text)
        record(name, lambda text, raw, t=t: t.encode(text).ids)
        golden = goldens[name]
        golden["tricky"] = t.encode(tricky).ids
        for decoded, ids in [("tricky_decoded", golden["tricky"]), ("decoded", golden["short"])]:
            golden[decoded] = [t.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
    goldens["short_text"] = short
    goldens["tricky_text"] = tricky
    (OUT / "goldens.json").write_text(json.dumps(goldens, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print("wrote", OUT, {k: v["wiki"]["count"] for k, v in goldens.items() if isinstance(v, dict)})


def main():
    parser = argparse.ArgumentParser(description="Tokenizer goldens from the reference libraries")
    parser.add_argument("--folder", type=Path, nargs="+", metavar="PATH", help="tokenizer folders or files")
    args = parser.parse_args()
    if args.folder is None:
        test_goldens()
    for path in args.folder or []:
        print("wrote", folder_goldens(path))


if __name__ == "__main__":
    main()
