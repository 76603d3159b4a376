#include "hla/text/chat.h"

#include <nlohmann/json.hpp>

#include "hla/core/error.h"
#include "hla/io/json_file.h"
#include "hla/io/mapped_file.h"

namespace hla {
namespace {

constexpr const char* kStart = "<|im_start|>";
constexpr const char* kEnd = "<|im_end|>";

std::string message(const std::string& role, const std::string& content) {
  return kStart + role + "\n" + content + kEnd + "\n";
}

std::string without_space(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c != ' ' && c != '\n') result += c;
  }
  return result;
}

// "\n" written in a Jinja string as an escape.
std::string unescape(std::string text) {
  for (size_t at = 0; (at = text.find("\\n", at)) != std::string::npos; ++at) {
    text.replace(at, 2, "\n");
  }
  return text;
}

}  // namespace

ChatTemplate ChatTemplate::parse(const std::string& jinja, const std::string& name) {
  const std::string text = unescape(jinja);
  const auto refuse = [&] [[noreturn]] () {
    throw_bad_input("[chat] " + name +
                    ": expected a ChatML template (<|im_start|>role … <|im_end|>), got another; "
                    "write the prompt out and use --prompt");
  };
  // The message of every turn, and the start of the answer; white space between has no meaning.
  const std::string compact = without_space(text);
  const std::string turn =
      "{{'<|im_start|>'+message['role']+''+message['content']+'<|im_end|>'+''}}";
  if (compact.find(turn) == std::string::npos ||
      compact.find("{%ifadd_generation_prompt%}{{'<|im_start|>assistant'}}{%endif%}") ==
          std::string::npos ||
      compact.find("bos_token") != std::string::npos) {  // none is put in front
    refuse();
  }
  ChatTemplate result;
  const std::string system = std::string("{{ '") + kStart + "system\n";
  const size_t begin = text.find(system);
  if (begin == std::string::npos) {
    // A system message that is made in another way must not get lost.
    if (compact.find("system") != std::string::npos) refuse();
    return result;
  }
  const size_t content = begin + system.size();
  const size_t end = text.find(kEnd, content);
  if (end == std::string::npos ||
      compact.find("{%ifloop.firstandmessages[0]['role']!='system'%}") == std::string::npos) {
    refuse();
  }
  result.default_system_ = text.substr(content, end - content);
  return result;
}

void ChatTemplate::check(const Tokenizer& tokenizer, const std::filesystem::path& path) const {
  for (const char* token : {kStart, kEnd}) {
    if (tokenizer.token_to_id(token)) continue;
    throw_bad_input("[chat] " + path.string() + ": expected the template's token " + token +
                    ", got a tokenizer without it");
  }
}

ChatTemplate ChatTemplate::load(const std::filesystem::path& folder) {
  std::error_code error;
  const auto own = folder / "chat_template.jinja";
  if (std::filesystem::is_regular_file(own, error)) {
    return parse(std::string(MappedFile::open(own)->text()), own.string());
  }
  const auto file = folder / "tokenizer_config.json";
  if (std::filesystem::is_regular_file(file, error)) {
    const nlohmann::json config = read_json_file(file);
    const auto found = config.find("chat_template");
    if (found != config.end() && found->is_string()) {
      return parse(found->get<std::string>(), file.string() + ", chat_template");
    }
  }
  throw_bad_input("[chat] " + folder.string() +
                  ": expected a chat template in tokenizer_config.json or chat_template.jinja, got "
                  "none: not a chat model?");
}

std::string ChatTemplate::prompt(const std::string& user,
                                 const std::optional<std::string>& system) const {
  const std::string first = system.value_or(default_system_);
  return (system || !first.empty() ? message("system", first) : "") + message("user", user) +
         kStart + "assistant\n";
}

}  // namespace hla
