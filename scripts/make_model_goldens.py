#!/usr/bin/env python3
"""Make the model goldens under tests/data: what `transformers` computes, for our own forward pass to match.

    make_model_goldens.py [CASE…]        # default: every case, and smollm2

Run by hand when a case is added, never in CI; the results are committed. Needs a Python of its own with
transformers, torch, safetensors and tokenizers (made with transformers 5.23.0, torch 2.10.0):

    python3 -m venv /tmp/dev && /tmp/dev/bin/pip install torch==2.10.0 transformers==5.23.0
    /tmp/dev/bin/python scripts/make_model_goldens.py

tests/data/models/CASE/     a tiny random Llama as an HF folder, and golden.safetensors with
    input_ids [2, T] int64, logits [2, T, V] float32, loss [] float32 (mean shifted cross-entropy);
    for gqa and attention_bias also grad.NAME, the gradient of the loss with respect to two weights.
tests/data/smollm2/golden.safetensors   for 192 tokens of WikiText through models/SmolLM2-135M-Instruct:
    input_ids [192], top1 [192] int64, top1_logit [192], logsumexp [192], columns [48] int64,
    logits [192, 48] (those columns of the logits).
Logits are computed from the written folder, in float32, so they hold for what is on disk.
"""

import json
import sys
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
WIKITEXT = Path("data/wikitext-2/wiki.test.raw"), Path("../shared/data/wikitext-2-raw/wiki.test.raw")
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
TOKENS = 48

BASE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
TIED = dict(tie_word_embeddings=True)


def rope(kind, theta=10000.0, **rest):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **rest))


# head_dim 8 and theta 500 give wavelengths 6.3, 30, 140, 664: one kept, one blended, two divided.
LLAMA3 = dict(
    TIED,
    max_position_embeddings=256,
    **rope(
        "llama3",
        theta=500.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
)
# head_dim 16 and theta 100 spread the ramp over several pairs.
YARN = dict(
    TIED,
    head_dim=16,
    max_position_embeddings=128,
    **rope("yarn", theta=100.0, factor=4.0, original_max_position_embeddings=32),
)
YARN_EXPLICIT = dict(
    YARN,
    **rope(
        "yarn",
        theta=100.0,
        factor=4.0,
        original_max_position_embeddings=32,
        attention_factor=1.3,
        beta_fast=4.0,
        beta_slow=0.5,
        truncate=False,
    ),
)
LINEAR = dict(TIED, max_position_embeddings=32, **rope("linear", factor=2.5))
DYNAMIC = dict(TIED, max_position_embeddings=32, **rope("dynamic", factor=3.0))
# Factors that differ much, so that a mistake is visible. The first has more than its original positions, the other
# does not.
FACTORS = dict(short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.0, 2.0, 5.5, 8.0])
LONGROPE = dict(
    TIED, max_position_embeddings=128, **rope("longrope", original_max_position_embeddings=16, **FACTORS)
)
LONGROPE_SHORT = dict(
    LONGROPE,
    **rope("longrope", original_max_position_embeddings=64, factor=4.0, attention_factor=1.2, **FACTORS),
)

# Case -> (config, how it is written). "v4": config.json with the keys of transformers 4.
CASES = {
    "gqa": ({}, {}),
    "mha": (dict(num_key_value_heads=4), {}),
    "mqa": (dict(num_key_value_heads=1, num_hidden_layers=3), {}),
    "untied": (dict(tie_word_embeddings=False, rms_norm_eps=1e-3), {}),
    "tied": (TIED, {}),
    "attention_bias": (dict(attention_bias=True), {}),
    "mlp_bias": (dict(TIED, mlp_bias=True), {}),
    "head_dim": (dict(TIED, head_dim=16), {}),
    "gelu": (dict(TIED, hidden_act="gelu"), {}),
    "rope_linear": (LINEAR, {}),
    "rope_dynamic": (DYNAMIC, {}),
    "rope_llama3": (LLAMA3, {}),
    "rope_yarn": (YARN, {}),
    "rope_yarn_explicit": (YARN_EXPLICIT, {}),
    "rope_longrope": (LONGROPE, {}),
    "rope_longrope_short": (LONGROPE_SHORT, {}),
    "v4_default": (dict(TIED, **rope("default", theta=50000.0)), dict(v4=True)),
    "v4_rope_linear": (LINEAR, dict(v4=True)),
    "v4_rope_dynamic": (DYNAMIC, dict(v4=True)),
    "v4_rope_llama3": (LLAMA3, dict(v4=True)),
    "v4_rope_yarn": (YARN, dict(v4=True)),
    "v4_rope_longrope": (LONGROPE, dict(v4=True)),
    "sharded": (TIED, dict(shard="30KB")),
    "bf16": ({}, dict(dtype=torch.bfloat16)),
    "fp16": ({}, dict(dtype=torch.float16)),
}
WITH_GRADIENTS = ("gqa", "attention_bias")
GRADIENTS = ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight")


def randomise(model, generator):
    """Weights that make a mistake visible: logits of order 1, peaked attention, norms and biases that matter."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            value = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name:
            value = 0.15 * noise  # also the head where tied
        else:
            peak = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            value = noise * peak / weight.shape[1] ** 0.5
        weight.data.copy_(value)


def as_v4(path):
    """Rewrite config.json with the keys transformers 4 wrote."""
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    kind = scaling.pop("rope_type")
    # "type" is the older spelling of "rope_type"; linear and dynamic are the types that had it.
    key = "type" if kind in ("linear", "dynamic") else "rope_type"
    config["rope_scaling"] = None if kind == "default" else {key: kind, **scaling}
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    if kind == "default":  # files of the first Llamas have none of these
        for name in ("head_dim", "attention_bias", "mlp_bias", "attention_dropout", "pretraining_tp"):
            config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def versions():
    return {"format": "pt", "transformers": transformers.__version__, "torch": torch.__version__}


def make_case(name):
    settings, how = CASES[name]
    folder = DATA / "models" / name
    if folder.exists():
        for path in folder.iterdir():
            path.unlink()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    model = LlamaForCausalLM(LlamaConfig(**dict(BASE, **settings)))
    randomise(model, generator)
    model.to(how.get("dtype", torch.float32))
    model.save_pretrained(folder, max_shard_size=how.get("shard", "1GB"))
    if how.get("v4"):
        as_v4(folder / "config.json")

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(0, BASE["vocab_size"], (2, TOKENS), generator=generator)
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    golden = {"input_ids": ids, "logits": logits.detach(), "loss": loss.detach()}
    if name in WITH_GRADIENTS:
        loss.backward()
        for parameter in GRADIENTS:
            golden[f"grad.{parameter}"] = model.get_parameter(parameter).grad
    save_file(golden, folder / "golden.safetensors", metadata=versions())
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes its files readable for their owner only

    attention = model(ids, output_attentions=True).attentions[0][..., -1, :]
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{name:20} {size:7} bytes, logits std {logits.std():.2f}, loss {loss:.3f}, "
        f"largest attention weight {attention.max(-1).values.mean():.2f}"
    )


def make_smollm2():
    text = next(ROOT / path for path in WIKITEXT if (ROOT / path).exists()).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    ids = tokenizer(text[:4000], return_tensors="pt")["input_ids"][:, :192]
    logits = {}
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            SMOLLM2, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            logits[attention] = model.eval()(ids).logits[0]
    difference = (logits["eager"] - logits["sdpa"]).abs().max().item()
    assert difference < 1e-3, difference
    logits = logits["eager"]
    columns = torch.arange(48) * (logits.shape[1] // 48)
    best = logits.max(dim=-1)
    golden = {
        "input_ids": ids[0].contiguous(),
        "top1": best.indices,
        "top1_logit": best.values,
        "logsumexp": torch.logsumexp(logits, dim=-1),
        "columns": columns,
        "logits": logits[:, columns].contiguous(),
    }
    path = DATA / "smollm2" / "golden.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(golden, path, metadata=versions())
    path.chmod(0o644)
    top2 = logits.topk(2, dim=-1).values
    margin = (top2[:, 0] - top2[:, 1]).min().item()
    nll = (golden["logsumexp"][:-1] - logits[:-1].gather(1, ids[0, 1:, None])[:, 0]).mean().item()
    print(
        f"smollm2              {path.stat().st_size:7} bytes, eager against sdpa {difference:.1e}, "
        f"smallest top-1 margin {margin:.1e}, mean NLL {nll:.4f}"
    )


def main():
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    known = [*CASES, "smollm2"]
    wanted = sys.argv[1:] or known
    unknown = [name for name in wanted if name not in known]
    if unknown:
        sys.exit(f"unknown case {', '.join(unknown)}; there are: {', '.join(known)}")
    for name in wanted:
        make_smollm2() if name == "smollm2" else make_case(name)


if __name__ == "__main__":
    main()
