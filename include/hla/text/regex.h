// Regular expressions of tokenizers, through PCRE2.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace hla {

// A pattern in the dialect of the `tokenizers` library (Oniguruma), matched with Unicode classes.
// `\s` means Unicode White_Space there, which PCRE2's own `\s` does not. Thread-safe.
class Regex {
 public:
  // Throws kBadInput for a pattern that PCRE2 does not take.
  explicit Regex(const std::string& pattern);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // Calls `match(begin, end)` for each match from left to right, byte offsets; empty matches are
  // left out. The text must be valid UTF-8. Throws kRuntime when PCRE2 gives up.
  void find_all(std::string_view text, const std::function<void(size_t, size_t)>& match) const;

  // The pattern with \s and \S written out; public for the tests.
  static std::string translate(const std::string& pattern);

 private:
  struct Code;
  std::unique_ptr<Code> code_;
};

}  // namespace hla
