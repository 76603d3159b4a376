#!/usr/bin/env python3
"""The comparison that scripts/study.sh runs; see there. Standard library only.

Every step is one hla command, kept in the report. What it made is used again by the same command on the same inputs.
"""
import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

CONVERSIONS = {  # name: options of `hla convert`
    "original-50": ["--rope", "original", "--target-ratio", "0.5"],
    "latent-50": ["--rope", "latent", "--target-ratio", "0.5"],
    "latent-25": ["--rope", "latent", "--target-ratio", "0.25"],
    "paper": ["--rope", "paper", "--no-calib"],
}

# What the authors of sodabreak/MHA2HLA published of clm-60m, of whose conversion `paper` is the construction.
SEED = "sodabreak/MHA2HLA, as published (clm-60m)"
SEED_NOTE = "The last row is what the authors of sodabreak/MHA2HLA published, of another model on other hardware."


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="the base, any Llama folder")
    parser.add_argument("--quick", action="store_true", help="less text, for half an hour on 2 cores")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", default=",".join(CONVERSIONS), help="conversions, of: " + ", ".join(CONVERSIONS))
    parser.add_argument("--learning-rate", default=None, help="of all tuning; default: the config's")
    parser.add_argument("--epochs", default=None, help="of all tuning; default: the config's")
    parser.add_argument("--depths", default=None, help="of decoding; default: 0,2048 (with --quick 0,512)")
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="where models and results go")
    parser.add_argument("--output", type=Path, default=Path("docs/study.md"))
    parser.add_argument("--hla", default="build/hla")
    arguments = parser.parse_args()
    # Paths that were given are those of the folder that study.sh was called in.
    called_from = Path(os.environ.get("HLA_CALLED_FROM", "."))
    for name in ("work", "output", "model", "hla"):
        given = getattr(arguments, name)
        made = name in ("work", "output")  # a model may also be an id of the Hugging Face cache
        if given != parser.get_default(name) and (made or (called_from / given).exists()):
            setattr(arguments, name, (Path if made else str)(os.path.relpath(called_from / given)))
    if not arguments.output.suffix:
        parser.error(f"--output: expected a file like {arguments.output}.md, whose plots get the folder {arguments.output}")
    return arguments


class Study:
    def __init__(self, arguments):
        self.arguments = arguments
        self.work = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.conversions = arguments.models.split(",")
        for name in self.conversions:
            if name not in CONVERSIONS:
                sys.exit(f"study: unknown conversion {name}; one of: {', '.join(CONVERSIONS)}")
        self.names = ["base"] + self.conversions
        self.commands = []
        self.made = []  # what they made
        self.record = self.work / "steps.json"  # by what a step made: its command, and those of its inputs
        self.steps = json.loads(self.record.read_text()) if self.record.exists() else {}

    def folder(self, name, tuned=False):
        if name == "base" and not tuned:
            return self.arguments.model
        return str(self.work / (name + ("-tuned" if tuned else "")))

    def run(self, command, done):
        """Runs `hla`, which makes the file or folder `done`, unless the same command has made it before."""
        words = [str(x) for x in command]
        self.commands.append(" ".join(words))
        self.made.append(str(done))
        # A plot is made beside `done`.
        plots = {word for option, word in zip(words, words[1:]) if option == "--plot"}
        inputs = {word.removeprefix("model=") for word in words} - plots - {str(done)}
        made_from = {name: self.made_from(name) for name in sorted(inputs)}
        step = {"command": words, "inputs": {name: how for name, how in made_from.items() if how}}
        if Path(done).exists():
            if self.made_from(str(done)) == step:
                print(f"study: {done}: already there", flush=True)
                return
            if str(done) not in self.steps:
                sys.exit(f"study: {done} is there and was not made by a study; give another --work")
            print(f"study: {done}: there, but of another command; made anew", flush=True)
            shutil.rmtree(done) if Path(done).is_dir() else Path(done).unlink()
        start = time.monotonic()
        print("study: " + self.commands[-1], flush=True)
        status = self.wait_for(subprocess.Popen([self.arguments.hla, *words]))
        if status:
            # Of a measurement that was interrupted: what it had by then is not the step's.
            if Path(done).is_file():
                Path(done).unlink()
            sys.exit(f"study: exit status {status} of: hla {self.commands[-1]}")
        seconds = time.monotonic() - start
        self.steps[str(done)] = {**step, "seconds": seconds}
        written = self.record.with_suffix(".tmp")
        written.write_text(json.dumps(self.steps, indent=1))
        written.replace(self.record)
        print(f"study: {seconds:.0f} s", flush=True)

    @staticmethod
    def wait_for(process):
        """Its exit status. Ctrl-C reaches `hla` too, which then saves what it has: that may take a step's time."""
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass

    def seconds(self, name):
        """How long a step took, with all that it was begun anew for; None where that was not recorded."""
        report = Path(name) / "finetune.json"
        of_all = json.loads(report.read_text())["seconds"] if report.exists() else 0
        of_last = self.steps[name].get("seconds")
        return None if of_last is None else max(of_last, of_all)

    def made_from(self, name):
        """What an input of a command is: how it was made, or which file or folder of somebody else's it is."""
        path = Path(name)
        if name in self.steps:
            return {key: value for key, value in self.steps[name].items() if key != "seconds"}
        if not path.exists():
            return None
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def convert(self):
        for name in self.conversions:
            options = list(CONVERSIONS[name])
            if self.arguments.quick and "--no-calib" not in options:
                options += ["--calib-tokens", "8192"]
            out = self.folder(name)
            self.run(["convert", self.arguments.model, out, *options, "--device", self.arguments.device], out)

    def tune(self):
        for name in self.names:
            out = self.folder(name, tuned=True)
            settings = [f"model={self.folder(name)}", f"output={out}"]
            if self.arguments.quick:
                settings += ["data.max_tokens=12288", "eval.windows=4", "data.context=512", "schedule.warmup_steps=5"]
            if self.arguments.learning_rate:
                settings.append(f"optimizer.learning_rate={self.arguments.learning_rate}")
            if self.arguments.epochs:
                settings.append(f"train.epochs={self.arguments.epochs}")
            command = ["finetune", "--config", "configs/smollm2-tune.json"]
            for setting in settings:
                command += ["--set", setting]
            self.run([*command, "--device", self.arguments.device], out)

    def measure(self):
        models = [self.folder(name, tuned) for name in self.names for tuned in (False, True)]
        ppl = {}
        # Only what is measured per token is compared with the base's predictions, which costs a forward of it.
        for protocol, limit, options in (
            ("gptq", 2, ["--reference", self.arguments.model, "--plot", self.work / "perplexity.svg"]),
            ("lm-eval", 1, []),  # a page
        ):
            report = self.work / f"ppl-{protocol}.json"
            command = ["ppl", "--force", *models, "--protocol", protocol, "--dtype", "fp32", *options]
            if self.arguments.quick:
                command += ["--limit", limit]
            self.run([*command, "--device", self.arguments.device, "--json", report], report)
            ppl[protocol] = json.loads(report.read_text())
        bench = self.work / "bench.json"
        depths = self.arguments.depths or ("0,512" if self.arguments.quick else "0,2048")
        speed = ["bench", "--force", *(self.folder(name) for name in self.names), "-d", depths, "-p", "512", "-n", "32"]
        self.run([*speed, "--device", self.arguments.device, "--json", bench, "--plot", self.work / "decoding.svg"], bench)
        return ppl, json.loads(bench.read_text())


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def perplexities(study, ppl):
    per_token, per_word = ({r["model"]: r for r in ppl[p]["results"]} for p in ("gptq", "lm-eval"))
    base = per_token[study.folder("base")]["perplexity"]
    tuned_base = per_token[study.folder("base", True)]["perplexity"]
    rows = []
    for name in study.names:
        for tuned in (False, True):
            token = per_token[study.folder(name, tuned)]
            word = per_word[study.folder(name, tuned)]
            share = token["cache_bytes_per_token"] / token["base_cache_bytes_per_token"]
            rows.append([
                name + (", tuned" if tuned else ""),
                f"{100 * share:.1f} %",
                f"{token['perplexity']:.3f}",
                f"{token['perplexity'] / base:.4f}",
                f"{token['perplexity'] / tuned_base:.4f}" if tuned else "",
                f"{word['word_perplexity']:.2f}",
                f"{token['divergence']['kl_mean']:.4f}",
                f"{100 * token['divergence']['same_top1']:.1f} %",
            ])
    rows.append([SEED + ", the base", "100.0 %", "", "", "", "493.70", "", ""])
    return table(["model", "cache", "perplexity per token", "to the base", "to the tuned base", "per word (lm-eval)",
                  "KL to the base, nats", "same top-1"], rows)


def inference(study, bench):
    columns = sorted({(r["test"], r["depth"]) for r in bench["results"]}, key=lambda c: (c[0][0] != "p", c[1]))
    rows = []
    names = {Path(study.folder(name)).name: name for name in study.names}
    for model in dict.fromkeys(r["model"] for r in bench["results"]):
        mine = {(r["test"], r["depth"]): r for r in bench["results"] if r["model"] == model}
        deepest = mine[max(columns, key=lambda c: c[1])]
        rows.append([names.get(model, model)] +
                    [f"{mine[c]['tokens_per_second']:.1f} ({mine[c]['speedup']:.2f}x)" for c in columns] +
                    [f"{deepest['cache_bytes'] / 1e6:.1f} MB", f"{deepest['rss_bytes'] / 1e6:.0f} MB"])
    rows.append([SEED] + ["0.13x"] * len(columns) + ["", "+14 %"])
    return table(["model"] + [f"{test}, depth {depth}" for test, depth in columns] +
                 ["cache at the deepest", "resident"], rows)


def training(study):
    rows = []
    seconds_of_base = peak_of_base = None
    for name in study.names:
        folder = Path(study.folder(name, True))
        report = json.loads((folder / "finetune.json").read_text())
        with open(folder / "metrics.csv", newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file) if row["seconds"]]
        step = statistics.median(seconds)
        peak = report["peak_memory_bytes"]
        seconds_of_base = seconds_of_base or step
        peak_of_base = peak_of_base or peak
        rows.append([name, str(report["steps"]), f"{report['tokens']:,}", f"{step:.3f} s",
                     f"{step / seconds_of_base:.2f}x", f"{peak / 1e9:.2f} GB", f"{100 * (peak / peak_of_base - 1):+.0f} %",
                     f"{report['seconds']:.0f} s"])
    rows.append([SEED, "", "", "", "0.12x", "", "+285 %", ""])
    return table(["model", "steps", "tokens", "a step, median", "to the base", "peak memory", "to the base", "whole run"], rows)


def samples(study):
    text = []
    for name in study.names:
        report = json.loads((Path(study.folder(name, True)) / "finetune.json").read_text())
        best = next(e for e in report["evaluations"] if e["step"] == report["best_step"])
        for i, prompt in enumerate(report["config"]["eval"]["prompts"]):
            text += [f"**{name}**: {prompt} …", "",
                     "- before: " + json.dumps(report["evaluations"][0]["samples"][i], ensure_ascii=False),
                     "- after: " + json.dumps(best["samples"][i], ensure_ascii=False), ""]
    return "\n".join(text)


def write_report(study, ppl, bench):
    arguments = study.arguments
    token, word = ppl["gptq"]["results"][0], ppl["lm-eval"]["results"][0]
    plots = arguments.output.parent / arguments.output.stem
    plots.mkdir(parents=True, exist_ok=True)
    shutil.copy(study.work / "perplexity.svg", plots / "perplexity.svg")
    shutil.copy(study.work / "decoding.svg", plots / "decoding.svg")
    for name in study.names:
        shutil.copy(Path(study.folder(name, True)) / "loss.svg", plots / f"loss-{name}.svg")
    commands = "\n".join("build/hla " + command for command in study.commands)
    took = [study.seconds(name) for name in study.made]
    minutes = f", which took {sum(took) / 60:.0f} minutes," if None not in took else ""
    learns = "\n".join(f"![{name}]({plots.name}/loss-{name}.svg)" for name in study.names)
    text = f"""# Study: conversions before and after tuning

Made by `scripts/study.sh {' '.join(sys.argv[1:])}`, of {arguments.model}, on {bench['device']}; {os.cpu_count()} CPU cores,
hla {ppl['gptq']['hla_version']} ({ppl['gptq']['hla_commit']}). The commands{minutes} are at the end. Times are of one run.

## Perplexity

{token['text']}; {token['windows']} of {token['total_windows']} windows, per word {word['pages']} of {word['total_pages']} pages. All models are tuned alike
(`configs/smollm2-tune.json`: the same text, rows, steps and learning rates). "To the tuned base" is what compression costs beyond what tuning gives to any
model; tuning moves all of them away from the base, so KL to it says how far, not how well. {SEED_NOTE}

{perplexities(study, ppl)}

![Perplexity against cache bytes]({plots.name}/perplexity.svg)

## Inference

Tokens per second, and how many times the base's (median over turns, not the quotient of the means); `pp` is a prompt, `tg` decoding. Tuning changes numbers, not shapes: models are as fast and as large after it.
{SEED_NOTE}

{inference(study, bench)}

![Decoding]({plots.name}/decoding.svg)

## Training

{SEED_NOTE}

{training(study)}

{learns}

## Text

Greedy continuations before and after tuning.

{samples(study)}
## Commands

```sh
{commands}
```
"""
    arguments.output.write_text(text)
    print(f"study: wrote {arguments.output} and {plots}/", flush=True)


def main():
    study = Study(parse_arguments())
    study.convert()
    study.tune()
    write_report(study, *study.measure())


if __name__ == "__main__":
    main()
