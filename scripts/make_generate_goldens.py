#!/usr/bin/env python3
"""Make tests/data/generate/greedy.json: what transformers' generate() continues 20 prompts with, greedily.

    .venv/bin/python scripts/make_generate_goldens.py

Run by hand, never in CI; the result is committed. Model: models/SmolLM2-135M-Instruct (scripts/import_smollm2.py),
fp32, 128 new tokens each, no end of text, one prompt at a time. `margin` is the least difference between the best and
the second best logit on the way: below about 1e-4 two fp32 programs may take different tokens.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
OUT = ROOT / "tests" / "data" / "generate" / "greedy.json"
NEW_TOKENS = 128

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The theory of general relativity",
    "Ingredients: two eggs, a cup of flour,",
    "In 1969, Apollo 11",
    "Q: What is the boiling point of water?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mitochondria is",
    "import numpy as np\n\n# Compute the mean of",
    "To be, or not to be, that is",
    "Les enfants jouent dans",
    "1, 1, 2, 3, 5, 8,",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "SELECT name FROM users WHERE",
    "My favourite film is about",
    "日本の首都は",
    "The stock market fell sharply on Monday after",
    "How to tie a bowline: first,",
]


def main():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    goldens = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            result = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2,
                                    output_logits=True, return_dict_in_generate=True)
        best = torch.stack(result.logits).squeeze(1).topk(2).values  # (128, 2)
        ids = result.sequences[0, inputs["input_ids"].shape[1]:].tolist()
        before, after = (tokenizer.decode(sequence, skip_special_tokens=True)
                         for sequence in (inputs["input_ids"][0], result.sequences[0]))
        text = after[len(before):]
        goldens.append({"prompt": prompt, "ids": ids, "text": text,
                        "margin": (best[:, 0] - best[:, 1]).min().item()})
        print(f"{goldens[-1]['margin']:.2e}  {prompt!r}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    source = f"transformers {transformers.__version__}, torch {torch.__version__}, scripts/make_generate_goldens.py"
    lines = ",\n".join(json.dumps(golden, ensure_ascii=False) for golden in goldens)
    OUT.write_text(f'{{"source": {json.dumps(source)}, "new_tokens": {NEW_TOKENS}, "goldens": [\n{lines}\n]}}\n',
                   encoding="utf-8")


if __name__ == "__main__":
    main()
