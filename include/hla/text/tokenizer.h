// Text to token ids and back.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hla {

// Thread-safe once loaded.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Ids of a text (bytes; NUL is allowed). With add_special_tokens, the BOS and EOS that the
  // tokenizer adds by default are added.
  virtual std::vector<int32_t> encode(std::string_view text,
                                      bool add_special_tokens = true) const = 0;
  // The text of the ids; bytes that are not UTF-8 become U+FFFD. Throws kBadInput for an unknown
  // id.
  virtual std::string decode(const std::vector<int32_t>& ids,
                             bool skip_special_tokens = true) const = 0;
  // Largest id + 1, added tokens included.
  virtual int64_t vocab_size() const = 0;
  virtual std::optional<int32_t> token_to_id(const std::string& token) const = 0;
  // Whether there is a token of this id.
  virtual bool has_id(int32_t id) const { return id >= 0 && id < vocab_size(); }
  // As the tokenizer's file spells it. Throws kBadInput for an unknown id.
  virtual std::string id_to_token(int32_t id) const = 0;
  // The bytes that a token stands for in a text, which alone need not be UTF-8. Special tokens, and
  // <unk>, as the file spells them. Throws kBadInput for an unknown id.
  virtual std::string token_bytes(int32_t id) const = 0;
  virtual std::optional<int32_t> bos_id() const = 0;
  virtual std::optional<int32_t> eos_id() const = 0;
  virtual std::string kind() const = 0;  // "byte-level BPE", "BPE", "SentencePiece"
};

// What tokenizer_config.json says beside the tokenizer itself.
struct TokenizerSettings {
  std::optional<std::string> bos_token;
  std::optional<std::string> eos_token;
  std::optional<bool> add_bos_token;
  std::optional<bool> add_eos_token;
};

// The tokenizer of a model folder (tokenizer.json, else tokenizer.model, with
// tokenizer_config.json), or of one of these two files. Where tokenizer.json uses something that is
// not supported, tokenizer.model is used if it is there; else kBadInput names every such thing.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& folder_or_file);

}  // namespace hla
