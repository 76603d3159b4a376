// BPE from a tokenizer.json, on bytes (GPT-2, Llama 3, cosmo2) or on characters (Llama 2's and
// other files that were made of SentencePiece models), as the Hugging Face `tokenizers` library
// does it.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/text/tokenizer.h"

namespace hla {

// Supported: pre-tokenizers Sequence, Digits, ByteLevel, Split; model BPE with merges as pairs or
// strings, ignore_merges; added tokens, special or not; post-processors ByteLevel,
// TemplateProcessing, Sequence; decoder ByteLevel. Without a ByteLevel pre-tokenizer: normalizers
// Prepend and Replace (of a text), pre-tokenizer Metaspace (alone), unk_token, fuse_unk,
// byte_fallback, decoders Replace (by a space), ByteFallback, Fuse, Strip (a space at the
// beginning) in this order, or Metaspace. Names everything else that the file asks for.
std::vector<std::string> unsupported_by_bpe(const nlohmann::json& tokenizer_json);

// Throws kBadInput, with `source` as the subject, for what is unsupported or malformed.
//
// Invalid UTF-8 is read as U+FFFD, as Python hands it to the reference library. A byte that has no
// token is dropped silently, as the reference library does when unk_token is null (cosmo2 lacks 21
// bytes, among them 04 and 06). The file is followed as it is, as `tokenizers` does it and
// transformers 4; LlamaTokenizer of transformers 5 puts a Metaspace of its own in the place of
// normalizers Prepend and Replace, which differs in spaces at the beginning and behind special
// tokens. Bytes that are no UTF-8 together become as many U+FFFD as everywhere in this program, not
// one each.
std::unique_ptr<Tokenizer> load_bpe(const nlohmann::json& tokenizer_json, const std::string& source,
                                    const TokenizerSettings& settings);

}  // namespace hla
