// UTF-8 as the tokenizers need it.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace hla {

bool is_valid_utf8(std::string_view text);

// Offset of the first byte that is not part of a valid sequence, or the size.
size_t valid_utf8_prefix(std::string_view text);

// The text with every invalid sequence replaced by U+FFFD, one per maximal subpart: what Python's
// bytes.decode("utf-8", "replace") and the WHATWG decoder give.
std::string sanitize_utf8(std::string_view text);

// A text as it can be shown on one line of a terminal, and read back without doubt: `\n`, `\t`,
// `\r` and `\\`; other control, format and invisible characters and all spaces but U+0020 as
// `\u{00A0}`; bytes that are not UTF-8 as `\xFF`.
std::string escape_for_display(std::string_view text);

// Appends the UTF-8 form of a code point below 0x110000.
void append_utf8(std::string& text, char32_t code_point);

// Length in bytes of the white space at offset `i`, or 0. White space is what Python's str means by
// it (str.isspace, \s in a `re` pattern): Unicode White_Space and U+001C … U+001F.
size_t python_space_length(std::string_view text, size_t i);

// Python's str.strip().
std::string_view python_strip(std::string_view text);

// Python's str.replace(); `from` is not empty.
std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

}  // namespace hla
