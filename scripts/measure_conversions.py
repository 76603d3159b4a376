#!/usr/bin/env python3
"""The table of conversions in docs/experiments.md: every --rope and size, converted with the default calibration.

    scripts/measure_conversions.py [--device cuda --jobs 4] [--text NAME=FILE:WINDOWS …] [-- OPTIONS OF CONVERT…]

Test: the whole WikiText-2 raw test split and windows 0, 73 and 147 of it. Standard library only.
"""
import argparse
import concurrent.futures
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

RATIOS = ["0.6667", "0.5", "0.3333", "0.25"]
ROPES = ["original", "latent"]
WINDOWS = [0, 73, 147]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--rows", default=",".join(f"{rope}:{ratio}" for rope in ROPES for ratio in RATIOS))
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE:W,W,…", help="another text")
    parser.add_argument("--work", type=Path, default=Path("build/conversions"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="conversions at once")
    parser.add_argument("--hla", default="build/hla")
    parser.add_argument("options", nargs="*", help="of hla convert, behind --")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    threads = ["--threads", str(max(1, (os.cpu_count() or 1) // arguments.jobs))]

    def hla(*command):
        result = subprocess.run([arguments.hla, *map(str, command), "--device", arguments.device, *threads],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(f"exit status {result.returncode} of: hla {' '.join(map(str, command))}\n{result.stderr[-2000:]}")
        return result.stdout

    def ppl(model, *options):
        return json.loads(hla("ppl", model, "--dtype", "fp32", "--json", "-", *options))["results"][0]

    texts = []
    for text in arguments.text:
        name, _, rest = text.partition("=")
        file, _, windows = rest.rpartition(":")
        texts.append((name, ["--text", file, "--windows", windows]))

    def measure(model):
        whole = ppl(model)
        some = [nll for window, nll in zip(whole["window_indices"], whole["window_nll"]) if window in WINDOWS]
        row = {"test": whole["perplexity"], "test, 3 windows": math.exp(sum(some) / len(some))}
        for name, options in texts:
            row[name] = ppl(model, *options)["perplexity"]
        return row

    def convert_and_measure(row):
        rope, ratio = row.split(":")
        out = arguments.work / f"{rope}-{ratio}"
        start = time.monotonic()
        hla("convert", arguments.model, out, "--force", "--rope", rope, "--target-ratio", ratio, *arguments.options)
        seconds = time.monotonic() - start
        return row, seconds, measure(out)

    base = measure(arguments.model)
    columns = list(base)
    print("| | " + " | ".join(columns) + " | conversion, s |\n" + "|---" * (len(columns) + 2) + "|")
    print("| base | " + " | ".join(f"{base[c]:.4f}" for c in columns) + " | |", flush=True)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for row, seconds, measured in pool.map(convert_and_measure, arguments.rows.split(",")):
            cells = [f"{measured[c]:.4f} ({measured[c] / base[c]:.4f})" for c in columns]
            print(f"| {row} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
