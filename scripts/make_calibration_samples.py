#!/usr/bin/env python3
"""Text sampled from SmolLM2-135M-Instruct, for calibration: data/calibration/smollm2_samples.txt.

    make_calibration_samples.py MODEL OUT.txt [--sequences 32] [--tokens 1020]

Sampled at temperature 1 from the whole distribution, so that it covers what a model of this family knows
(web pages, chat, code, names), which one edited corpus does not. Half of the sequences begin with four random
tokens, half with four tokens of the WikiText-2 validation text. Takes a quarter of an hour on two cores.
Needs: torch 2.10, transformers. Another version of them or another processor gives other samples.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

VALIDATION = Path(__file__).parent.parent / "data" / "wikitext-2" / "wiki.valid.txt"
PROMPT = 4
COMMON = (300, 20000)  # ids after the bytes and specials, before the rare pieces


def prompts(tokenizer, count):
    ids = torch.tensor(tokenizer(VALIDATION.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    for i in range(count):
        if i % 2 == 0:
            yield torch.randint(*COMMON, (PROMPT,))
        else:
            begin = int(torch.randint(0, len(ids) - 10, (1,)))
            yield ids[begin : begin + PROMPT]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1020)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = torch.stack(list(prompts(tokenizer, args.sequences)))
    with torch.no_grad():
        sampled = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in sampled]
    texts = [text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in texts]
    with open(args.out, "x", encoding="utf-8") as file:
        file.write("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
