// SentencePiece models (Llama 1 and 2, TinyLlama, stories260K), through the sentencepiece library.
#pragma once

#include <filesystem>
#include <memory>

#include "hla/text/tokenizer.h"

namespace hla {

// Loads a tokenizer.model. Llama's default is to add BOS and no EOS; `settings` may say otherwise.
// Invalid UTF-8 is passed to the library as it is. Throws kBadInput for a damaged file.
std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& file,
                                              const TokenizerSettings& settings);

}  // namespace hla
