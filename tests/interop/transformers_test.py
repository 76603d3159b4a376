#!/usr/bin/env python3
"""Converted folders in transformers: logits, losses and gradients equal to ours, and a cache that holds latents.

Run by ctest, which sets HLA_BINARY and HLA_LOGITS (tests/interop/logits.cpp); by hand:

    HLA_BINARY=build/release/hla HLA_LOGITS=build/release/tests/hla_logits \
        .venv/bin/python tests/interop/transformers_test.py [-v] [TestClass.test_name]
"""

import inspect
import json
import os
import shutil
import unittest

from common import ROOT, SCRATCH, our_gradients, our_logits, run, skip

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
except ImportError as error:
    skip(error)

MODELS = ROOT / "tests" / "data" / "models"  # small random Llamas, saved by transformers
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"

# What a conversion is, by name.
CONVERSIONS = {
    "joint": "--kv-ratio 0.5",
    "fast": "--kv-ratio 0.6 --fast-frequencies 2",
    "separate": "--k-rank 5 --v-rank 7 --q-rank 9",
    "latent": "--rope latent --kv-ratio 0.5 --fast-frequencies 2",
    "latent_separate": "--rope latent --k-rank 6 --v-rank 7 --q-rank 9",
    "paper": "--rope paper",
    "paper_part": "--rope paper --k-rank 7 --v-rank 5 --q-rank 13 --rotary-fraction 0.4",
}
# Every committed model with some conversions.
PAIRS = [
    ("gqa", "joint fast separate latent latent_separate paper paper_part"),
    ("mha", "fast latent"),
    ("mqa", "separate latent paper_part"),
    ("attention_bias", "joint fast separate latent latent_separate paper"),
    ("mlp_bias", "joint"),
    ("head_dim", "fast latent paper"),
    ("gelu", "joint"),
    ("tied", "latent"),
    ("untied", "joint"),
    ("sharded", "latent"),
    ("bf16", "joint"),
    ("fp16", "latent"),
    ("rope_linear", "fast latent"),
    ("rope_dynamic", "fast latent"),
    ("rope_llama3", "fast latent"),
    ("rope_yarn", "fast latent paper"),
    ("rope_yarn_explicit", "fast latent"),
    ("rope_longrope", "fast latent paper"),
    ("rope_longrope_short", "fast latent"),
    ("v4_default", "joint"),
    ("v4_rope_linear", "joint"),
    ("v4_rope_dynamic", "joint"),
    ("v4_rope_llama3", "joint"),
    ("v4_rope_yarn", "joint"),
    ("v4_rope_longrope", "joint"),
]


def convert(base, options, name):
    folder = SCRATCH / name
    if not folder.exists():
        run(os.environ["HLA_BINARY"], "convert", base, folder, "--no-calib", *options.split())
    return folder


def base(model):
    """A committed model with queries and keys of half the size: as it is, its attention is so peaked that fp32
    rounding alone moves logits by 2e-5."""
    folder = SCRATCH / model
    if not folder.exists():
        shutil.copytree(MODELS / model, folder)
        for path in folder.glob("model*.safetensors"):
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if "q_proj" in name or "k_proj" in name:
                    tensor *= 0.5
            save_file(tensors, path, metadata={"format": "pt"})
    return folder


def converted(model, conversion):
    return convert(base(model), CONVERSIONS[conversion], f"{model}-{conversion}")


def load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], f"{folder.name}: {kind} {info[kind]}"
    return model.float().eval()


def random_ids(*shape, vocab=96, seed=1):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def cache_of(outputs):
    return outputs["cache"] if "cache" in outputs else outputs["past_key_values"]


def with_cache(cache):
    """The argument of forward(): called `cache` since transformers 5.24."""
    name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    return {name: cache}


def cached_tensors(cache):
    """(keys, values) of every layer."""
    layers = getattr(cache, "layers", None)  # since transformers 4.54
    return list(cache) if layers is None else [(layer.keys, layer.values) for layer in layers]


def cache_floats(config):
    """Per token, by layer."""
    return [
        layer["kv_rank"] + layer.get("k_rank", 0) + 2 * sum(layer.get("k_ranks", []))
        for layer in config.hla["layers"]
    ]


class HlaTestCase(unittest.TestCase):
    def assert_close(self, got, expected, tolerance, message=""):
        self.assertEqual(got.shape, expected.shape, message)
        difference = (got - expected).abs().max().item()
        self.assertLessEqual(difference, tolerance, message)


class LogitsTest(HlaTestCase):
    def test_equal_ours(self):
        """Every feature of Llama with every kind of conversion, to 1e-5."""
        ids = random_ids(2, 40)
        pairs = [(model, conversion) for model, names in PAIRS for conversion in names.split()]
        folders = [converted(*pair) for pair in pairs]
        for folder, expected in zip(folders, our_logits(folders, ids)):
            with self.subTest(folder.name), torch.no_grad():
                model = load(folder)
                self.assert_close(model(ids).logits, expected, 1e-5)
                self.assertGreater(expected.std(), 0.1)

    def test_every_committed_model_is_there(self):
        self.assertEqual({model for model, _ in PAIRS}, {path.name for path in MODELS.iterdir()})

    def test_model_saved_by_this_transformers(self):
        config = LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            attention_bias=True,
            mlp_bias=True,
            initializer_range=0.15,
        )
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(SCRATCH / "saved", max_shard_size="20KB")
        self.assertGreater(len(list((SCRATCH / "saved").glob("*.safetensors"))), 1)
        folder = convert(SCRATCH / "saved", CONVERSIONS["latent"], "saved-latent")
        ids = random_ids(2, 40)
        with torch.no_grad():
            self.assert_close(load(folder)(ids).logits, our_logits([folder], ids)[0], 1e-5)

    def test_padding_changes_nothing(self):
        """A sequence padded on the left beside another, by both of transformers' attentions, and alone."""
        ids = random_ids(2, 20)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for conversion in ("joint", "latent", "paper"):
            with self.subTest(conversion), torch.no_grad():
                folder = converted("gqa", conversion)
                sdpa, eager = (load(folder, attn_implementation=name) for name in ("sdpa", "eager"))
                padded = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
                expected = [sdpa(ids[:1, 5:]).logits[0], sdpa(ids[1:]).logits[0]]
                outputs = eager(**padded, output_attentions=True)
                self.assertEqual(outputs.attentions[1].shape, (2, 4, 20, 20))
                for logits in (sdpa(**padded).logits, outputs.logits):
                    self.assert_close(logits[0, 5:], expected[0], 1e-5)
                    self.assert_close(logits[1], expected[1], 1e-5)

    def test_half_precision(self):
        ids = random_ids(2, 20)
        for conversion in ("joint", "latent", "paper"):
            for dtype in (torch.float16, torch.bfloat16):
                with self.subTest(f"{conversion} {dtype}"), torch.no_grad():
                    model = load(converted("gqa", conversion))
                    expected = model(ids).logits
                    logits = model.to(dtype)(ids).logits
                    self.assertEqual(logits.dtype, dtype)
                    self.assertLess((logits.float() - expected).std(), 0.05 * expected.std())

    def test_loss_and_gradients_equal_ours(self):
        """Of Llamas and every kind of conversion, by every weight, to 1e-5."""
        ids = random_ids(2, 24)
        folders = [converted(model, conversion) for model, names in PAIRS for conversion in names.split()]
        folders += [base(model) for model, _ in PAIRS]
        for folder, ours in zip(folders, our_gradients(folders, ids)):
            with self.subTest(folder.name):
                model = load(folder).train()
                loss = model(ids, labels=ids).loss
                loss.backward()
                self.assertLess(abs(ours.pop("loss").item() / loss.item() - 1), 1e-5)
                gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
                self.assertEqual(set(ours), set(gradients))
                largest = max(gradient.abs().max() for gradient in gradients.values())
                for name, gradient in gradients.items():
                    # What no score feels, like a bias of keys behind RoPE, has a gradient of rounding alone.
                    scale = gradient.abs().max()
                    if ".self_attn." in name and not name.endswith("bias"):
                        self.assertGreater(scale, 1e-6 * largest, name)
                    if scale < 1e-6 * largest:
                        self.assertLess(ours[name].abs().max(), 1e-6 * largest)
                        continue
                    self.assert_close(ours[name] / scale, gradient / scale, 1e-5, name)


class CacheTest(HlaTestCase):
    """What generate() keeps, and that it changes nothing."""

    MODELS = [("gqa", "joint"), ("attention_bias", "fast"), ("attention_bias", "latent"), ("mqa", "paper_part")]

    def prompt(self):
        """Two sequences, the first padded on the left."""
        ids = random_ids(2, 12)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        return {"input_ids": ids, "attention_mask": mask}

    LENGTH = dict(min_new_tokens=15, max_new_tokens=15, do_sample=False, pad_token_id=0)

    def generate(self, model, **options):
        return model.generate(**self.prompt(), **self.LENGTH, **options)

    def test_generate_with_a_cache_equals_without(self):
        for pair in self.MODELS:
            for options in ({}, {"num_beams": 3}):
                with self.subTest(f"{pair} {options}"):
                    model = load(converted(*pair))
                    expected = self.generate(model, use_cache=False, **options)
                    self.assertTrue(torch.equal(self.generate(model, **options), expected))
                    # Not the same sequence twice, not one token over and over.
                    self.assertGreater(len(expected[:, 12:].unique()), 4)

    def test_generate_with_guesses_crops_the_cache(self):
        prompt = random_ids(1, 6).repeat(1, 4)
        for pair in self.MODELS:
            with self.subTest(str(pair)):
                model = load(converted(*pair))
                expected = model.generate(prompt, use_cache=False, **self.LENGTH)
                guessed = model.generate(prompt, prompt_lookup_num_tokens=4, **self.LENGTH)
                self.assertTrue(torch.equal(guessed, expected))

    def test_cache_holds_the_latents_and_nothing_else(self):
        for pair in self.MODELS:
            with self.subTest(str(pair)):
                model = load(converted(*pair))
                outputs = self.generate(model, return_dict_in_generate=True)
                layers = cached_tensors(cache_of(outputs))
                self.assertEqual(len(layers), model.config.num_hidden_layers)
                tokens = 12 + 15 - 1  # the last token was not read
                for (keys, values), floats in zip(layers, cache_floats(model.config)):
                    storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (keys, values)}
                    self.assertEqual(sum(storage.values()), 2 * tokens * floats * 4)
                info = json.loads(run(os.environ["HLA_BINARY"], "info", converted(*pair), "--json"))
                self.assertEqual(sum(cache_floats(model.config)) * 4, info["cache_bytes_per_token"])

    def test_pieces_equal_the_whole(self):
        """With positions that are not consecutive, and a cache that has lost them where they are."""
        ids = random_ids(2, 20)
        gaps = torch.cat([torch.arange(7), torch.arange(11, 24)])
        for pair in self.MODELS:
            for positions, keep in ((torch.arange(100, 120), False), (gaps, True)):
                with self.subTest(f"{pair} {keep}"), torch.no_grad():
                    model = load(converted(*pair))
                    expected = model(ids, position_ids=positions[None]).logits
                    cache, logits = None, []
                    for piece in (slice(0, 7), slice(7, 8), slice(8, 20)):
                        known = {} if cache is None else with_cache(cache)
                        outputs = model(ids[:, piece], position_ids=positions[None, piece], use_cache=True, **known)
                        cache = cache_of(outputs)
                        if not keep:
                            del cache.positions
                        logits.append(outputs.logits)
                    self.assert_close(torch.cat(logits, dim=1), expected, 1e-5)

    def test_refuses_a_cache_of_fixed_size(self):
        with self.assertRaisesRegex(NotImplementedError, "StaticCache"):
            self.generate(load(converted("gqa", "joint")), cache_implementation="static")


class SavedTest(HlaTestCase):
    """Folders that transformers writes, read by the program."""

    def test_round_trip(self):
        ids = random_ids(2, 40)
        pairs = [("attention_bias", "latent"), ("tied", "joint"), ("rope_yarn", "paper"), ("v4_rope_llama3", "joint")]
        for pair in pairs:
            with self.subTest(str(pair)), torch.no_grad():
                model = load(converted(*pair))
                folder = SCRATCH / f"{pair[0]}-{pair[1]}-again"
                model.save_pretrained(folder, max_shard_size="20KB")
                self.assertTrue((folder / "modeling_hla.py").exists())
                self.assertIn("problems       none", run(os.environ["HLA_BINARY"], "info", folder))
                logits = model(ids).logits
                self.assert_close(our_logits([folder], ids)[0], logits, 1e-5)
                self.assertTrue(torch.equal(load(folder)(ids).logits, logits))

    def test_models_made_here(self):
        """Ranks that differ by layer, some of them 0, and biases without attention_bias."""
        model = load(converted("gqa", "joint"))
        original = [
            dict(fast_frequencies=0, k_rank=0, kv_rank=5, q_rank=0),
            dict(fast_frequencies=4, k_rank=3, kv_rank=2, q_rank=7),
            dict(fast_frequencies=1, k_rank=2, kv_rank=0, q_rank=0),
            dict(fast_frequencies=3, k_rank=0, kv_rank=9, q_rank=0),
        ]
        latent = [
            dict(fast_frequencies=2, k_ranks=[2, 1], kv_rank=5, q_rank=3),
            dict(fast_frequencies=4, k_ranks=[0, 2, 0, 1], kv_rank=0, q_rank=0),
            dict(fast_frequencies=1, k_ranks=[0], kv_rank=4, q_rank=0),
            dict(fast_frequencies=3, k_ranks=[1, 1, 2], kv_rank=1, q_rank=0),
        ]
        ids = random_ids(2, 30)
        for rope, layers in (("original", original), ("latent", latent)):
            for flags in ({}, {"latent_bias": True}, {"output_bias": True}, {"latent_bias": False}):
                with self.subTest(f"{rope} {flags}"), torch.no_grad():
                    settings = model.config.to_dict()
                    settings.update(
                        num_hidden_layers=4,
                        attention_bias=flags == {"latent_bias": False},
                        initializer_range=0.15,
                        sliding_window=8,
                        use_sliding_window=False,
                        hla=dict(format_version=1, rope=rope, layers=layers, **flags),
                    )
                    made = type(model)(type(model.config)(**settings)).eval()
                    for name, parameter in made.named_parameters():
                        if name.endswith("bias"):
                            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
                    names = set(made.state_dict())
                    layer = "model.layers.0.self_attn."
                    bias = settings["attention_bias"]
                    self.assertEqual(layer + "kv_up.bias" in names, flags.get("latent_bias", bias))
                    self.assertEqual(layer + "o_proj.bias" in names, flags.get("output_bias", bias))
                    folder = SCRATCH / "made"
                    shutil.rmtree(folder, ignore_errors=True)
                    made.save_pretrained(folder)
                    self.assert_close(our_logits([folder], ids)[0], made(ids).logits, 1e-5)
                    first = made(ids[:, :20], use_cache=True)
                    second = made(ids[:, 20:], **with_cache(cache_of(first)))
                    self.assert_close(second.logits, made(ids).logits[:, 20:], 1e-5)


@unittest.skipUnless(SMOLLM2.exists(), "run scripts/setup.sh for the model")
class SmolLM2Test(HlaTestCase):
    def test_half_the_cache(self):
        text = (ROOT / "data" / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")[:4000]
        for rope in ("original", "latent"):
            with self.subTest(rope), torch.no_grad():
                folder = convert(SMOLLM2, f"--rope {rope} --kv-ratio 0.5", f"smollm2-{rope}")
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
                ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :192]
                self.assertEqual(ids.shape, (1, 192))
                expected = our_logits([folder], ids)[0]
                model = load(folder)
                logits = model(ids).logits
                self.assert_close(logits, expected, 1e-3)
                self.assertTrue(torch.equal(logits.argmax(-1), expected.argmax(-1)))
                outputs = model(ids, use_cache=True)
                held = sum(t.numel() * t.element_size() for pair in cached_tensors(cache_of(outputs)) for t in pair)
                self.assertEqual(held, 192 * 30 * 192 * 4)
                shutil.rmtree(folder)


def main():
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(min(2, os.cpu_count()))
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    try:
        unittest.main()
    finally:
        shutil.rmtree(SCRATCH)


if __name__ == "__main__":
    main()
