#!/usr/bin/env python3
"""Decoding by transformers beside `hla bench`, in turns, fp32 on the CPU.

    .venv/bin/python scripts/bench_decode.py MODEL [--depths 0,2048] [--tokens 16] [--repeat 3]

MODEL: a folder that both can read. Depth: tokens in the cache before the timed ones. Prints tokens/s
by repetition and the median of the pairwise ratios.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache


def decode(model, depth: int, tokens: int) -> float:
    """Tokens per second after `depth` tokens, one at a time."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, depth + tokens + 1), generator=generator)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for begin in range(0, depth, 512):
            model(ids[:, begin : min(begin + 512, depth)], past_key_values=cache, logits_to_keep=1)
        model(ids[:, depth : depth + 1], past_key_values=cache)  # whatever a first step has to do
        start = time.perf_counter()
        for at in range(depth + 1, depth + 1 + tokens):
            model(ids[:, at : at + 1], past_key_values=cache).logits.sum().item()
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--hla", default="build/hla")
    parser.add_argument("--depths", default="0,2048")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    for depth in map(int, arguments.depths.split(",")):
        rows = []
        for _ in range(arguments.repeat):
            theirs = decode(model, depth, arguments.tokens)
            command = [arguments.hla, "bench", arguments.model, "-p", "0", "-n", str(arguments.tokens),
                       "-d", str(depth), "-r", "1", "--json", "-", "--device", "cpu", "--dtype", "fp32"]
            result = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            rows.append((theirs, result["results"][0]["tokens_per_second"]))
        ratio = statistics.median(ours / theirs for theirs, ours in rows)
        shown = ", ".join(f"{theirs:.1f} / {ours:.1f}" for theirs, ours in rows)
        print(f"depth {depth}: transformers / hla tokens/s {shown}; median ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
