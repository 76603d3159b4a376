#!/usr/bin/env python3
"""Write a model in the forms other tools read, so that they can be compared with hla.

    export_reference_models.py gguf    HF_DIR OUT.gguf          HF Llama folder -> F32 GGUF (llama.cpp)
    export_reference_models.py llama2c CHECKPOINT.bin TOKENIZER.model OUT_DIR
                                                                llama2.c file -> HF folder (transformers, lm-eval)
    export_reference_models.py noise   HF_DIR OUT_DIR           copy with Gaussian noise on q, k, v and o

Needs: numpy, gguf, safetensors; llama2c also sentencepiece, protobuf and tokenizers:
    pip install numpy gguf safetensors sentencepiece protobuf tokenizers
All weights are written as float32. Nothing here uses code of hla.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
ATTENTION = tuple(name for name in LINEARS if name.startswith("self_attn."))


def fail(message):
    sys.exit(f"export_reference_models: error: {message}")


# --- HF folders ----------------------------------------------------------------------------------


def read_config(folder):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config.get("model_type") != "llama":
        fail(f"{folder}: expected model_type llama, got {config.get('model_type')!r}")
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config.setdefault("head_dim", config["hidden_size"] // heads)
    config.setdefault("rms_norm_eps", 1e-6)
    config.setdefault("max_position_embeddings", 2048)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        fail(f"{folder}: RoPE scaling is not supported here")
    config["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 1e4)))
    return config


def read_tensors(folder):
    """All tensors of a folder as float32, by HF name."""
    import numpy as np
    from safetensors.numpy import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        fail(f"{folder}: no .safetensors file")
    tensors = {}
    for file in files:
        for name, value in load_file(file).items():
            if not name.endswith("rotary_emb.inv_freq"):
                tensors[name] = value.astype(np.float32)
    return tensors


def write_folder(folder, config, tensors):
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


# --- GGUF ----------------------------------------------------------------------------------------


def interleave(weight, heads):
    """HF rotates (i, i + d/2) together, llama.cpp's llama architecture (2i, 2i + 1)."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def add_hyperparameters(writer, config, name):
    import gguf

    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_sentencepiece(writer, path, vocab_size):
    import gguf
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    if len(model.pieces) != vocab_size:
        fail(f"{path}: expected {vocab_size} pieces, got {len(model.pieces)}")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece.encode() for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    # SentencePiece's piece types have the numbers of gguf.TokenType.
    writer.add_token_types([gguf.TokenType(piece.type) for piece in model.pieces])
    writer.add_bos_token_id(model.trainer_spec.bos_id)
    writer.add_eos_token_id(model.trainer_spec.eos_id)
    writer.add_unk_token_id(model.trainer_spec.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)


def add_byte_level_bpe(writer, folder, vocab_size, pre):
    import gguf

    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    ids = {token: id for token, id in tokenizer["model"]["vocab"].items()}
    types = {id: gguf.TokenType.NORMAL for id in ids.values()}
    for added in tokenizer.get("added_tokens", []):
        ids[added["content"]] = added["id"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    tokens = {id: token for token, id in ids.items()}
    for id in range(vocab_size):
        tokens.setdefault(id, f"[PAD{id}]")
        types.setdefault(id, gguf.TokenType.UNUSED)
    if len(tokens) != vocab_size:
        fail(f"{folder}: the tokenizer has {len(tokens)} tokens, the model {vocab_size}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens[id].encode() for id in range(vocab_size)])
    writer.add_token_types([types[id] for id in range(vocab_size)])
    writer.add_token_merges(merges)
    for key, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id),
                     ("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id)):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            add(ids[token])
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    writer.add_add_eos_token(False)


def add_weights(writer, config, tensors):
    import numpy as np

    left = dict(tensors)

    def add(name, hf_name, heads=None):
        weight = left.pop(hf_name)
        writer.add_tensor(name, np.ascontiguousarray(weight if heads is None else interleave(weight, heads)))

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    if not config.get("tie_word_embeddings", False):
        add("output.weight", "lm_head.weight")
    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for hf, name in (LINEARS | NORMS).items():
            for suffix in ("weight", "bias"):
                source = f"model.layers.{layer}.{hf}.{suffix}"
                if suffix == "weight" or source in left:
                    add(f"blk.{layer}.{name}.{suffix}", source, heads.get(hf))
    left.pop("lm_head.weight", None)
    if left:
        fail(f"unexpected tensors: {', '.join(sorted(left)[:5])}")


def export_gguf(folder, out, pre="smollm"):
    """HF Llama folder -> F32 GGUF. `pre` names llama.cpp's pre-tokenizer of a byte-level BPE."""
    import gguf

    config = read_config(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    add_hyperparameters(writer, config, folder.name)
    if (folder / "tokenizer.model").exists():
        add_sentencepiece(writer, folder / "tokenizer.model", config["vocab_size"])
    else:
        add_byte_level_bpe(writer, folder, config["vocab_size"], pre)
    add_weights(writer, config, read_tensors(folder))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(out)


# --- llama2.c ------------------------------------------------------------------------------------


def half_split(weight, heads):
    """The inverse of interleave()."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, rows, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def read_llama2c(path):
    """Checkpoint version 0 -> (config, tensors) under HF names."""
    import numpy as np

    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, positions = (int(n) for n in np.frombuffer(data, "<i4", 7))
    tied, vocab = vocab > 0, abs(vocab)
    head = dim // heads
    values, at = np.frombuffer(data, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        count = int(np.prod(shape))
        if at + count > len(values):
            fail(f"{path}: too short")
        at += count
        return values[at - count : at].reshape(shape)

    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    # The file holds one kind of weight after another, each for all layers.
    order = (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_heads * head, dim)),
        ("self_attn.v_proj", (kv_heads * head, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    )
    for name, shape in order:
        for layer in range(layers):
            tensors[f"model.layers.{layer}.{name}.weight"] = take(*shape)
    tensors["model.norm.weight"] = take(dim)
    take(2, positions, head // 2)  # cosines and sines
    if not tied:
        tensors["lm_head.weight"] = take(vocab, dim)
    if at != len(values):
        fail(f"{path}: {len(values) - at} numbers too many")
    for name, weight in tensors.items():
        if name.endswith("q_proj.weight"):
            tensors[name] = half_split(weight, heads)
        elif name.endswith("k_proj.weight"):
            tensors[name] = half_split(weight, kv_heads)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": dim,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2,
    }
    return config, tensors


def sentencepiece_as_tokenizers(path):
    """A SentencePiece BPE model as a `tokenizers` one which gives the same ids and puts BOS first."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    rules = model.normalizer_spec
    if model.trainer_spec.model_type != 2 or rules.precompiled_charsmap:
        fail(f"{path}: expected a BPE model without character mapping")
    vocab = {piece.piece: id for id, piece in enumerate(model.pieces)}
    score = {piece.piece: piece.score for piece in model.pieces if piece.type == 1}
    # SentencePiece joins the neighbours whose union has the best score; a list of merges says the same.
    merges = [(piece[:cut], piece[cut:]) for piece in sorted(score, key=lambda p: -score[p])
              for cut in range(1, len(piece)) if piece[:cut] in score and piece[cut:] in score]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer


def export_llama2c(checkpoint, tokenizer, folder):
    """llama2.c checkpoint and SentencePiece model -> HF folder that transformers and lm-eval read."""
    config, tensors = read_llama2c(checkpoint)
    write_folder(folder, config, tensors)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    sentencepiece_as_tokenizers(tokenizer).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


# --- noise ---------------------------------------------------------------------------------------


def export_noise(folder, out, relative=0.02, seed=0):
    """A copy whose q, k, v and o weights W are W + relative * rms(W) * N(0, 1)."""
    import numpy as np

    random = np.random.default_rng(seed)
    tensors = read_tensors(folder)
    for name in sorted(tensors):
        if name.endswith(tuple(f"{module}.weight" for module in ATTENTION)):
            weight = tensors[name]
            rms = np.sqrt(np.mean(np.square(weight, dtype=np.float64)))
            noise = random.standard_normal(weight.shape)
            tensors[name] = (weight + relative * rms * noise).astype(np.float32)
    write_folder(out, json.loads((folder / "config.json").read_text("utf-8")), tensors)
    for file in folder.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "generation_config")):
            shutil.copyfile(file, out / file.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gguf = commands.add_parser("gguf", help="HF Llama folder -> F32 GGUF")
    gguf.add_argument("folder", type=Path)
    gguf.add_argument("out", type=Path)
    gguf.add_argument("--pre", default="smollm", help="llama.cpp's name of a byte-level BPE's pre-tokenizer")
    llama2c = commands.add_parser("llama2c", help="llama2.c checkpoint -> HF folder")
    llama2c.add_argument("checkpoint", type=Path)
    llama2c.add_argument("tokenizer", type=Path)
    llama2c.add_argument("out", type=Path)
    noise = commands.add_parser("noise", help="copy with noise on q, k, v and o")
    noise.add_argument("folder", type=Path)
    noise.add_argument("out", type=Path)
    noise.add_argument("--relative", type=float, default=0.02, help="standard deviation / RMS of the weight")
    noise.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "gguf":
        export_gguf(args.folder, args.out, args.pre)
    elif args.command == "llama2c":
        export_llama2c(args.checkpoint, args.tokenizer, args.out)
    else:
        export_noise(args.folder, args.out, args.relative, args.seed)


if __name__ == "__main__":
    main()
