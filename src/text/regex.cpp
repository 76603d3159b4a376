#include "hla/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <limits>
#include <new>

#include "hla/core/error.h"

namespace hla {
namespace {

// Unicode White_Space.
constexpr const char* kSpaces =
    "\\x{9}-\\x{D}\\x{20}\\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}"
    "\\x{205F}\\x{3000}";

// \w as tokenizers 0.23 with Oniguruma 6.9 matches it, character by character.
constexpr const char* kWord =
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}\\x{24B6}-\\x{24E9}"
    "\\x{1F130}-\\x{1F149}\\x{1F150}-\\x{1F169}\\x{1F170}-\\x{1F189}";

// What stands for \w and such, which mean something else in PCRE2: characters of a class.
const char* class_of(char escaped) {
  switch (escaped) {
    case 's':
    case 'S':
      return kSpaces;
    case 'w':
    case 'W':
      return kWord;
    case 'h':
    case 'H':
      return "0-9a-fA-F";
    default:
      return nullptr;
  }
}

// \b and \B, by the same \w.
std::string word_boundary(bool negated) {
  const std::string word = "[" + std::string(kWord) + "]";
  const std::string here = negated ? "?=" : "?!";
  const std::string not_here = negated ? "?!" : "?=";
  return "(?:(?<=" + word + ")(" + here + word + ")|(?<!" + word + ")(" + not_here + word + "))";
}

// The letters of "(?imx-imx:" or "…)" at i, if options are there: (?m) lets . match line ends.
size_t options_end(const std::string& pattern, size_t i) {
  const size_t end = pattern.find_first_not_of("imx-", i);
  const bool closed = end != std::string::npos && (pattern[end] == ':' || pattern[end] == ')');
  return closed ? end : i;
}

std::string message_of(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

struct Regex::Code {
  pcre2_code* code = nullptr;
  pcre2_match_context* limits = nullptr;
  ~Code() {
    pcre2_match_context_free(limits);
    pcre2_code_free(code);
  }
};

std::string Regex::translate(const std::string& pattern) {
  std::string result;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      const bool negated = escaped >= 'A' && escaped <= 'Z';
      if (const char* characters = class_of(escaped)) {
        if (in_class && negated) {
          throw_bad_input("pattern " + pattern + ": \\" + escaped +
                          " inside [...] is not supported");
        }
        result += in_class ? characters : (negated ? "[^" : "[") + std::string(characters) + "]";
      } else if (!in_class && (escaped == 'b' || escaped == 'B')) {
        result += word_boundary(negated);
      } else {
        result += c;
        result += escaped;
      }
      continue;
    }
    // A ']' right after '[' or '[^' is a literal.
    if (c == '[' && !in_class) {
      in_class = true;
      result += c;
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') result += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') {
        result += "\\]";
        ++i;
      }
      continue;
    }
    if (c == '[' && in_class) {
      // Oniguruma nests classes here (and has && in them); PCRE2 reads a literal '['.
      throw_bad_input("pattern " + pattern + ": nested [...] is not supported");
    }
    if (c == ']') in_class = false;
    result += c;
    if (in_class) continue;
    const bool is_up_to = pattern.compare(i, 2, "{,") == 0 && i + 2 < pattern.size() &&
                          pattern[i + 2] >= '0' && pattern[i + 2] <= '9';
    if (is_up_to) result += '0';
    if (pattern.compare(i, 2, "(?") == 0) {
      result += '?';
      const size_t end = options_end(pattern, ++i + 1);
      for (; i + 1 < end; ++i) result += pattern[i + 1] == 'm' ? 's' : pattern[i + 1];
    }
  }
  return result;
}

Regex::Regex(const std::string& pattern) : code_(std::make_unique<Code>()) {
  const std::string translated = translate(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  code_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                              &error, &offset, nullptr);
  if (code_->code == nullptr) {
    throw_bad_input("pattern " + pattern + ": " + message_of(error) + " at offset " +
                    std::to_string(offset));
  }
  // Without JIT (a hardened kernel, say) the interpreter matches the same.
  pcre2_jit_compile(code_->code, PCRE2_JIT_COMPLETE);
  code_->limits = pcre2_match_context_create(nullptr);
  if (code_->limits == nullptr) throw std::bad_alloc();
  // For pieces of any length.
  pcre2_set_match_limit(code_->limits, std::numeric_limits<uint32_t>::max());
  pcre2_set_depth_limit(code_->limits, std::numeric_limits<uint32_t>::max());
  pcre2_set_heap_limit(code_->limits, 1U << 20);  // KiB
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

void Regex::find_all(std::string_view text,
                     const std::function<void(size_t, size_t)>& match) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
      pcre2_match_data_create_from_pattern(code_->code, nullptr), pcre2_match_data_free);
  if (!data) throw std::bad_alloc();
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t position = 0;
  while (position < text.size()) {
    // The text was checked once by the caller; PCRE2 would check it again at every match.
    const auto match_with = [&](uint32_t options) {
      return pcre2_match(code_->code, subject, text.size(), position, PCRE2_NO_UTF_CHECK | options,
                         data.get(), code_->limits);
    };
    int found = match_with(0);
    // Repeated groups take a frame for every turn: 32 kB of them with JIT, the heap without.
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = match_with(PCRE2_NO_JIT);
    if (found == PCRE2_ERROR_NOMATCH) return;
    if (found < 0) throw_runtime("pre-tokenizer: PCRE2: " + message_of(found));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data.get());
    if (range[1] > range[0]) {
      match(range[0], range[1]);
      position = range[1];
    } else {
      // An empty match: go on at the next character.
      position = range[1] + 1;
      while (position < text.size() &&
             (static_cast<unsigned char>(text[position]) & 0xC0) == 0x80) {
        ++position;
      }
    }
  }
}

}  // namespace hla
