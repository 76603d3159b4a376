#include "hla/text/chat.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>

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

// Calls action(character, whether it is within a string of Jinja), escapes in strings resolved and
// comments left out. Returns false where an escape is not one of these.
template <class Action>
bool for_characters(const std::string& jinja, const Action& action) {
  constexpr std::string_view kEscapes = "ntr\\'\"";
  constexpr std::string_view kMeanings = "\n\t\r\\'\"";
  char quote = 0;
  for (size_t i = 0; i < jinja.size(); ++i) {
    const char c = jinja[i];
    if (quote == 0 && jinja.compare(i, 2, "{#") == 0) {
      i = std::min(jinja.find("#}", i), jinja.size() - 2) + 1;
    } else if (quote != 0 && c == '\\' && i + 1 < jinja.size()) {
      const size_t kind = kEscapes.find(jinja[++i]);
      if (kind == std::string_view::npos) return false;
      action(kMeanings[kind], true);
    } else if (quote != 0 ? c == quote : c == '\'' || c == '"') {
      quote = quote != 0 ? 0 : c;
      action('\'', false);
    } else {
      action(c, quote != 0);
    }
  }
  return true;
}

constexpr char kQuote = '\1';  // where a string of Jinja begins or ends

std::string quoted(std::string text) {
  std::replace(text.begin(), text.end(), '\'', kQuote);
  return text;
}

// A template without what says nothing: white space and "-" at tags outside of strings; and with
// strings that are put together as one. Absent where it cannot be read.
std::optional<std::string> compacted(const std::string& jinja) {
  std::string compact;
  const bool is_read = for_characters(jinja, [&](char c, bool in_string) {
    if (!in_string) {
      if (c == ' ' || c == '\n' || c == '\t') return;
      const bool opens = compact.ends_with("{%") || compact.ends_with("{{");
      if (c == '-' && opens) return;
      if ((c == '%' || c == '}') && compact.ends_with('-')) compact.pop_back();
    }
    compact += !in_string && c == '\'' ? kQuote : c;
  });
  if (!is_read) return std::nullopt;
  const std::string seam = quoted("'+'");
  for (size_t at = 0; (at = compact.find(seam, at)) != std::string::npos;) compact.erase(at, 3);
  return compact;
}

// Whether something between its tags is written out, as transformers has Jinja read them
// (trim_blocks, lstrip_blocks): of white space what follows a value, but for "-" at a tag.
bool has_text_between_tags(const std::string& jinja) {
  size_t at = 0;
  bool behind_block = false;    // %} or #}
  bool trimmed_before = false;  // -}} or -%}
  for (;;) {
    size_t next = jinja.find('{', at);
    while (next != std::string::npos &&
           std::string("{%#").find(jinja[next + 1]) == std::string::npos) {
      next = jinja.find('{', next + 1);
    }
    const bool ends = next == std::string::npos;
    std::string_view text =
        std::string_view(jinja).substr(at, ends ? std::string::npos : next - at);
    const bool is_value = !ends && jinja[next + 1] == '{';
    if (!ends && jinja.compare(next + 2, 1, "+") == 0) return true;  // keeps white space
    const bool trims = !ends && jinja.compare(next + 2, 1, "-") == 0;
    const auto strip_end = [&](const char* characters) {
      text = text.substr(0, text.find_last_not_of(characters) + 1);
    };
    if (trimmed_before) text.remove_prefix(std::min(text.find_first_not_of(" \t\n"), text.size()));
    const bool at_line = at == 0 || (behind_block && text.starts_with('\n'));
    if (at > 0 && at_line) text.remove_prefix(1);
    if (trims) strip_end(" \t\n");
    if (ends && text.ends_with('\n')) text.remove_suffix(1);
    if (!ends && !is_value && at_line) strip_end(" \t");
    if (!text.empty()) return true;
    if (ends) return false;
    const char* closer = is_value ? "}}" : jinja[next + 1] == '%' ? "%}" : "#}";
    const size_t end = jinja.find(closer, next + 2);
    if (end == std::string::npos) return true;  // no template
    if (jinja[end - 1] == '+') return true;
    trimmed_before = jinja[end - 1] == '-';
    behind_block = !is_value;
    at = end + 2;
  }
}

}  // namespace

ChatTemplate ChatTemplate::parse(const std::string& jinja, const std::string& name) {
  const auto refuse = [&] [[noreturn]] () {
    throw_bad_input("[chat] " + name +
                    ": expected a ChatML template (<|im_start|>role … <|im_end|>), got another; "
                    "write the prompt out, without the token that the tokenizer puts in front, and "
                    "use --prompt");
  };
  const std::optional<std::string> compact =
      has_text_between_tags(jinja) ? std::nullopt : compacted(jinja);
  if (!compact) refuse();
  std::string_view rest = *compact;
  const auto take = [&rest](const std::string& part) {
    const bool is_next = rest.starts_with(quoted(part));
    if (is_next) rest.remove_prefix(part.size());
    return is_next;
  };
  ChatTemplate result;
  take("{%ifnotadd_generation_promptisdefined%}{%setadd_generation_prompt=false%}{%endif%}");
  if (!take("{%formessageinmessages%}")) refuse();
  if (take("{%ifloop.firstandmessages[0]['role']!='system'%}{{'<|im_start|>system\n")) {
    result.default_system_ =
        std::string(rest.substr(0, std::min(rest.find(kQuote), rest.find(kEnd))));
    rest.remove_prefix(result.default_system_.size());
    if (!take("<|im_end|>\n'}}{%endif%}")) refuse();
  }
  // The message of every turn, and the start of the answer; and nothing else.
  if (!take("{{'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>\n'}}{%endfor%}"
            "{%ifadd_generation_prompt%}{{'<|im_start|>assistant\n'}}{%endif%}") ||
      !rest.empty()) {
    refuse();
  }
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
    // Several with names, of which transformers takes the default.
    for (size_t i = 0; found != config.end() && found->is_array() && i < found->size(); ++i) {
      const nlohmann::json& one = (*found)[i];
      if (!one.is_object() || one.value("name", nlohmann::json()) != "default") continue;
      const nlohmann::json text = one.value("template", nlohmann::json());
      if (text.is_string()) {
        return parse(text.get<std::string>(), file.string() + ", chat_template \"default\"");
      }
    }
    if (found != config.end() && !found->is_null()) {
      throw_bad_input("[chat] " + file.string() +
                      ", chat_template: expected a template or one named \"default\", got " +
                      json_excerpt(*found));
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
