#include "hla/text/sentencepiece_tokenizer.h"

#include "hla/core/error.h"
#include "hla/core/plugin.h"
#include "hla/io/mapped_file.h"
#include "hla/text/unicode.h"
#include "sentencepiece_plugin.h"

namespace hla {
namespace {

std::unique_ptr<SentencePieceModel> load_sentencepiece_model(const std::filesystem::path& file) {
  static const auto load = reinterpret_cast<decltype(&hla_sentencepiece_load)>(
      load_plugin({.what = "the SentencePiece tokenizer",
                   .built = HLA_SENTENCEPIECE_LIBRARY,
                   .symbol = HLA_SENTENCEPIECE_SYMBOL,
                   .hint = "is the sentencepiece library still there (Debian: libsentencepiece0)?",
                   .own_symbols_first = true}));
  const auto content = MappedFile::open(file);
  const std::string_view bytes = content->text();
  std::string error;
  std::unique_ptr<SentencePieceModel> model(load(bytes.data(), bytes.size(), &error));
  if (!model) throw_bad_input(file.string() + ": not a SentencePiece model: " + error);
  return model;
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(const std::filesystem::path& file, const TokenizerSettings& settings)
      : model_(load_sentencepiece_model(file)),
        add_bos_(settings.add_bos_token.value_or(true)),
        add_eos_(settings.add_eos_token.value_or(false)) {
    if (add_bos_ && !bos_id())
      throw_bad_input(file.string() + ": BOS is to be added but there is none");
    if (add_eos_ && !eos_id())
      throw_bad_input(file.string() + ": EOS is to be added but there is none");
  }

  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens) const override {
    std::vector<int> ids;
    const std::string error = model_->encode(text, ids);
    if (!error.empty()) throw_bad_input("SentencePiece: " + error);
    std::vector<int32_t> result;
    result.reserve(ids.size() + 2);
    if (add_special_tokens && add_bos_) result.push_back(*bos_id());
    result.insert(result.end(), ids.begin(), ids.end());
    if (add_special_tokens && add_eos_) result.push_back(*eos_id());
    return result;
  }

  std::string decode(const std::vector<int32_t>& ids, bool skip_special_tokens) const override {
    std::vector<int> kept;
    for (const int32_t id : ids) {
      check(id);
      // The library renders control pieces as nothing already; unlike it, transformers shows them
      // unless they are skipped.
      if (skip_special_tokens && model_->is_control(id)) continue;
      kept.push_back(id);
    }
    std::string text;
    const std::string error = model_->decode(kept, text);
    if (!error.empty()) throw_bad_input("SentencePiece: " + error);
    return sanitize_utf8(text);
  }

  int64_t vocab_size() const override { return model_->piece_size(); }

  std::optional<int32_t> token_to_id(const std::string& token) const override {
    const int id = model_->piece_to_id(token);
    // The library answers an unknown piece with the id of <unk>.
    if (model_->id_to_piece(id) != token) return std::nullopt;
    return id;
  }

  std::string id_to_token(int32_t id) const override {
    check(id);
    return model_->id_to_piece(id);
  }

  std::string token_bytes(int32_t id) const override {
    const std::string piece = id_to_token(id);
    if (model_->is_byte(id)) {  // "<0x0A>"
      return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
    }
    if (model_->is_control(id) || model_->is_unknown(id)) return piece;
    constexpr std::string_view kSpace = "\u2581";  // how the library writes a space
    return replace_all(piece, kSpace, " ");
  }
  std::optional<int32_t> bos_id() const override { return present(model_->bos_id()); }
  std::optional<int32_t> eos_id() const override { return present(model_->eos_id()); }
  std::string kind() const override { return "SentencePiece"; }

 private:
  static std::optional<int32_t> present(int id) {
    if (id < 0) return std::nullopt;
    return id;
  }
  void check(int32_t id) const {
    if (!has_id(id)) {
      throw_bad_input("tokenizer: id " + std::to_string(id) + " is not in the vocabulary");
    }
  }

  std::unique_ptr<SentencePieceModel> model_;
  bool add_bos_;
  bool add_eos_;
};

}  // namespace

std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& file,
                                              const TokenizerSettings& settings) {
  return std::make_unique<SentencePieceTokenizer>(file, settings);
}

}  // namespace hla
