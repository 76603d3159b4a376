// Regular expressions of tokenizers, through PCRE2.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace hla {

// A pattern in the dialect of the `tokenizers` library (Oniguruma's Ruby syntax), matched with
// Unicode classes. There \s is Unicode White_Space, \w has marks, \h is a hexadecimal digit, ^ and
// $ are of lines, and (?m) is for the dot, all of which PCRE2 has otherwise. Thread-safe.
class Regex {
 public:
  // Throws kBadInput for a pattern that PCRE2 does not take.
  explicit Regex(const std::string& pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // Calls `match(begin, end)` for each match from left to right, byte offsets; empty matches are
  // left out. The text must be valid UTF-8. Throws kRuntime when PCRE2 gives up, for want of
  // memory.
  void find_all(std::string_view text, const std::function<void(size_t, size_t)>& match) const;

  // The pattern as PCRE2 has to read it; public for the tests.
  static std::string translate(const std::string& pattern);

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

}  // namespace hla
