#!/usr/bin/env python3
"""`hla finetune` against PyTorch: 50 steps of torch.optim.AdamW on the same rows, Llama and every kind of HLA.

Run by ctest, which sets HLA_BINARY and HLA_LOGITS (tests/interop/logits.cpp); by hand:

    HLA_BINARY=build/release/hla HLA_LOGITS=build/release/tests/hla_logits .venv/bin/python tests/interop/finetune_test.py [-v] [TestClass.test_name]
"""

import json
import math
import os
import shutil
import unittest

from common import ROOT, SCRATCH, our_logits, run, skip

try:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
except ImportError as error:
    skip(error)

STEPS, ROWS, CONTEXT, WARMUP = 50, 8, 32, 5
OPTIMIZER = dict(lr=2e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
CONVERSIONS = {
    "original": "--kv-ratio 0.6 --fast-frequencies 2",
    "latent": "--rope latent --kv-ratio 0.6 --fast-frequencies 2",
    "paper": "--rope paper",
}


def setUpModule():
    """A small random Llama with a real tokenizer, its conversions, and a text."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(SCRATCH / "llama")
    shutil.copy(ROOT / "data" / "stories260K" / "tok512.model", SCRATCH / "llama" / "tokenizer.model")
    for name, options in CONVERSIONS.items():
        run(os.environ["HLA_BINARY"], "convert", SCRATCH / "llama", SCRATCH / name, "--no-calib", *options.split())
    text = (ROOT / "data" / "wikitext-2" / "wiki.valid.txt").read_text()[:4000]
    (SCRATCH / "text.txt").write_text(text)
    # As a document it is encoded as it is; the lines of a text would be joined as WikiText's rows.
    (SCRATCH / "text.jsonl").write_text(json.dumps({"text": text}))


def tearDownModule():
    shutil.rmtree(SCRATCH)


def rows():
    """(ROWS, CONTEXT) ids and the ids that follow them, as data.rows = packed cuts them."""
    out = run(os.environ["HLA_BINARY"], "tokenize", SCRATCH / "llama", "--text", SCRATCH / "text.txt", "--ids", "--json")
    ids = torch.tensor(json.loads(out)["ids"][: ROWS * CONTEXT])
    labels = torch.cat([ids[1:], torch.tensor([-100])])  # the last one has no successor among those taken
    return ids.view(ROWS, CONTEXT), labels.view(ROWS, CONTEXT)


def learning_rate(step):
    if step < WARMUP:
        return OPTIMIZER["lr"] * (step + 1) / WARMUP
    return OPTIMIZER["lr"] * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def torch_run(name, clip):
    """Losses, and the weights in the end."""
    model = AutoModelForCausalLM.from_pretrained(SCRATCH / name, trust_remote_code=True, dtype=torch.float32)
    model.eval()  # there is no dropout
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices), dict(params=vectors, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, **OPTIMIZER)
    ids, labels = rows()
    losses = []
    for step in range(STEPS):
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(loss.item())
    return losses, {key: value.detach() for key, value in model.named_parameters()}


def our_run(name, clip, batch_rows, accumulate):
    out = SCRATCH / f"{name}-tuned-{batch_rows}"
    settings = {
        "model": SCRATCH / name,
        "output": out,
        # As transformers has them.
        "train.factors": "kept",
        "data.train": SCRATCH / "text.jsonl",
        "data.valid": SCRATCH / "text.jsonl",
        "data.context": CONTEXT,
        "data.max_tokens": ROWS * CONTEXT,
        "train.batch_rows": batch_rows,
        "train.accumulate": accumulate,
        "train.epochs": STEPS,
        "optimizer.learning_rate": OPTIMIZER["lr"],
        "optimizer.beta1": OPTIMIZER["betas"][0],
        "optimizer.beta2": OPTIMIZER["betas"][1],
        "optimizer.epsilon": OPTIMIZER["eps"],
        "optimizer.weight_decay": OPTIMIZER["weight_decay"],
        "optimizer.max_gradient_norm": clip,
        "schedule.warmup_steps": WARMUP,
        "eval.every_steps": STEPS,
    }
    run(os.environ["HLA_BINARY"], "finetune", *[f"--set={key}={value}" for key, value in settings.items()])
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in metrics if "loss" in entry], load_file(out / "model.safetensors")


class FinetuneTest(unittest.TestCase):
    def check(self, name, batch_rows=ROWS, accumulate=1):
        clip = 1.0
        expected, weights = torch_run(name, clip)
        losses, ours = our_run(name, clip, batch_rows, accumulate)
        self.assertEqual(len(losses), STEPS)
        self.assertLess(expected[-1], 0.7 * expected[0])  # something was learnt
        for step, (a, b) in enumerate(zip(losses, expected)):
            self.assertLess(abs(a - b), 1e-4 * b, f"step {step + 1}: {a} instead of {b}")
        # What was written is a folder for transformers.
        folder = SCRATCH / f"{name}-tuned-{batch_rows}"
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        ids = rows()[0]
        with torch.no_grad():
            self.assertLess((model(ids).logits - our_logits([folder], ids)[0]).abs().max().item(), 1e-4)
        self.assertEqual(set(ours), set(weights))
        for key, tensor in weights.items():
            difference = (ours[key] - tensor).abs().max().item()
            self.assertLess(difference, 1e-3 * tensor.abs().max().item(), key)

    def test_llama(self):
        self.check("llama")

    def test_llama_accumulating(self):
        self.check("llama", batch_rows=3, accumulate=3)

    def test_original(self):
        self.check("original")

    def test_latent(self):
        self.check("latent")

    def test_paper(self):
        self.check("paper")


if __name__ == "__main__":
    unittest.main()
