// Prompts of models that were tuned on conversations.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "hla/text/tokenizer.h"

namespace hla {

// A conversation's layout, out of a model's chat template. Templates are Jinja programs; those are
// understood that write ChatML, <|im_start|>role\ncontent<|im_end|>\n, with or without a system
// message of their own, as SmolLM2's and many others do, and nothing else: all others are refused.
class ChatTemplate {
 public:
  // Of chat_template.jinja, or of tokenizer_config.json, in a model folder. Throws kBadInput where
  // there is none, or none that is understood.
  static ChatTemplate load(const std::filesystem::path& folder);
  // `name` is that of the file, for messages.
  static ChatTemplate parse(const std::string& jinja, const std::string& name);

  // Throws kBadInput where the tokenizer, that of `path`, has no tokens for where messages begin
  // and end: it would take them for text.
  void check(const Tokenizer& tokenizer, const std::filesystem::path& path) const;

  // What the model has to continue after one message of the user. Absent, the system message is the
  // template's own.
  std::string prompt(const std::string& user, const std::optional<std::string>& system = {}) const;

 private:
  std::string default_system_;  // empty: none
};

}  // namespace hla
