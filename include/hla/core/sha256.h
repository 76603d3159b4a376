// SHA-256 (FIPS 180-4) of texts, so that a result can say what exactly it was measured on.
#pragma once

#include <string>
#include <string_view>

namespace hla {

std::string sha256_hex(std::string_view data);  // 64 lower-case digits

}  // namespace hla
