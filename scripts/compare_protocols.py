#!/usr/bin/env python3
"""Compare `hla ppl` with the tools its protocols are named after: same weights, fp32, same text.

    compare_protocols.py                      about 15 minutes: stories260K on whole texts, SmolLM2 on a few windows
    compare_protocols.py --full               SmolLM2 on the whole WikiText-2 test split too (hours on a small CPU)
    compare_protocols.py --only lm-eval gptq  some of the protocols

Prints a Markdown table, and writes it to --out with the same rows as JSON beside it. The exit status is 1 where a
difference is above the tolerance or where hla failed.

Needs, beside what scripts/setup.sh installs:
    .venv/bin/pip install lm_eval datasets accelerate sentencepiece protobuf
and, for the protocol llama.cpp, a llama-perplexity of https://github.com/ggml-org/llama.cpp, named by
--llama-perplexity. Without it those rows are left out. The Hugging Face Hub is not used.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench_ppl import joined_rows
from make_wikitext_goldens import pages as wikitext_pages

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait busily make a shared machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ROOT = Path(__file__).resolve().parent.parent
WIKITEXT = ROOT / "data" / "wikitext-2" / "wiki.test.raw"
STORIES = ROOT / "data" / "stories260K"
PROTOCOLS = ("lm-eval", "hf-stride", "gptq", "llama.cpp", "teacher")
PERCENTILES = ("0.1", "1", "5", "10", "50", "90", "95", "99", "99.9")
# fp32 on both sides.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Model:
    """One model in every form the tools read."""

    name: str
    folder: Path  # HF
    gguf: Path
    hla: Path  # what hla is given


@dataclass(frozen=True)
class Case:
    protocol: str
    model: str
    text: str  # a key of texts()
    context: int
    stride: int | None = None
    limit: int | None = None  # windows; pages for lm-eval

    def settings(self):
        parts = [f"ctx {self.context}"]
        if self.stride:
            parts.append(f"stride {self.stride}")
        if self.limit:
            parts.append(f"first {self.limit} {'pages' if self.protocol == 'lm-eval' else 'windows'}")
        return ", ".join(parts)


QUICK = (
    Case("lm-eval", "stories260K", "wikitext", 256),
    Case("lm-eval", "stories260K", "wikitext", 512),
    Case("lm-eval", "SmolLM2-135M-Instruct", "wikitext", 1024, limit=3),
    Case("hf-stride", "stories260K", "wikitext", 256, stride=128),
    Case("hf-stride", "stories260K", "wikitext", 512, stride=512),
    Case("hf-stride", "SmolLM2-135M-Instruct", "wikitext-30k", 1024, stride=512),
    Case("gptq", "stories260K", "wikitext", 128),
    Case("gptq", "stories260K", "wikitext", 512),
    Case("gptq", "SmolLM2-135M-Instruct", "wikitext", 2048, limit=3),
    Case("llama.cpp", "stories260K", "wikitext-single-spaces", 128),
    Case("llama.cpp", "stories260K", "wikitext-single-spaces", 512),
    Case("llama.cpp", "SmolLM2-135M-Instruct", "wikitext", 512, limit=24),
    Case("teacher", "stories260K", "wikitext-single-spaces", 256, limit=800),
    Case("teacher", "SmolLM2-135M-Instruct", "wikitext", 512, limit=8),
)
FULL = QUICK + (
    Case("lm-eval", "SmolLM2-135M-Instruct", "wikitext", 2048),
    Case("hf-stride", "SmolLM2-135M-Instruct", "wikitext", 1024, stride=512),
    Case("gptq", "SmolLM2-135M-Instruct", "wikitext", 2048),
    Case("llama.cpp", "SmolLM2-135M-Instruct", "wikitext", 512),
    Case("teacher", "SmolLM2-135M-Instruct", "wikitext", 512),
)


def note(message):
    print(f"[compare] {message}", file=sys.stderr, flush=True)


def threads_for(model):
    """A model of 260 thousand parameters only loses by more than one thread."""
    return 1 if model.startswith("stories") else len(os.sched_getaffinity(0))


# --- models and texts ----------------------------------------------------------------------------


def prepare_models(work, models):
    """Everything the tools read, made once under `work`: {name: (model, noisy copy of it)}."""
    import export_reference_models as export

    smollm2 = models / "SmolLM2-135M-Instruct"
    stories = work / "stories260K"
    prepared = {}
    if not stories.exists():
        export.export_llama2c(STORIES / "stories260K.bin", STORIES / "tok512.model", stories)
    for folder, hla in ((stories, STORIES / "stories260K.bin"), (smollm2, smollm2)):
        if not folder.exists():
            note(f"{folder}: not there, its rows are left out")
            continue
        noisy = work / f"{folder.name}-noise"
        if not noisy.exists():
            export.export_noise(folder, noisy)
        pair = []
        for form, given in ((folder, hla), (noisy, noisy)):
            gguf = work / f"{form.name}.gguf"
            if not gguf.exists():
                export.export_gguf(form, gguf)
            pair.append(Model(form.name, form, gguf, given))
        prepared[folder.name] = tuple(pair)
    return prepared


def prepare_texts(work):
    """Texts as files: the WikiText-2 raw test split, its first 30 kB, and a form for llama.cpp."""
    raw = WIKITEXT.read_bytes()
    made = {
        "wikitext-30k": raw[: raw.rindex(b"\n", 0, 30_000) + 1],
        # SentencePiece joins runs of spaces and drops those at the ends where its model says so; llama.cpp does not.
        "wikitext-single-spaces": re.sub(rb" {2,}", b" ", raw).strip(b" \n") + b"\n",
    }
    texts = {"wikitext": WIKITEXT}
    for name, data in made.items():
        texts[name] = work / f"{name}.raw"
        # Left alone where it is right, since another run may be reading it.
        if not texts[name].exists() or texts[name].read_bytes() != data:
            texts[name].write_bytes(data)
    for name, path in texts.items():
        data = path.read_bytes()
        note(f"text {name}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return texts


# --- transformers --------------------------------------------------------------------------------


def load_causal_lm(folder):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load_tokens(folder, text):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor(tokenizer(text).input_ids)


def gptq(model, path, case):
    """The loop of GPTQ and the papers after it: independent windows, each scored but for its first token."""
    import torch

    ids = load_tokens(model.folder, joined_rows(path))
    lm = load_causal_lm(model.folder)
    windows = min(len(ids) // case.context, case.limit or len(ids))
    loss = torch.nn.CrossEntropyLoss()
    losses = []
    with torch.inference_mode():
        for window in ids[: windows * case.context].view(windows, case.context):
            logits = lm(window[None], use_cache=False).logits[0]
            losses.append(loss(logits[:-1].float(), window[1:]).item())
    return {"tool": "GPTQ loop, " + transformers_version(), "tokens_scored": windows * (case.context - 1),
            "metrics": {"perplexity": math.exp(math.fsum(losses) / windows)}}


def hf_stride(model, path, case):
    """Sliding windows as in the transformers documentation, "Perplexity of fixed-length models".

    Labels that are only context are -100. The model shifts labels by one, so that the first window scores one token
    fewer than it has labels, and every other as many as it has (or one fewer where all its tokens are labels).
    The documentation takes one fewer for all windows as their weight; that number is given beside the exact one.
    """
    import torch

    ids = load_tokens(model.folder, joined_rows(path))
    lm = load_causal_lm(model.folder)
    total, count, documented_total, documented_count, previous_end = 0.0, 0, 0.0, 0, 0
    with torch.inference_mode():
        for begin in range(0, len(ids), case.stride):
            end = min(begin + case.context, len(ids))
            labels = ids[begin:end].clone()
            labels[: len(labels) - (end - previous_end)] = -100
            loss = lm(ids[None, begin:end], labels=labels[None], use_cache=False).loss.item()
            scored = int((labels[1:] != -100).sum())
            total, count = total + loss * scored, count + scored
            weight = int((labels != -100).sum()) - 1
            documented_total, documented_count = documented_total + loss * weight, documented_count + weight
            previous_end = end
            if end == len(ids):
                break
    return {"tool": "documentation's loop, " + transformers_version(), "tokens_scored": count,
            "metrics": {"perplexity": math.exp(total / count)},
            # What the documentation's own weights give.
            "documented_weights": math.exp(documented_total / documented_count)}


def transformers_version():
    import transformers

    return f"transformers {transformers.__version__}"


# --- lm-eval -------------------------------------------------------------------------------------


def lm_eval_task(pages):
    """lm-eval's own task `wikitext`, with its detokenizer and word counts, on local pages."""
    import datasets
    import lm_eval
    from lm_eval.tasks.wikitext import preprocess_wikitext
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: getattr(preprocess_wikitext, node.value.split(".")[1]))
    text = (Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml").read_text("utf-8")
    config = yaml.load(text, Loader)
    for key in ("dataset_path", "dataset_name", "training_split", "validation_split"):
        del config[key]
    test = datasets.Dataset.from_dict({"page": pages})
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(test=test)
    return config, preprocess_wikitext.wikitext_detokenizer


def run_lm_eval(model, path, case):
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    pages = wikitext_pages(path.read_bytes().decode("utf-8"))
    task, detokenize = lm_eval_task(pages)
    lm = HFLM(pretrained=str(model.folder), dtype=torch.float32, device="cpu", batch_size=1, max_length=case.context)
    results = lm_eval.simple_evaluate(model=lm, tasks=[task], limit=case.limit, bootstrap_iters=0, log_samples=False)
    values = results["results"]["wikitext"]
    return {
        "tool": f"lm_eval {lm_eval.__version__}",
        "tokens_scored": sum(len(lm.tok_encode(detokenize({"page": page}))) for page in pages[: case.limit]),
        "metrics": {name: values[f"{name},none"] for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")},
    }


# --- llama.cpp -----------------------------------------------------------------------------------


class LlamaPerplexity:
    def __init__(self, path):
        self.path = path
        version = subprocess.run([path, "--version"], capture_output=True, text=True)
        found = re.search(r"version: (.*)", version.stdout + version.stderr)
        self.version = f"llama-perplexity {found[1]}" if found else "llama-perplexity"

    def run(self, model, path, case, *options):
        # The cache is fp16 unless told otherwise.
        command = [self.path, "-m", model.gguf, "-f", path, "-c", case.context, "-t", threads_for(case.model),
                   "-ctk", "f32", "-ctv", "f32", "-fa", "off", *options]
        if case.limit:
            command += ["--chunks", case.limit]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
        output = done.stdout + done.stderr
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{output[-2000:]}")
        return output

    @staticmethod
    def tokens_scored(output, case):
        chunks = int(re.search(r"over (\d+) chunks", output)[1])
        return chunks * (case.context - 1 - case.context // 2)


def llama_cpp(tool, model, path, case):
    output = tool.run(model, path, case)
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", output)
    if not found:
        raise RuntimeError(f"{tool.path}: no final estimate in its output:\n{output[-2000:]}")
    return {"tool": tool.version, "tokens_scored": tool.tokens_scored(output, case),
            "metrics": {"perplexity": float(found[1]), "standard_error": float(found[2])},
            "resolution": {"perplexity": 1e-4, "standard_error": 1e-5}}


def llama_cpp_teacher(tool, teacher, student, path, case, work):
    """llama-perplexity --kl-divergence."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        base = Path(folder) / "teacher.bin"
        tool.run(teacher, path, case, "--kl-divergence-base", base)
        output = tool.run(student, path, case, "--kl-divergence-base", base, "--kl-divergence")
    metrics, resolution = {}, {}

    def take(label, value, error=None, percent=False):
        found = re.search(r"^ *" + re.escape(label) + r"\s*:\s*(-?[\d.]+)(?:\s*± *([\d.]+))?", output, re.MULTILINE)
        if not found:
            raise RuntimeError(f"{tool.path}: no {label!r} in its output:\n{output[-2000:]}")
        scale = 0.01 if percent else 1
        for name, group in ((value, found[1]), (error, found[2])):
            if name:
                metrics[name] = float(group) * scale
                resolution[name] = 10.0 ** -len(group.split(".")[1]) * scale

    take("Mean PPL(Q)", "perplexity", "standard_error")
    take("Cor(ln(PPL(Q)), ln(PPL(base)))", "ppl_correlation", percent=True)
    take("Mean ln(PPL(Q)/PPL(base))", "log_ppl_ratio", "log_ppl_ratio_standard_error")
    take("Mean PPL(Q)/PPL(base)", "ppl_ratio", "ppl_ratio_standard_error")
    take("Mean    KLD", "kl_mean", "kl_standard_error")
    take("Maximum KLD", "kl_max")
    take("Minimum KLD", "kl_min")
    for percentile in PERCENTILES:
        label = "Median  KLD" if percentile == "50" else f"{float(percentile):.1f}%   KLD"
        take(label, f"kl_percentiles.{percentile}")
    take("Mean    Δp", "delta_p_mean", percent=True)
    take("RMS Δp", "delta_p_rms", percent=True)
    take("Same top p", "same_top1", "same_top1_standard_error", percent=True)
    return {"tool": f"{tool.version} --kl-divergence", "tokens_scored": tool.tokens_scored(output, case),
            "metrics": metrics, "resolution": resolution,
            "sixteen_bit": direct_teacher(teacher, student, path, case, sixteen_bit=True)["metrics"]}


# --- direct teacher comparison -------------------------------------------------------------------


def llama_cpp_windows(ids, context, limit):
    """(windows, context) tokens as llama-perplexity reads them, BOS put over the first where there is one."""
    windows = min(len(ids) // context, limit or len(ids))
    return ids[: windows * context].view(windows, context).clone()


def as_sixteen_bit(logits):
    """Log-probabilities as llama-perplexity --kl-divergence-base stores them: clipped 16 below the largest, 16 bits."""
    import torch

    largest = logits.amax(-1, keepdim=True)
    smallest = torch.maximum(logits.amin(-1, keepdim=True), largest - 16)
    step = (largest - smallest) / 65535
    return ((logits - smallest) / step).round().clamp(min=0) * step + smallest - logits.logsumexp(-1, keepdim=True)


def direct_teacher(teacher, student, path, case, sixteen_bit=False):
    """Divergence over the protocol llama.cpp's windows from transformers logits, softmax and sums in fp64.

    With `sixteen_bit` the teacher's log-probabilities are rounded as in llama.cpp's file, and tokens below e^-16
    are left out of the divergence as there.
    """
    import numpy as np
    import torch
    import transformers

    text = path.read_bytes().decode("utf-8")
    ids = load_tokens(teacher.folder, text.removesuffix("\n"))
    windows = llama_cpp_windows(ids, case.context, case.limit)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher.folder)
    if ids[0] == tokenizer.bos_token_id:
        windows[:, 0] = tokenizer.bos_token_id
    models = load_causal_lm(teacher.folder), load_causal_lm(student.folder)
    first = case.context // 2
    kl, nll, nll_teacher, delta, same = [], [], [], [], []
    with torch.inference_mode():
        for window in windows:
            p, q = (lm(window[None], use_cache=False).logits[0, first:-1].double() for lm in models)
            p, q = as_sixteen_bit(p) if sixteen_bit else p.log_softmax(-1), q.log_softmax(-1)
            target = window[first + 1 :, None]
            log_p, log_q = p.gather(1, target)[:, 0], q.gather(1, target)[:, 0]
            terms = p.exp() * (p - q)
            kl.append((terms * (p > -16) if sixteen_bit else terms).sum(-1))
            nll.append(-log_q)
            nll_teacher.append(-log_p)
            delta.append(log_q.exp() - log_p.exp())
            same.append(p.argmax(-1) == q.argmax(-1))
    kl, nll, nll_teacher, delta, same = (torch.cat(x).double().numpy() for x in (kl, nll, nll_teacher, delta, same))
    count = len(kl)

    def error(x):
        return x.std() / math.sqrt(count - 1)

    ratio = math.exp(nll.mean() - nll_teacher.mean())
    metrics = {
        "perplexity": math.exp(nll.mean()),
        "standard_error": math.exp(nll.mean()) * error(nll),
        "ppl_correlation": np.corrcoef(nll, nll_teacher)[0, 1],
        "log_ppl_ratio": nll.mean() - nll_teacher.mean(),
        "log_ppl_ratio_standard_error": error(nll - nll_teacher),
        "ppl_ratio": ratio,
        "ppl_ratio_standard_error": ratio * error(nll - nll_teacher),
        "kl_mean": kl.mean(),
        "kl_standard_error": error(kl),
        "kl_max": kl.max(),
        "kl_min": kl.min(),
        **{f"kl_percentiles.{p}": np.percentile(kl, float(p)) for p in PERCENTILES},
        "delta_p_mean": delta.mean(),
        "delta_p_rms": math.sqrt(np.square(delta).mean()),
        "same_top1": same.mean(),
        "same_top1_standard_error": math.sqrt(same.mean() * (1 - same.mean()) / (count - 1)),
    }
    return {"tool": f"direct, {transformers_version()}", "tokens_scored": count,
            "metrics": {name: float(value) for name, value in metrics.items()}}


# --- hla -----------------------------------------------------------------------------------------


def run_hla(hla, model, path, case, teacher=None):
    """`hla ppl` -> its result as {metric: value}, those of the divergence without their prefix."""
    protocol = "llama.cpp" if case.protocol == "teacher" else case.protocol
    command = [hla, "ppl", model.hla, "--protocol", protocol, "--text", path, "--ctx", case.context, "--dtype", "fp32",
               "--device", "cpu", "--threads", threads_for(case.model), "--json", "-"]
    if case.stride:
        command += ["--stride", case.stride]
    if case.limit:
        command += ["--limit", case.limit]
    if teacher:
        command += ["--reference", teacher.hla]
    command = [str(word) for word in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        note(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
        return None
    result = json.loads(done.stdout)["results"][0]
    flat = dict(result, **result.get("divergence", {}))
    flat.update({f"kl_percentiles.{name}": value for name, value in flat.get("kl_percentiles", {}).items()})
    return flat


# --- rows ----------------------------------------------------------------------------------------


def tolerance(reference, metric):
    """How far hla may be from the tool's number: its own precision, and how many digits the tool prints."""
    value = reference["metrics"][metric]
    # Percentiles and extremes are single tokens, not means.
    allowed = (10 * TOLERANCE if metric.startswith(("kl_p", "kl_max", "kl_min")) else TOLERANCE) * abs(value)
    if metric.startswith("kl_") or "delta_p" in metric:
        # Differences of two nearly equal fp32 numbers.
        allowed += 2e-6
    if metric == "same_top1":
        # Two ties decided otherwise.
        allowed += 2 / reference["tokens_scored"]
    return allowed + reference.get("resolution", {}).get(metric, 0)


def agrees(reference, metric, value, tokens_scored):
    """Whether `value` is the tool's number."""
    return (value is not None and tokens_scored == reference["tokens_scored"] and
            abs(value - reference["metrics"][metric]) <= tolerance(reference, metric))


def make_rows(case, reference, ours, seconds):
    rows = []
    for metric, value in reference["metrics"].items():
        row = {"protocol": case.protocol, "model": case.model, "settings": case.settings(), "text": case.text,
               "tool": reference["tool"], "tokens_scored": reference["tokens_scored"], "metric": metric,
               "reference": value, "hla": None, "hla_tokens_scored": None, "agrees": None,
               "reference_seconds": round(seconds, 1)}
        if "documented_weights" in reference:
            row["documented_weights"] = reference["documented_weights"]
        if ours is not None:
            row["hla"] = ours.get(metric)
            row["hla_tokens_scored"] = ours["tokens_scored"]
            if row["hla"] is not None:
                row["relative_difference"] = (row["hla"] - value) / abs(value) if value else None
            row["agrees"] = agrees(reference, metric, row["hla"], ours["tokens_scored"])
        if "sixteen_bit" in reference:
            # hla keeps the teacher in fp32; the tool's number is checked against the same rounding instead.
            row["sixteen_bit"] = reference["sixteen_bit"][metric]
            row["agrees"] = agrees(reference, metric, row["sixteen_bit"], row["tokens_scored"])
        rows.append(row)
    return rows


def references(case, pair, path, tool, work):
    """The tools that measure a case, as functions."""
    model, noisy = pair
    if case.protocol == "lm-eval":
        return [lambda: run_lm_eval(model, path, case)]
    if case.protocol == "hf-stride":
        return [lambda: hf_stride(model, path, case)]
    if case.protocol == "gptq":
        return [lambda: gptq(model, path, case)]
    if case.protocol == "llama.cpp":
        return [lambda: llama_cpp(tool, model, path, case)] if tool else []
    calls = [lambda: direct_teacher(model, noisy, path, case)]
    if tool:
        calls.append(lambda: llama_cpp_teacher(tool, model, noisy, path, case, work))
    return calls


def compare(case, pair, path, tool, args):
    import torch

    torch.set_num_threads(threads_for(case.model))
    calls = references(case, pair, path, tool, args.work)
    if not calls:
        return []
    model, noisy = pair
    ours = None
    if args.hla:
        student, teacher = (noisy, model) if case.protocol == "teacher" else (model, None)
        ours = run_hla(args.hla, student, path, case, teacher) or {"tokens_scored": None}
    rows = []
    for call in calls:
        start = time.monotonic()
        reference = call()
        new = make_rows(case, reference, ours, time.monotonic() - start)
        first = new[0]
        note(f"{case.protocol}, {case.model}, {case.settings()}: {reference['tool']} {first['metric']} "
             f"{first['reference']:.8g} in {first['reference_seconds']} s; hla {first['hla']}")
        rows += new
    return rows


def number(value):
    return "–" if value is None else f"{value:.7g}"


def verdict(row):
    return {None: "–", True: "yes", False: "**no**"}[row["agrees"]]


def table(head, alignment, lines):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, alignment, *lines]) + "\n"


def comparison_table(rows):
    lines = []
    for row in rows:
        tokens = f"{row['tokens_scored']:,}"
        if row["hla_tokens_scored"] not in (None, row["tokens_scored"]):
            tokens += f" (hla {row['hla_tokens_scored']:,})"
        difference = row.get("relative_difference")
        lines.append([row["protocol"], row["model"], f"{row['settings']}; {row['text']}", tokens, row["tool"],
                      row["metric"], number(row["reference"]), number(row["hla"]),
                      "–" if difference is None else f"{difference:+.1e}", verdict(row)])
    return table(["protocol", "model", "settings; text", "tokens scored", "tool", "metric", "tool's number", "hla",
                  "relative difference", "within tolerance"],
                 ["---", "---", "---", "--:", "---", "---", "--:", "--:", "--:", "---"], lines)


SIXTEEN_BIT = """
{tool}: its file of the teacher's log-probabilities has
16 bits for each and cuts them off 16 below the largest, so that its numbers differ from exact ones. They are compared
with transformers logits put through the same rounding; the last column is exact.

"""

DOCUMENTED_WEIGHTS = """
hf-stride: the documentation weights every window's mean by one token fewer than it has labels, also where none is
lost to the shift; the table has the mean over all scored tokens. With the documentation's weights:
{numbers}.
"""


def sixteen_bit_table(rows):
    lines = [[row["model"], row["settings"], row["metric"], number(row["reference"]), number(row["sixteen_bit"]),
              verdict(row), number(row["hla"])] for row in rows]
    return SIXTEEN_BIT.format(tool=rows[0]["tool"]) + table(
        ["model", "settings", "metric", "llama.cpp", "direct, rounded alike", "within tolerance", "hla"],
        ["---", "---", "---", "--:", "--:", "---", "--:"], lines)


def markdown(rows):
    rounded = [row for row in rows if "sixteen_bit" in row]
    text = comparison_table([row for row in rows if "sixteen_bit" not in row])
    documented = [f"{row['documented_weights']:.7g} ({row['model']}, {row['settings']})" for row in rows
                  if "documented_weights" in row]
    if documented:
        text += DOCUMENTED_WEIGHTS.format(numbers=", ".join(documented))
    return text + (sixteen_bit_table(rounded) if rounded else "")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hla", default=str(ROOT / "build" / "release" / "hla"), help="the hla program; '' for none")
    parser.add_argument("--llama-perplexity", default=shutil.which("llama-perplexity"), help="llama.cpp's program")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="holds SmolLM2-135M-Instruct")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reference", help="where exported models go")
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="protocols to compare")
    parser.add_argument("--only-model", help="one model's rows")
    parser.add_argument("--full", action="store_true", help="the whole test split with SmolLM2 too")
    parser.add_argument("--out", type=Path, help="write the table to FILE and the rows to FILE with suffix .json")
    args = parser.parse_args()
    if args.hla and not shutil.which(args.hla):
        note(f"hla: {args.hla} is not there; only the tools are run")
        args.hla = None
    return args


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    tool = None
    if args.llama_perplexity and shutil.which(args.llama_perplexity):
        tool = LlamaPerplexity(args.llama_perplexity)
    else:
        note("llama-perplexity is not there (--llama-perplexity): its rows are left out")
    models, texts = prepare_models(args.work, args.models), prepare_texts(args.work)
    rows = []
    for case in FULL if args.full else QUICK:
        if case.protocol in args.only and case.model in models and args.only_model in (None, case.model):
            rows += compare(case, models[case.model], texts[case.text], tool, args)
    text = markdown(rows)
    print(text, end="")
    if args.out:
        args.out.write_text(text, "utf-8")
        args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 1 if any(row["agrees"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
