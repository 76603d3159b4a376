#include "hla/io/json_file.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "hla/core/printable.h"
#include "hla/io/atomic_file.h"
#include "hla/io/mapped_file.h"

namespace hla {
namespace {

using nlohmann::json;

// Walks the text and tells the handler how far the parser has read: nlohmann passes no position to
// its callbacks, and a duplicate key is reported from one.
class TracingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  TracingIterator(const char* at, const char** last) : at_(at), last_(last) {}
  reference operator*() const { return *at_; }
  TracingIterator& operator++() {
    *last_ = ++at_;
    return *this;
  }
  TracingIterator operator++(int) {
    TracingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const TracingIterator& other) const { return at_ == other.at_; }

 private:
  const char* at_;
  const char** last_;
};

// Builds the value, checking depth and duplicate keys on the way.
class StrictHandler : public nlohmann::json_sax<json> {
 public:
  struct Failure {
    std::optional<size_t> position;  // byte offset; nullopt: where the parser stands
    std::string reason;
  };

  explicit StrictHandler(int max_depth) : max_depth_(max_depth) {}

  bool null() override { return place(nullptr); }
  bool boolean(bool value) override { return place(value); }
  bool number_integer(number_integer_t value) override { return place(value); }
  bool number_unsigned(number_unsigned_t value) override { return place(value); }
  bool number_float(number_float_t value, const string_t&) override { return place(value); }
  bool string(string_t& value) override { return place(std::move(value)); }
  bool binary(binary_t&) override { return refuse("binary values are not JSON"); }

  bool start_object(size_t) override { return open(json::object()); }
  bool start_array(size_t) override { return open(json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    const auto [slot, inserted] = stack_.back()->get_ref<json::object_t&>().emplace(name, nullptr);
    if (!inserted) return refuse("duplicate key " + json_excerpt(name));
    slot_ = &slot->second;
    return true;
  }

  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: reason"
    std::string reason = error.what();
    if (const size_t end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    if (reason.starts_with("parse error")) {
      if (const size_t end = reason.find(": "); end != std::string::npos) reason.erase(0, end + 2);
    }
    failure_ = Failure{position > 0 ? std::optional<size_t>(position - 1) : std::nullopt, reason};
    return false;
  }

  json take() { return std::move(root_); }
  const std::optional<Failure>& failure() const { return failure_; }

 private:
  bool refuse(std::string reason) {
    failure_ = Failure{std::nullopt, std::move(reason)};
    return false;
  }

  template <typename T>
  json* put(T&& value) {
    if (stack_.empty()) {
      root_ = std::forward<T>(value);
      return &root_;
    }
    if (stack_.back()->is_array()) {
      auto& array = stack_.back()->get_ref<json::array_t&>();
      array.emplace_back(std::forward<T>(value));
      return &array.back();
    }
    *slot_ = std::forward<T>(value);
    return slot_;
  }

  template <typename T>
  bool place(T&& value) {
    put(std::forward<T>(value));
    return true;
  }

  bool open(json container) {
    if (stack_.size() >= static_cast<size_t>(max_depth_)) {
      return refuse("nested more than " + std::to_string(max_depth_) + " levels deep");
    }
    stack_.push_back(put(std::move(container)));
    return true;
  }

  bool close() {
    stack_.pop_back();
    return true;
  }

  int max_depth_;
  json root_;
  // The open containers. Pointers stay valid: only the innermost container grows.
  std::vector<json*> stack_;
  json* slot_ = nullptr;
  std::optional<Failure> failure_;
};

[[noreturn]] void fail_at(std::string_view text, const std::string& subject,
                          const JsonOrigin& origin, size_t position, const std::string& reason) {
  position = std::min(position, text.size());
  const std::string_view before = text.substr(0, position);
  const auto line =
      origin.line + static_cast<uint64_t>(std::count(before.begin(), before.end(), '\n'));
  const size_t newline = before.rfind('\n');
  const size_t column = position - (newline == std::string_view::npos ? 0 : newline + 1) + 1;
  throw_bad_input(subject + ":" + std::to_string(line) + ":" + std::to_string(column) + " (byte " +
                  std::to_string(origin.byte + position) + "): " + reason);
}

const json* find_value(const json& object, const std::string& key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::string number_text(int64_t value) { return std::to_string(value); }
std::string number_text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%g", value);
  return buffer;
}

// "an integer", "an integer of at least 1", "an integer from 1 to 8".
template <typename T>
std::string expected_range(const std::string& what, T min, T max, T lowest, T highest) {
  if (min > lowest && max < highest) {
    return what + " from " + number_text(min) + " to " + number_text(max);
  }
  if (min > lowest) return what + " of at least " + number_text(min);
  if (max < highest) return what + " of at most " + number_text(max);
  return what;
}

void report(Problems& problems, const std::string& key, const std::string& expected,
            const json& got) {
  problems.add(key + ": expected " + expected + ", got " + json_excerpt(got));
}

// The value as an integer if it is one exactly and fits.
std::optional<int64_t> exact_int(const json& value) {
  constexpr double kTwo63 = 9223372036854775808.0;
  if (value.is_number_unsigned()) {
    const auto number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double number = value.get<double>();
    if (number >= -kTwo63 && number < kTwo63 && std::trunc(number) == number) {
      return static_cast<int64_t>(number);
    }
  }
  return std::nullopt;
}

}  // namespace

json parse_json(std::string_view text, const std::string& subject, const JsonLimits& limits,
                const JsonOrigin& origin) {
  if (text.size() > limits.max_bytes) {
    throw_bad_input(subject + ": expected at most " + std::to_string(limits.max_bytes) +
                    " bytes of JSON, got " + std::to_string(text.size()));
  }
  // nlohmann takes NUL for the end of the input and would ignore all that follows.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    fail_at(text, subject, origin, nul, "a NUL byte");
  }
  if (text.empty()) fail_at(text, subject, origin, 0, "expected JSON, the file is empty");
  const char* last = text.data();
  StrictHandler handler(limits.max_depth);
  const bool ok = json::sax_parse(TracingIterator(text.data(), &last),
                                  TracingIterator(text.data() + text.size(), &last), &handler,
                                  json::input_format_t::json, /*strict=*/true, limits.comments);
  if (!ok || handler.failure()) {
    const auto& failure = handler.failure();
    const auto here = static_cast<size_t>(last - text.data());
    fail_at(text, subject, origin, failure ? failure->position.value_or(here) : here,
            failure ? printable(failure->reason, 200) : "not JSON");
  }
  return handler.take();
}

json read_json_file(const std::filesystem::path& path, const JsonLimits& limits) {
  const auto file = MappedFile::open(path);
  return parse_json(file->text(), path.string(), limits);
}

std::string json_text(const json& value) {
  return value.dump(2, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace) + "\n";
}

void write_json_file(const std::filesystem::path& path, const json& value, bool force) {
  AtomicFile file(path, force);
  file.write(json_text(value));
  file.commit();
}

std::string json_excerpt(const json& value) {
  constexpr size_t kMax = 60;
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kMax) text = text.substr(0, kMax) + "...";
  return text;
}

bool has_key(const json& object, const std::string& key) {
  return find_value(object, key) != nullptr;
}

int64_t get_int(const json& object, const std::string& key, int64_t fallback, Problems& problems,
                int64_t min, int64_t max) {
  const json* value = find_value(object, key);
  if (value == nullptr) return fallback;
  const std::optional<int64_t> number = exact_int(*value);
  if (number && *number >= min && *number <= max) return *number;
  report(problems, key,
         expected_range("an integer", min, max, std::numeric_limits<int64_t>::min(),
                        std::numeric_limits<int64_t>::max()),
         *value);
  return fallback;
}

double get_double(const json& object, const std::string& key, double fallback, Problems& problems,
                  double min, double max) {
  const json* value = find_value(object, key);
  if (value == nullptr) return fallback;
  if (value->is_number()) {
    const double number = value->get<double>();
    if (number >= min && number <= max) return number;
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  report(problems, key, expected_range("a number", min, max, -kInfinity, kInfinity), *value);
  return fallback;
}

bool get_bool(const json& object, const std::string& key, bool fallback, Problems& problems) {
  const json* value = find_value(object, key);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  report(problems, key, "true or false", *value);
  return fallback;
}

std::string get_string(const json& object, const std::string& key, const std::string& fallback,
                       Problems& problems) {
  const json* value = find_value(object, key);
  if (value == nullptr) return fallback;
  if (value->is_string()) return value->get<std::string>();
  report(problems, key, "a string", *value);
  return fallback;
}

}  // namespace hla
