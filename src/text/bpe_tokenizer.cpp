#include "hla/text/bpe_tokenizer.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <functional>
#include <nlohmann/json.hpp>
#include <queue>
#include <unordered_map>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/io/json_file.h"
#include "hla/text/regex.h"
#include "hla/text/unicode.h"

namespace hla {
namespace {

using nlohmann::json;

constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// ---- reading JSON ----

const json& member(const json& object, const char* key) {
  static const json null;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}
std::string type_of(const json& object) {
  const json& type = member(object, "type");
  return type.is_string() ? type.get<std::string>() : "(no type)";
}
bool flag(const json& object, const char* key, bool fallback) {
  const json& value = member(object, key);
  return value.is_boolean() ? value.get<bool>() : fallback;
}
// Null, false, "" and 0 ask for nothing.
bool is_set(const json& value) {
  return !value.is_null() && value != false && value != "" && value != 0.0 && value != 0;
}

// The parts of a Sequence (under `key`), or the component itself; nothing for null.
std::vector<json> parts_of(const json& component, const char* key) {
  if (component.is_null()) return {};
  if (type_of(component) != "Sequence") return {component};
  std::vector<json> result;
  for (const json& part : member(component, key)) {
    for (json& inner : parts_of(part, key)) result.push_back(std::move(inner));
  }
  return result;
}

// Whether BPE works on bytes, each spelt as a character (GPT-2), or on characters.
bool is_byte_level(const json& root) {
  const std::vector<json> pre = parts_of(member(root, "pre_tokenizer"), "pretokenizers");
  return std::any_of(pre.begin(), pre.end(),
                     [](const json& part) { return type_of(part) == "ByteLevel"; });
}

// ---- the byte-level alphabet ----

// GPT-2's bijection from bytes to printable characters.
std::array<char32_t, 256> byte_alphabet() {
  std::array<char32_t, 256> table;
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) ||
                           (byte >= 0xAE && byte <= 0xFF);
    table[byte] = printable ? byte : next++;
  }
  return table;
}

// A token's characters as the bytes they stand for; nullopt if one is not of the alphabet.
class Alphabet {
 public:
  Alphabet() {
    const auto table = byte_alphabet();
    for (size_t byte = 0; byte < 256; ++byte) {
      std::string utf8;
      append_utf8(utf8, table[byte]);
      bytes_.emplace(utf8, static_cast<char>(byte));
      utf8_[byte] = utf8;
    }
  }
  std::optional<std::string> to_bytes(std::string_view token) const {
    std::string result;
    for (size_t i = 0; i < token.size();) {
      // The alphabet's characters are all one or two bytes long.
      const size_t length = static_cast<unsigned char>(token[i]) < 0x80 ? 1 : 2;
      const auto found = bytes_.find(std::string(token.substr(i, length)));
      if (found == bytes_.end()) return std::nullopt;
      result += found->second;
      i += length;
    }
    return result;
  }
  const std::string& utf8(size_t byte) const { return utf8_[byte]; }

 private:
  std::unordered_map<std::string, char> bytes_;
  std::array<std::string, 256> utf8_;
};

// ---- normalizers, of BPE on characters ----

// Prepend (`from` is empty), or Replace of a text.
struct Normalizer {
  std::string from;
  std::string to;
};

std::string normalize(std::string_view text, const std::vector<Normalizer>& normalizers) {
  std::string result(text);
  for (const Normalizer& one : normalizers) {
    if (result.empty()) break;
    result = one.from.empty() ? one.to + result : replace_all(result, one.from, one.to);
  }
  return result;
}

// nullopt for what is not read.
std::optional<Normalizer> make_normalizer(const json& part) {
  const json& prepend = member(part, "prepend");
  if (type_of(part) == "Prepend" && prepend.is_string()) {
    return Normalizer{"", prepend.get<std::string>()};
  }
  const json& from = member(member(part, "pattern"), "String");
  const json& to = member(part, "content");
  if (type_of(part) == "Replace" && from.is_string() && from != "" && to.is_string()) {
    return Normalizer{from.get<std::string>(), to.get<std::string>()};
  }
  return std::nullopt;
}

// ---- pre-tokenizers ----

enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

constexpr std::array<std::pair<const char*, Behavior>, 5> kBehaviors = {{
    {"Isolated", Behavior::kIsolated},
    {"Removed", Behavior::kRemoved},
    {"MergedWithPrevious", Behavior::kMergedWithPrevious},
    {"MergedWithNext", Behavior::kMergedWithNext},
    {"Contiguous", Behavior::kContiguous},
}};

std::optional<Behavior> behavior_of(const json& value) {
  for (const auto& [name, behavior] : kBehaviors) {
    if (value == name) return behavior;
  }
  return std::nullopt;
}

struct Span {
  size_t begin;
  size_t end;
  bool matched;
};

// The spans joined as SplitDelimiterBehavior of the reference library does it.
std::vector<Span> apply_behavior(std::vector<Span> spans, Behavior behavior) {
  std::vector<Span> result;
  switch (behavior) {
    case Behavior::kIsolated:
      return spans;
    case Behavior::kRemoved:
      std::erase_if(spans, [](const Span& span) { return span.matched; });
      return spans;
    case Behavior::kContiguous:
      for (const Span& span : spans) {
        if (!result.empty() && result.back().matched == span.matched) {
          result.back().end = span.end;
        } else {
          result.push_back(span);
        }
      }
      return result;
    case Behavior::kMergedWithPrevious: {
      bool previous = false;
      for (const Span& span : spans) {
        if (span.matched && !previous && !result.empty()) {
          result.back().end = span.end;
        } else {
          result.push_back(span);
        }
        previous = span.matched;
      }
      return result;
    }
    case Behavior::kMergedWithNext: {
      bool previous = false;
      for (size_t i = spans.size(); i-- > 0;) {
        const Span& span = spans[i];
        if (span.matched && !previous && !result.empty()) {
          result.back().begin = span.begin;
        } else {
          result.push_back(span);
        }
        previous = span.matched;
      }
      std::reverse(result.begin(), result.end());
      return result;
    }
  }
  return spans;
}

// Where Metaspace puts its mark before a piece that does not begin with one.
enum class MarkBefore { kNone, kFirst, kAll };

std::optional<MarkBefore> mark_before(const json& metaspace) {
  const json& scheme = member(metaspace, "prepend_scheme");
  if (scheme == "never") return MarkBefore::kNone;
  if (scheme == "first") return MarkBefore::kFirst;
  if (scheme == "always") return MarkBefore::kAll;
  if (!scheme.is_null()) return std::nullopt;
  // Files of older versions of the library.
  return flag(metaspace, "add_prefix_space", true) ? MarkBefore::kAll : MarkBefore::kNone;
}

std::string metaspace_mark(const json& metaspace) {
  const json& mark = member(metaspace, "replacement");
  return mark.is_string() ? mark.get<std::string>() : "";
}

// One step: splits a piece by a pattern, after putting a space before it if asked to, or a mark in
// the place of spaces.
struct Step {
  std::optional<Regex> pattern;  // absent: the piece stays whole
  Behavior behavior = Behavior::kIsolated;
  bool invert = false;
  bool add_prefix_space = false;
  std::string mark = {};  // of Metaspace
  MarkBefore before = MarkBefore::kNone;
};

std::string escape_literal(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c))) {
      result += '\\';
    }
    result += c;
  }
  return result;
}

Step make_step(const json& part) {
  Step step;
  const std::string type = type_of(part);
  if (type == "Digits") {
    step.pattern.emplace(R"(\p{N})");
    if (!flag(part, "individual_digits", false)) step.behavior = Behavior::kContiguous;
  } else if (type == "ByteLevel") {
    step.add_prefix_space = flag(part, "add_prefix_space", true);
    if (flag(part, "use_regex", true)) step.pattern.emplace(kGpt2Pattern);
  } else if (type == "Metaspace") {
    step.mark = metaspace_mark(part);
    step.before = *mark_before(part);
    step.behavior = Behavior::kMergedWithNext;
    if (flag(part, "split", true)) step.pattern.emplace(escape_literal(step.mark));
  } else {  // Split
    const json& pattern = member(part, "pattern");
    const json& regex = member(pattern, "Regex");
    step.pattern.emplace(regex.is_string()
                             ? regex.get<std::string>()
                             : escape_literal(member(pattern, "String").get<std::string>()));
    step.behavior = *behavior_of(member(part, "behavior"));
    step.invert = flag(part, "invert", false);
  }
  return step;
}

// ---- merging ----

struct Merge {
  int32_t rank;
  int32_t id;
};

class MergeTable {
 public:
  void add(int32_t left, int32_t right, Merge merge) {
    table_.try_emplace(key(left, right), merge);
  }
  const Merge* find(int32_t left, int32_t right) const {
    const auto found = table_.find(key(left, right));
    return found == table_.end() ? nullptr : &found->second;
  }
  void reserve(size_t count) { table_.reserve(count); }

 private:
  struct Hash {
    size_t operator()(uint64_t x) const {
      x *= 0x9E3779B97F4A7C15u;
      return x ^ x >> 32;
    }
  };
  static uint64_t key(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  std::unordered_map<uint64_t, Merge, Hash> table_;
};

// Merges the lowest rank first, leftmost on ties, until none applies. O(n²), best for words.
void merge_short(std::vector<int32_t>& ids, const MergeTable& merges) {
  while (ids.size() > 1) {
    const Merge* best = nullptr;
    size_t best_at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const Merge* merge = merges.find(ids[i], ids[i + 1]);
      if (merge != nullptr && (best == nullptr || merge->rank < best->rank)) {
        best = merge;
        best_at = i;
      }
    }
    if (best == nullptr) return;
    ids[best_at] = best->id;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best_at) + 1);
  }
}

// The same result in O(n log n): a heap of candidate merges over a linked list of symbols.
void merge_long(std::vector<int32_t>& ids, const MergeTable& merges) {
  struct Candidate {
    int32_t rank;
    int32_t at;
    int32_t left;  // the symbols that it was found for: stale when they have changed
    int32_t right;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  const auto count = static_cast<int32_t>(ids.size());
  std::vector<int32_t> next(ids.size());
  std::vector<int32_t> previous(ids.size());
  for (int32_t i = 0; i < count; ++i) {
    next[static_cast<size_t>(i)] = i + 1 < count ? i + 1 : -1;
    previous[static_cast<size_t>(i)] = i - 1;
  }
  const auto id = [&](int32_t i) -> int32_t& { return ids[static_cast<size_t>(i)]; };
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> heap;
  const auto push = [&](int32_t i) {
    if (i < 0 || next[static_cast<size_t>(i)] < 0) return;
    const int32_t right = id(next[static_cast<size_t>(i)]);
    if (const Merge* merge = merges.find(id(i), right)) heap.push({merge->rank, i, id(i), right});
  };
  for (int32_t i = 0; i < count; ++i) push(i);
  constexpr int32_t kGone = -1;
  while (!heap.empty()) {
    const Candidate top = heap.top();
    heap.pop();
    if (id(top.at) != top.left) continue;
    const int32_t right = next[static_cast<size_t>(top.at)];
    if (right < 0 || id(right) != top.right) continue;
    id(top.at) = merges.find(top.left, top.right)->id;
    id(right) = kGone;
    const int32_t after = next[static_cast<size_t>(right)];
    next[static_cast<size_t>(top.at)] = after;
    if (after >= 0) previous[static_cast<size_t>(after)] = top.at;
    push(previous[static_cast<size_t>(top.at)]);
    push(top.at);
  }
  std::erase(ids, kGone);
}

// ---- added tokens ----

struct AddedToken {
  std::string content;
  int32_t id = 0;
  bool special = false;
  bool lstrip = false;
  bool rstrip = false;
  bool single_word = false;
};

// Bytes of the character that begins at i.
size_t character_length(std::string_view text, size_t i) {
  size_t end = i + 1;
  while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;
  return end - i;
}

// Finds the longest added token at each place, from left to right.
class AddedTokenFinder {
 public:
  void add(const AddedToken& token) {
    if (token.content.empty()) return;
    auto& lengths = lengths_[static_cast<unsigned char>(token.content[0])];
    const size_t length = token.content.size();
    const auto place = std::lower_bound(lengths.begin(), lengths.end(), length, std::greater<>());
    if (place == lengths.end() || *place != length) lengths.insert(place, length);
    tokens_.try_emplace(token.content, token);
  }

  // Calls text(begin, end) and token(id) in order.
  template <typename OnText, typename OnToken>
  void split(std::string_view text, OnText on_text, OnToken on_token) const {
    size_t done = 0;
    for (size_t i = 0; i < text.size();) {
      const AddedToken* token = longest_at(text, i);
      if (token == nullptr) {
        ++i;
        continue;
      }
      size_t begin = i;
      size_t end = i + token->content.size();
      if (token->single_word && (is_word_before(text, begin) || is_word_at(text, end))) {
        i = end;
        continue;
      }
      if (token->lstrip) begin = std::max(done, trim_left(text, begin));
      if (token->rstrip) end = skip_spaces(text, end);
      if (begin > done) on_text(text.substr(done, begin - done));
      on_token(token->id);
      done = end;
      i = std::max(end, i + 1);
    }
    if (done < text.size()) on_text(text.substr(done));
  }

 private:
  const AddedToken* longest_at(std::string_view text, size_t i) const {
    for (const size_t length : lengths_[static_cast<unsigned char>(text[i])]) {
      if (length > text.size() - i) continue;
      const auto found = tokens_.find(text.substr(i, length));
      if (found != tokens_.end()) return &found->second;
    }
    return nullptr;
  }
  bool is_word_at(std::string_view text, size_t i) const {
    bool found = false;
    if (i < text.size()) {
      word_.find_all(text.substr(i, character_length(text, i)),
                     [&](size_t, size_t) { found = true; });
    }
    return found;
  }
  bool is_word_before(std::string_view text, size_t i) const {
    return i > 0 && is_word_at(text, previous_character(text, i));
  }
  static size_t previous_character(std::string_view text, size_t i) {
    --i;
    while (i > 0 && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) --i;
    return i;
  }
  bool is_space_at(std::string_view text, size_t i) const {
    bool found = false;
    space_.find_all(text.substr(i, character_length(text, i)),
                    [&](size_t, size_t) { found = true; });
    return found;
  }
  size_t trim_left(std::string_view text, size_t i) const {
    while (i > 0 && is_space_at(text, previous_character(text, i))) i = previous_character(text, i);
    return i;
  }
  size_t skip_spaces(std::string_view text, size_t i) const {
    while (i < text.size() && is_space_at(text, i)) i += character_length(text, i);
    return i;
  }

  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };

  std::unordered_map<std::string, AddedToken, Hash, std::equal_to<>> tokens_;
  std::array<std::vector<size_t>, 256> lengths_;  // of tokens by first byte, longest first
  // \w of Rust's regex, which this is matched by there.
  Regex word_{R"([\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{200C}\x{200D}\x{24B6}-\x{24E9}\x{1F130}-\x{1F149})"
              R"(\x{1F150}-\x{1F169}\x{1F170}-\x{1F189}])"};
  Regex space_{R"(\s)"};
};

// ---- the tokenizer ----

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(const json& root, const std::string& source, const TokenizerSettings& settings) {
    Problems problems(source);
    for (const std::string& name : unsupported_by_bpe(root)) {
      problems.add("not supported: " + name);
    }
    problems.throw_if_any(
        "a tokenizer.model beside it, as the original of such a model has, is read instead");
    byte_level_ = is_byte_level(root);
    for (const json& part : parts_of(member(root, "normalizer"), "normalizers")) {
      normalizers_.push_back(*make_normalizer(part));
    }
    load_decoder(member(root, "decoder"));
    load_vocabulary(member(root, "model"), problems);
    load_added_tokens(member(root, "added_tokens"), problems);
    problems.throw_if_any();
    load_merges(member(root, "model"), problems);
    for (const json& part : parts_of(member(root, "pre_tokenizer"), "pretokenizers")) {
      steps_.push_back(make_step(part));
    }
    for (const json& part : parts_of(member(root, "post_processor"), "processors")) {
      if (type_of(part) == "TemplateProcessing") load_template(part, problems);
    }
    const auto special = [&](const std::optional<std::string>& token, const char* what) {
      std::optional<int32_t> id;
      if (token) {
        id = token_to_id(*token);
        if (!id) problems.add(std::string(what) + " " + *token + ": not in the vocabulary");
      }
      return id;
    };
    bos_ = special(settings.bos_token, "bos_token");
    eos_ = special(settings.eos_token, "eos_token");
    problems.throw_if_any();
  }

  std::vector<int32_t> encode(std::string_view raw, bool add_special_tokens) const override {
    std::string sanitized;
    std::string_view text = raw;
    if (!is_valid_utf8(raw)) {
      sanitized = sanitize_utf8(raw);
      text = sanitized;
    }
    Run run;
    if (add_special_tokens) run.ids = prefix_;
    const auto emit = [&](int32_t id) { run.ids.push_back(id); };
    // As the reference: tokens that are not to be normalized are taken out first.
    plain_finder_.split(
        text,
        [&](std::string_view segment) {
          const bool first = segment.data() == text.data();
          if (!normalizers_.empty()) {
            segment = run.storage.emplace_back(normalize(segment, normalizers_));
          }
          normalized_finder_.split(
              segment,
              [&](std::string_view piece) {
                run.at_start = first && piece.data() == segment.data();
                encode_piece(piece, 0, run);
              },
              emit);
        },
        emit);
    if (add_special_tokens) run.ids.insert(run.ids.end(), suffix_.begin(), suffix_.end());
    return std::move(run.ids);
  }

  std::string decode(const std::vector<int32_t>& ids, bool skip_special_tokens) const override {
    std::string text;
    bool first = true;
    for (const int32_t id : ids) {
      check(id);
      const auto i = static_cast<size_t>(id);
      if (skip_special_tokens && special_[i]) continue;
      text += first && drops_first_marks_ ? replace_all(tokens_[i], mark_, "") : bytes_[i];
      first = false;
    }
    if (strips_space_ && text.starts_with(' ')) text.erase(0, 1);
    return sanitize_utf8(text);
  }

  int64_t vocab_size() const override { return static_cast<int64_t>(tokens_.size()); }
  std::optional<int32_t> token_to_id(const std::string& token) const override {
    const auto found = ids_.find(token);
    if (found == ids_.end()) return std::nullopt;
    return found->second;
  }
  bool has_id(int32_t id) const override {
    return id >= 0 && id < vocab_size() && present_[static_cast<size_t>(id)];
  }
  std::string id_to_token(int32_t id) const override {
    check(id);
    return tokens_[static_cast<size_t>(id)];
  }
  std::string token_bytes(int32_t id) const override {
    check(id);
    return bytes_[static_cast<size_t>(id)];
  }
  std::optional<int32_t> bos_id() const override { return bos_; }
  std::optional<int32_t> eos_id() const override { return eos_; }
  std::string kind() const override { return byte_level_ ? "byte-level BPE" : "BPE"; }

 private:
  // State of one encode(): its result and the words seen so far.
  struct Run {
    std::vector<int32_t> ids;
    std::unordered_map<std::string_view, std::pair<size_t, size_t>> words;  // range of pool
    std::vector<int32_t> pool;
    std::vector<int32_t> symbols;
    std::deque<std::string> storage;  // pieces that are not part of the text
    bool at_start = true;             // whether the piece begins where the text does
  };

  void check(int32_t id) const {
    if (!has_id(id)) {
      throw_bad_input("tokenizer: id " + std::to_string(id) + " is not in the vocabulary");
    }
  }

  void set_token(const std::string& token, int32_t id) {
    if (static_cast<size_t>(id) >= tokens_.size()) {
      const size_t size = static_cast<size_t>(id) + 1;
      tokens_.resize(size);
      bytes_.resize(size);
      special_.resize(size, false);
      present_.resize(size, false);
    }
    tokens_[static_cast<size_t>(id)] = token;
    bytes_[static_cast<size_t>(id)] = bytes_of(token).value_or(token);
    present_[static_cast<size_t>(id)] = true;
    ids_[token] = id;
  }

  // What a token of the vocabulary stands for in a text.
  std::optional<std::string> bytes_of(const std::string& token) const {
    if (byte_level_) return alphabet_.to_bytes(token);
    if (falls_back_ && token.size() == byte_token(0).size() && token.starts_with("<0x")) {
      const size_t byte = std::strtoul(token.c_str() + 3, nullptr, 16);
      if (byte < 256 && token == byte_token(byte)) return std::string(1, static_cast<char>(byte));
    }
    return mark_.empty() ? token : replace_all(token, mark_, " ");
  }

  // How BPE on characters spells a byte of one that it has no token for: "<0x0A>".
  static std::string byte_token(size_t byte) {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    return std::string("<0x") + kDigits[byte / 16] + kDigits[byte % 16] + '>';
  }

  void load_decoder(const json& decoder) {
    for (const json& part : parts_of(decoder, "decoders")) {
      const std::string type = type_of(part);
      if (type == "Replace") mark_ = make_normalizer(part)->from;
      if (type == "ByteFallback") falls_back_ = true;
      if (type == "Strip") strips_space_ = member(part, "start") == 1;
      if (type == "Metaspace") {
        mark_ = metaspace_mark(part);
        drops_first_marks_ = *mark_before(part) != MarkBefore::kNone;
      }
    }
  }

  static bool is_id(const json& value) {
    constexpr int64_t kMaxId = 1 << 24;
    return value.is_number_integer() && value >= 0 && value < kMaxId;
  }

  void load_vocabulary(const json& model, Problems& problems) {
    const json& vocab = member(model, "vocab");
    if (!vocab.is_object() || vocab.empty()) {
      problems.add("model.vocab: expected an object of tokens, got " + json_excerpt(vocab));
      return;
    }
    for (const auto& [token, id] : vocab.items()) {
      if (!is_id(id)) {
        problems.add("model.vocab: token " + json_excerpt(token) + " has the id " +
                     json_excerpt(id));
        continue;
      }
      const auto number = id.get<int32_t>();
      if (static_cast<size_t>(number) < present_.size() && present_[static_cast<size_t>(number)]) {
        problems.add("model.vocab: id " + std::to_string(number) + " is given twice");
      }
      set_token(token, number);
      const auto word = byte_level_ ? alphabet_.to_bytes(token) : token;
      if (word) words_[*word] = number;
    }
    const bool has_bytes = byte_level_ || flag(model, "byte_fallback", false);
    for (size_t byte = 0; byte < 256; ++byte) {
      const std::string name = byte_level_ ? alphabet_.utf8(byte) : byte_token(byte);
      byte_ids_[byte] = has_bytes ? token_to_id(name).value_or(-1) : -1;
    }
    ignore_merges_ = flag(model, "ignore_merges", false);
    fuses_unknown_ = flag(model, "fuse_unk", false);
    const json& unknown = member(model, "unk_token");
    if (!byte_level_ && unknown.is_string()) {
      unknown_ = token_to_id(unknown.get<std::string>());
      if (!unknown_) problems.add("model.unk_token: " + json_excerpt(unknown) + " is no token");
    }
  }

  void load_added_tokens(const json& added, Problems& problems) {
    if (added.is_null()) return;
    for (const json& entry : added) {
      const json& content = member(entry, "content");
      if (!content.is_string() || content.get<std::string>().empty() ||
          !is_id(member(entry, "id"))) {
        problems.add("added_tokens: expected content and id, got " + json_excerpt(entry));
        continue;
      }
      AddedToken token;
      token.content = content.get<std::string>();
      token.id = member(entry, "id").get<int32_t>();
      token.special = flag(entry, "special", false);
      token.lstrip = flag(entry, "lstrip", false);
      token.rstrip = flag(entry, "rstrip", false);
      token.single_word = flag(entry, "single_word", false);
      const auto known = token_to_id(token.content);
      if (known && *known != token.id) {
        problems.add("added_tokens: " + token.content + " has the id " + std::to_string(token.id) +
                     " but " + std::to_string(*known) + " in the vocabulary");
        continue;
      }
      set_token(token.content, token.id);
      special_[static_cast<size_t>(token.id)] = token.special;
      const bool normalized = flag(entry, "normalized", !token.special);
      if (normalized) token.content = normalize(token.content, normalizers_);
      // As the reference decodes it.
      bytes_[static_cast<size_t>(token.id)] =
          byte_level_ ? token.content : bytes_of(token.content).value_or(token.content);
      (normalized ? normalized_finder_ : plain_finder_).add(token);
    }
  }

  void load_merges(const json& model, Problems& problems) {
    const json& merges = member(model, "merges");
    if (!merges.is_array()) {
      problems.add("model.merges: expected an array, got " + json_excerpt(merges));
      return;
    }
    merges_.reserve(merges.size());
    int32_t rank = 0;
    for (const json& merge : merges) {
      std::string left;
      std::string right;
      if (merge.is_string()) {
        const auto text = merge.get<std::string>();
        const size_t space = text.find(' ');
        left = text.substr(0, space);
        if (space != std::string::npos) right = text.substr(space + 1);
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        left = merge[0].get<std::string>();
        right = merge[1].get<std::string>();
      }
      const auto a = token_to_id(left);
      const auto b = token_to_id(right);
      const auto merged = token_to_id(left + right);
      if (left.empty() || right.empty() || !a || !b || !merged) {
        problems.add("model.merges[" + std::to_string(rank) +
                     "]: expected two tokens of the vocabulary that make a third, got " +
                     json_excerpt(merge));
      } else {
        merges_.add(*a, *b, {rank, *merged});
      }
      ++rank;
    }
  }

  void load_template(const json& part, Problems& problems) {
    bool before = true;
    for (const json& item : member(part, "single")) {
      if (item.contains("Sequence")) {
        before = false;
        continue;
      }
      const json& name = member(member(item, "SpecialToken"), "id");
      const json& known = member(part, "special_tokens");
      const json& ids = name.is_string()
                            ? member(member(known, name.get<std::string>().c_str()), "ids")
                            : member(known, "");
      if (!ids.is_array()) {
        problems.add("post_processor: no ids for " + json_excerpt(item));
        continue;
      }
      for (const json& id : ids) {
        if (!is_id(id) || id.get<int64_t>() >= vocab_size()) {
          problems.add("post_processor: id " + json_excerpt(id) + " is not in the vocabulary");
        } else {
          (before ? prefix_ : suffix_).push_back(id.get<int32_t>());
        }
      }
    }
  }

  void encode_piece(std::string_view piece, size_t step_index, Run& run) const {
    if (piece.empty()) return;
    if (step_index == steps_.size()) {
      encode_word(piece, run);
      return;
    }
    const Step& step = steps_[step_index];
    if (step.add_prefix_space && piece.front() != ' ') {
      piece = run.storage.emplace_back(" " + std::string(piece));
    }
    if (!step.mark.empty()) {
      std::string marked = replace_all(piece, " ", step.mark);
      const bool before =
          step.before == MarkBefore::kAll || (step.before == MarkBefore::kFirst && run.at_start);
      if (before && !marked.starts_with(step.mark)) marked.insert(0, step.mark);
      piece = run.storage.emplace_back(std::move(marked));
    }
    if (!step.pattern) {
      encode_piece(piece, step_index + 1, run);
      return;
    }
    const auto go_on = [&](const Span& span) {
      encode_piece(piece.substr(span.begin, span.end - span.begin), step_index + 1, run);
    };
    if (step.behavior == Behavior::kIsolated) {
      // The common case needs no list: a gap and a match are pieces alike.
      size_t done = 0;
      step.pattern->find_all(piece, [&](size_t begin, size_t end) {
        if (begin > done) go_on({done, begin, false});
        go_on({begin, end, true});
        done = end;
      });
      if (done < piece.size()) go_on({done, piece.size(), false});
      return;
    }
    std::vector<Span> spans;
    size_t done = 0;
    step.pattern->find_all(piece, [&](size_t begin, size_t end) {
      if (begin > done) spans.push_back({done, begin, step.invert});
      spans.push_back({begin, end, !step.invert});
      done = end;
    });
    if (done < piece.size()) spans.push_back({done, piece.size(), step.invert});
    for (const Span& span : apply_behavior(std::move(spans), step.behavior)) go_on(span);
  }

  void append_bytes(std::string_view word, std::vector<int32_t>& symbols) const {
    for (const char c : word) {
      const int32_t id = byte_ids_[static_cast<unsigned char>(c)];
      if (id >= 0) symbols.push_back(id);  // no token for this byte: dropped, as the reference
    }
  }

  // Characters without a token become those of their bytes, else unknown, one for a run of them if
  // the file says so.
  void append_characters(std::string_view word, std::vector<int32_t>& symbols) const {
    bool after_unknown = false;
    std::string character;
    for (size_t i = 0; i < word.size(); i += character.size()) {
      character = word.substr(i, character_length(word, i));
      const auto found = words_.find(character);
      const bool unknown = found == words_.end() && !has_bytes_of(character);
      if (found != words_.end()) {
        symbols.push_back(found->second);
      } else if (!unknown) {
        append_bytes(character, symbols);
      } else if (unknown_ && !(fuses_unknown_ && after_unknown)) {
        symbols.push_back(*unknown_);
      }
      after_unknown = unknown;
    }
  }

  bool has_bytes_of(std::string_view character) const {
    return std::all_of(character.begin(), character.end(),
                       [&](char c) { return byte_ids_[static_cast<unsigned char>(c)] >= 0; });
  }

  void encode_word(std::string_view word, Run& run) const {
    const auto known = run.words.find(word);
    if (known != run.words.end()) {
      const auto [begin, end] = known->second;
      run.ids.insert(run.ids.end(), run.pool.begin() + static_cast<std::ptrdiff_t>(begin),
                     run.pool.begin() + static_cast<std::ptrdiff_t>(end));
      return;
    }
    throw_if_interrupted();  // a text may be large
    std::vector<int32_t>& symbols = run.symbols;
    symbols.clear();
    const auto whole = ignore_merges_ ? words_.find(std::string(word)) : words_.end();
    if (whole != words_.end()) {
      symbols.push_back(whole->second);
    } else {
      byte_level_ ? append_bytes(word, symbols) : append_characters(word, symbols);
      constexpr size_t kLong = 48;
      symbols.size() < kLong ? merge_short(symbols, merges_) : merge_long(symbols, merges_);
    }
    run.words.emplace(word, std::pair(run.pool.size(), run.pool.size() + symbols.size()));
    run.pool.insert(run.pool.end(), symbols.begin(), symbols.end());
    run.ids.insert(run.ids.end(), symbols.begin(), symbols.end());
  }

  Alphabet alphabet_;
  std::vector<std::string> tokens_;  // by id, as the file spells them
  std::vector<std::string> bytes_;   // by id, decoded
  std::vector<bool> special_;
  std::vector<bool> present_;
  std::unordered_map<std::string, int32_t> ids_;
  std::unordered_map<std::string, int32_t> words_;  // of the vocabulary, by what is looked up
  std::array<int32_t, 256> byte_ids_ = {};
  MergeTable merges_;
  bool byte_level_ = true;  // else on characters, as SentencePiece's
  bool ignore_merges_ = false;
  bool fuses_unknown_ = false;
  std::optional<int32_t> unknown_;
  std::vector<Normalizer> normalizers_;
  // What decoding does to tokens of characters.
  std::string mark_;  // becomes a space
  bool falls_back_ = false;
  bool strips_space_ = false;       // one, at the beginning
  bool drops_first_marks_ = false;  // of the first token
  std::vector<Step> steps_;
  AddedTokenFinder plain_finder_;
  AddedTokenFinder normalized_finder_;
  std::vector<int32_t> prefix_;
  std::vector<int32_t> suffix_;
  std::optional<int32_t> bos_;
  std::optional<int32_t> eos_;
};

// Metaspace; or Replace of a mark by a space, ByteFallback, Fuse and Strip of a space at the
// beginning, in this order, of which the second and the last may be absent.
bool is_decoder_of_characters(const json& decoder) {
  std::vector<json> parts = parts_of(decoder, "decoders");
  if (parts.size() == 1 && type_of(parts[0]) == "Metaspace") {
    return !metaspace_mark(parts[0]).empty() && mark_before(parts[0]);
  }
  if (!parts.empty() && type_of(parts.back()) == "Strip") {
    const json& strip = parts.back();
    const json& start = member(strip, "start");
    if (member(strip, "content") != " " || (start != 0 && start != 1) ||
        member(strip, "stop") != 0) {
      return false;
    }
    parts.pop_back();
  }
  std::string types;
  for (const json& part : parts) types += type_of(part) + ' ';
  if (types != "Replace Fuse " && types != "Replace ByteFallback Fuse ") return false;
  const auto replace = make_normalizer(parts[0]);
  return replace && replace->to == " ";
}

}  // namespace

std::vector<std::string> unsupported_by_bpe(const json& root) {
  std::vector<std::string> names;
  const bool on_bytes = is_byte_level(root);
  for (const json& part : parts_of(member(root, "normalizer"), "normalizers")) {
    if (on_bytes || !make_normalizer(part)) names.push_back("normalizer " + type_of(part));
  }
  const std::vector<json> pre = parts_of(member(root, "pre_tokenizer"), "pretokenizers");
  bool byte_level = false;
  for (const json& part : pre) {
    const std::string type = type_of(part);
    // It would see the byte alphabet instead of the text.
    if (byte_level) names.push_back("pre_tokenizer " + type + " behind ByteLevel");
    byte_level = byte_level || type == "ByteLevel";
    if (type == "Split") {
      const json& pattern = member(part, "pattern");
      if (!member(pattern, "Regex").is_string() && !member(pattern, "String").is_string()) {
        names.push_back("pre_tokenizer Split with pattern " + json_excerpt(pattern));
      }
      if (!behavior_of(member(part, "behavior"))) {
        names.push_back("pre_tokenizer Split with behavior " +
                        json_excerpt(member(part, "behavior")));
      }
    } else if (type == "Metaspace") {
      if (pre.size() > 1) names.push_back("pre_tokenizer Metaspace beside others");
      if (metaspace_mark(part).empty() || !mark_before(part)) {
        names.push_back("pre_tokenizer " + json_excerpt(part));
      }
    } else if (type != "Digits" && type != "ByteLevel") {
      names.push_back("pre_tokenizer " + type);
    }
  }
  const json& model = member(root, "model");
  const std::string model_type = type_of(model);
  if (model_type != "BPE") names.push_back("model " + model_type);
  std::vector<const char*> refused = {"dropout", "continuing_subword_prefix", "end_of_word_suffix"};
  if (on_bytes) refused.insert(refused.end(), {"unk_token", "byte_fallback"});
  for (const char* key : refused) {
    if (is_set(member(model, key))) {
      names.push_back(std::string("model ") + key + " " + json_excerpt(member(model, key)));
    }
  }
  for (const json& part : parts_of(member(root, "post_processor"), "processors")) {
    const std::string type = type_of(part);
    if (type != "ByteLevel" && type != "TemplateProcessing") {
      names.push_back("post_processor " + type);
    }
  }
  const json& decoder = member(root, "decoder");
  if (!on_bytes) {
    if (!is_decoder_of_characters(decoder)) names.push_back("decoder " + json_excerpt(decoder));
  } else {
    for (const json& part : parts_of(decoder, "decoders")) {
      if (type_of(part) != "ByteLevel") names.push_back("decoder " + type_of(part));
    }
  }
  // "truncation" and "padding" are what some call was once told; transformers does not heed them
  // either unless a call asks for it.
  return names;
}

std::unique_ptr<Tokenizer> load_bpe(const json& root, const std::string& source,
                                    const TokenizerSettings& settings) {
  return std::make_unique<BpeTokenizer>(root, source, settings);
}

}  // namespace hla
