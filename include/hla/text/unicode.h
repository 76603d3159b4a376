// UTF-8 as the tokenizers need it.
#pragma once

#include <string>
#include <string_view>

namespace hla {

bool is_valid_utf8(std::string_view text);

// The text with every invalid sequence replaced by U+FFFD, one per maximal subpart: what Python's
// bytes.decode("utf-8", "replace") and the WHATWG decoder give.
std::string sanitize_utf8(std::string_view text);

// A text as it can be shown on one line of a terminal, and read back without doubt: `\n`, `\t`,
// `\r` and `\\`; other control, format and invisible characters and all spaces but U+0020 as
// `\u{00A0}`; bytes that are not UTF-8 as `\xFF`.
std::string escape_for_display(std::string_view text);

// Appends the UTF-8 form of a code point below 0x110000.
void append_utf8(std::string& text, char32_t code_point);

}  // namespace hla
