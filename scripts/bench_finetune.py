#!/usr/bin/env python3
"""A step of fine-tuning: `hla finetune` on models beside transformers with torch.optim.AdamW on the first of them.

    .venv/bin/python scripts/bench_finetune.py MODEL [MODEL…] [--rows 4] [--context 512] [--steps 5] [--repetitions 3]

fp32, the same batch size, all CPU threads; the programs take turns. Seconds are medians over the steps of a run but the first,
then over the runs; memory is the highest resident of a run (VmHWM).
"""
import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

THEIRS = """
import sys, time, torch
from transformers import AutoModelForCausalLM
model_path, rows, context, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
model.train()
decay = [p for p in model.parameters() if p.dim() >= 2]
rest = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=5e-5)
torch.manual_seed(0)
seconds = []
for step in range(steps + 1):
    ids = torch.randint(3, model.config.vocab_size, (rows, context))
    start = time.perf_counter()
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds.append(time.perf_counter() - start)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("RESULT", sorted(seconds[1:])[len(seconds[1:]) // 2], int(peak.split()[1]) * 1024)
"""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--text", default="data/wikitext-2/wiki.valid.txt")
    parser.add_argument("--set", action="append", default=[], help="further settings of hla finetune")
    parser.add_argument("--hla", default="build/hla")
    return parser.parse_args()


def ours(arguments, model):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        settings = [f"model={model}", f"output={out}", f"data.train={arguments.text}", f"data.valid={arguments.text}",
                    f"data.context={arguments.context}", f"train.batch_rows={arguments.rows}",
                    f"train.max_steps={arguments.steps + 1}", "eval.windows=1", *arguments.set]
        command = [arguments.hla, "finetune", "--device", "cpu", "--dtype", "fp32"]
        for setting in settings:
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(out / "metrics.csv", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file) if row["seconds"]]
        report = json.loads((out / "finetune.json").read_text())
        return statistics.median(seconds[1:]), report["peak_memory_bytes"]


def theirs(arguments, model):
    command = [sys.executable, "-c", THEIRS, model, arguments.rows, arguments.context, arguments.steps]
    out = subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True).stdout
    seconds, peak = next(line for line in out.splitlines() if line.startswith("RESULT")).split()[1:]
    return float(seconds), int(peak)


def main():
    arguments = parse_arguments()
    runs = {"transformers, torch.optim.AdamW": lambda: theirs(arguments, arguments.models[0])}
    for model in arguments.models:
        runs[Path(model).name] = lambda model=model: ours(arguments, model)
    results = {name: [] for name in runs}
    for repetition in range(arguments.repetitions):
        for name, run in runs.items():
            results[name].append(run())
            print(f"{name}: {results[name][-1][0]:.3f} s, {results[name][-1][1] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    names = list(runs)
    reference = [seconds for seconds, _ in results[names[0]]]
    base = results[names[1]]
    print("| | s a step | to transformers | to the first model | peak memory | to the first model |\n|---|---|---|---|---|---|")
    for name in names:
        seconds = [s for s, _ in results[name]]
        peak = statistics.median(p for _, p in results[name])
        to = lambda others: statistics.median(s / o for s, o in zip(seconds, others))
        print(f"| {name} | {statistics.median(seconds):.3f} | {to(reference):.3f} | {to([s for s, _ in base]):.3f} "
              f"| {peak / 1e9:.2f} GB | {peak / statistics.median(p for _, p in base):.3f} |")


if __name__ == "__main__":
    main()
