#!/usr/bin/env python3
"""Paired benchmark of `hla ppl` (protocol gptq, fp32, CPU) against a careful transformers script, and of hla models.

    bench_ppl.py models/SmolLM2-135M-Instruct --windows 3 --repeat 5
    bench_ppl.py models/SmolLM2-135M-Instruct --also models/SmolLM2-135M-Instruct-HLA-50 --no-transformers

Every measurement is a process of its own, and the sides take turns (A B A B …), so that a slow spell of the machine
meets all of them. For each run: wall time of the whole process, scoring time as the program itself reports it (without
imports, loading and tokenizing), peak resident memory, perplexity. Then for each side the median of its ratios to `hla`
in the same repetition; above 1 means slower or larger than hla.

Needs for the transformers side: pip install torch==2.10.0 transformers safetensors (see --python).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUANTITIES = ("wall_seconds", "scoring_seconds", "peak_rss_bytes")


@dataclass(frozen=True)
class Side:
    name: str
    command: tuple


# --- the transformers side, in a process of its own ----------------------------------------------


def joined_rows(path):
    """The text as `"\\n\\n".join(dataset["text"])` gives it for the HF wikitext dataset."""
    lines = Path(path).read_bytes().decode("utf-8").split("\n")
    rows = [line + "\n" if line.strip() else "" for line in lines[:-1]]
    if lines[-1].strip():
        rows.append(lines[-1])
    return "\n\n".join(rows)


def transformers_worker(args):
    """Scores the windows and prints one line of JSON. One window's logits exist at a time, no KV cache, no copies."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.tensor(tokenizer(joined_rows(args.text)).input_ids)
    windows = min(len(ids) // args.ctx, args.windows or len(ids))
    start = time.perf_counter()
    total = 0.0
    with torch.inference_mode():
        for window in ids[: windows * args.ctx].view(windows, args.ctx):
            logits = model(window[None], use_cache=False).logits[0]
            total += torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").item()
            del logits
    seconds = time.perf_counter() - start
    scored = windows * (args.ctx - 1)
    print(json.dumps({"perplexity": math.exp(total / scored), "tokens_scored": scored, "seconds": seconds,
                      "version": f"transformers {transformers.__version__}, torch {torch.__version__}"}))


# --- runs ----------------------------------------------------------------------------------------


def make_sides(args):
    limit = ["--limit", str(args.windows)] if args.windows else []

    def hla(model):
        return (args.hla, "ppl", str(model), "--protocol", "gptq", "--text", str(args.text), "--ctx", str(args.ctx),
                "--dtype", "fp32", "--device", "cpu", "--threads", str(args.threads), "--json", "-", *limit)

    sides = [Side("hla", hla(args.model))]
    if not args.no_transformers:
        worker = [args.python, __file__, str(args.model), "--worker", "--text", str(args.text), "--ctx", str(args.ctx),
                  "--threads", str(args.threads), "--windows", str(args.windows)]
        sides.append(Side("transformers", tuple(worker)))
    sides += [Side(f"hla {model.name}", hla(model)) for model in args.also]
    return sides


def run_once(side, threads):
    """One process -> its measurements."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(side.command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            sys.exit(f"bench_ppl: error: {' '.join(side.command)}: exit {process.returncode}\n"
                     f"{errors.read().decode(errors='replace')[-2000:]}")
        result = json.loads(output.read())
    result = result["results"][0] if "results" in result else result  # the worker prints only its own
    return {"side": side.name, "wall_seconds": wall, "scoring_seconds": result["seconds"],
            "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_rss_bytes": usage.ru_maxrss * 1024,
            "perplexity": result["perplexity"], "tokens_scored": result["tokens_scored"]}


def print_run(repetition, run):
    print(f"{repetition:>3}  {run['side']:<32} {run['wall_seconds']:>8.2f} s {run['scoring_seconds']:>10.2f} s "
          f"{run['cpu_seconds']:>8.1f} s {run['peak_rss_bytes'] / 2**20:>8.0f} MiB {run['perplexity']:>14.7f} "
          f"{run['tokens_scored']:>8}", flush=True)


def summarise(sides, runs):
    """Medians, and for every side but the first the median of its pairwise ratios to the first."""
    of = {side.name: [run for run in runs if run["side"] == side.name] for side in sides}
    base = of[sides[0].name]
    summary = {}
    for name, mine in of.items():
        summary[name] = {}
        for quantity in QUANTITIES:
            summary[name][f"median_{quantity}"] = statistics.median(run[quantity] for run in mine)
            ratios = [run[quantity] / other[quantity] for run, other in zip(mine, base)]
            summary[name][f"{quantity}_ratios"] = ratios
            summary[name][f"{quantity}_ratio_median"] = statistics.median(ratios)
        summary[name]["perplexity_ratio"] = mine[0]["perplexity"] / base[0]["perplexity"]
    return summary


def print_summary(summary):
    print(f"\n{'':<32} {'wall':>8} {'scoring':>10} {'memory':>10}   ratios to hla, medians of pairs: "
          f"{'wall':>7} {'scoring':>8} {'memory':>7} {'perplexity':>12}")
    for name, s in summary.items():
        print(f"{name:<32} {s['median_wall_seconds']:>6.2f} s {s['median_scoring_seconds']:>8.2f} s "
              f"{s['median_peak_rss_bytes'] / 2**20:>6.0f} MiB   {'':<32} {s['wall_seconds_ratio_median']:>7.3f} "
              f"{s['scoring_seconds_ratio_median']:>8.3f} {s['peak_rss_bytes_ratio_median']:>7.3f} "
              f"{s['perplexity_ratio']:>12.8f}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="HF Llama folder, read by both sides")
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="MODEL",
                        help="more models for hla, such as a converted one")
    parser.add_argument("--hla", default=str(ROOT / "build" / "release" / "hla"), help="the hla program")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has transformers")
    parser.add_argument("--no-transformers", action="store_true", help="only compare hla models")
    parser.add_argument("--text", type=Path, default=ROOT / "data" / "wikitext-2" / "wiki.test.raw")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=int, default=3, help="score the first N windows; 0: all")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of every side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write runs and summary to FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = arguments()
    if args.worker:
        return transformers_worker(args)
    sides = make_sides(args)
    # Read once, so that no side pays for a cold page cache.
    for folder in (args.model, *args.also):
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as stream:
                while stream.read(1 << 24):
                    pass
    print(f"{args.model}, gptq, ctx {args.ctx}, {args.windows or 'all'} windows, fp32, {args.threads} threads; "
          f"load average {os.getloadavg()[0]:.2f} before")
    print(f"run  {'side':<32} {'wall':>10} {'scoring':>12} {'cpu':>10} {'peak memory':>12} {'perplexity':>14} "
          f"{'tokens':>8}")
    runs = []
    for repetition in range(args.repeat):
        for side in sides:
            runs.append({"repetition": repetition, **run_once(side, args.threads)})
            print_run(repetition, runs[-1])
    summary = summarise(sides, runs)
    print_summary(summary)
    if args.json:
        settings = {"model": str(args.model), "context": args.ctx, "windows": args.windows, "threads": args.threads,
                    "text": str(args.text), "commands": {side.name: side.command for side in sides}}
        report = {"settings": settings, "runs": runs, "summary": summary}
        args.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
