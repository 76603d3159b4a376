// JSON files, read strictly.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "hla/core/error.h"

namespace hla {

struct JsonLimits {
  uint64_t max_bytes = 256'000'000;
  // Arrays and objects inside each other.
  int max_depth = 100;
  // Takes // and /* */ comments, which JSON has not, for white space.
  bool comments = false;
};

// Where a text that is part of a file begins in it, for the positions in messages.
struct JsonOrigin {
  uint64_t line = 1;
  uint64_t byte = 0;
};

// Parses one JSON value. Beyond the grammar, refuses duplicate keys, NUL bytes, invalid UTF-8,
// numbers that overflow a double and anything over the limits. Throws kBadInput with
// "SUBJECT:LINE:COLUMN (byte N): reason".
nlohmann::json parse_json(std::string_view text, const std::string& subject,
                          const JsonLimits& limits = {}, const JsonOrigin& origin = {});

// parse_json on a file's content, with the path as the subject.
nlohmann::json read_json_file(const std::filesystem::path& path, const JsonLimits& limits = {});

// The value indented by two spaces, with a final newline. What is not UTF-8, as a path may be,
// becomes U+FFFD. The same value always gives the same bytes.
std::string json_text(const nlohmann::json& value);

// Writes that text through an AtomicFile.
void write_json_file(const std::filesystem::path& path, const nlohmann::json& value, bool force);

// A value as error messages show it: on one line, cut after some 60 bytes.
std::string json_excerpt(const nlohmann::json& value);

// Whether the object has the key with a value other than null.
bool has_key(const nlohmann::json& object, const std::string& key);

// Typed access to optional keys of an object. An absent key or null gives the fallback. A value of
// another type or outside [min, max] adds "KEY: expected X, got Y" to the problems and gives the
// fallback. An integer may be written as a float if it is exact (2.0); a bool is not a number.
int64_t get_int(const nlohmann::json& object, const std::string& key, int64_t fallback,
                Problems& problems, int64_t min = std::numeric_limits<int64_t>::min(),
                int64_t max = std::numeric_limits<int64_t>::max());
double get_double(const nlohmann::json& object, const std::string& key, double fallback,
                  Problems& problems, double min = -std::numeric_limits<double>::infinity(),
                  double max = std::numeric_limits<double>::infinity());
bool get_bool(const nlohmann::json& object, const std::string& key, bool fallback,
              Problems& problems);
std::string get_string(const nlohmann::json& object, const std::string& key,
                       const std::string& fallback, Problems& problems);

}  // namespace hla
