#!/usr/bin/env python3
"""Shows that `hla convert --no-calib` holds one layer at a time, not the model.

Makes a random Llama checkpoint in a temporary folder (by default 4.9 GB, the shape of Llama 3.2 1B
with 36 layers), converts it, and compares the peak resident memory with the largest file of weights
plus 512 MB. Exits with 1 when it is above. Needs numpy and safetensors (`scripts/setup.sh` installs
both), twice the checkpoint's size of disk, and no network.

    .venv/bin/python scripts/check_convert_memory.py
    .venv/bin/python scripts/check_convert_memory.py --layers 8 --shard-size 600MB -- --rope latent
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

ALLOWANCE = 512e6


def layer_shapes(config):
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }


def write_checkpoint(folder, config):
    """One file per layer, fp16; returns the bytes of all tensors."""
    random = np.random.default_rng(0)
    # Drawn once and taken from another place for every tensor: drawing billions would take minutes.
    pool = (0.02 * random.standard_normal(1 << 24, dtype=np.float32)).astype(np.float16)

    def tensor(shape):
        start = int(random.integers(len(pool)))
        return np.take(pool, np.arange(start, start + int(np.prod(shape))), mode="wrap").reshape(shape)

    files = {"first": {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
                       "model.norm.weight": (config["hidden_size"],)}}
    for layer in range(config["num_hidden_layers"]):
        files[f"layer{layer}"] = {f"model.layers.{layer}.{name}": shape
                                  for name, shape in layer_shapes(config).items()}
    total, weight_map = 0, {}
    for name, shapes in files.items():
        tensors = {tensor_name: tensor(shape) for tensor_name, shape in shapes.items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        total += sum(array.nbytes for array in tensors.values())
        weight_map.update(dict.fromkeys(tensors, f"{name}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=root / "build/hla", type=pathlib.Path)
    parser.add_argument("--layers", default=36, type=int)
    parser.add_argument("--shard-size", default="600MB")
    parser.add_argument("--folder", type=pathlib.Path, help="where to put the temporary folder")
    parser.add_argument("options", nargs="*", help="more options of hla convert, after --")
    arguments = parser.parse_args()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048,
              "intermediate_size": 8192, "num_hidden_layers": arguments.layers,
              "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
              "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
              "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float16"}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        base, out = pathlib.Path(temporary) / "base", pathlib.Path(temporary) / "out"
        base.mkdir()
        size = write_checkpoint(base, config)
        command = [arguments.binary, "convert", "--no-calib", "--max-shard-size",
                   arguments.shard_size, "--json", "-", base, out, *arguments.options]

        def run(*more):
            result = subprocess.run([*map(str, command), *more], stdout=subprocess.PIPE, check=True)
            return json.loads(result.stdout)

        estimate, report = run("--dry-run"), run()
        largest = max(file.stat().st_size for file in out.glob("*.safetensors"))
        files = len(list(out.glob("*.safetensors")))
    peak, bound = report["peak_rss_bytes"], largest + ALLOWANCE
    print(f"checkpoint      {size / 1e6:8.0f} MB")
    print(f"largest of {files:2}   {largest / 1e6:8.0f} MB")
    print(f"bound           {bound / 1e6:8.0f} MB (the largest file + {ALLOWANCE / 1e6:.0f} MB)")
    print(f"peak memory     {peak / 1e6:8.0f} MB (--dry-run: {estimate['peak_memory_bytes'] / 1e6:.0f} MB)")
    print(f"time            {report['seconds']:8.1f} s")
    return 0 if peak <= bound else 1


if __name__ == "__main__":
    sys.exit(main())
