#include "hla/text/tokenizer_check.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "hla/core/error.h"
#include "hla/io/json_file.h"

namespace hla {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kHint =
    ".venv/bin/python scripts/make_tokenizer_goldens.py --folder DIR makes one with the reference "
    "library";

std::optional<std::vector<int32_t>> read_ids(const json& value, const std::string& where,
                                             Problems& problems) {
  std::vector<int32_t> ids;
  if (!value.is_array()) {
    problems.add(where + ": expected an array of ids, got " + json_excerpt(value));
    return std::nullopt;
  }
  for (const json& id : value) {
    if (!id.is_number_integer() || id < 0 || id > std::numeric_limits<int32_t>::max()) {
      problems.add(where + ": expected ids of at least 0, got " + json_excerpt(id));
      return std::nullopt;
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

std::optional<GoldenPair> read_pair(const json& value, const std::string& where,
                                    Problems& problems) {
  if (!value.is_object() || !value.contains("text") || !value["text"].is_string() ||
      !value.contains("ids")) {
    problems.add(where + R"(: expected an object with "text" and "ids", got )" +
                 json_excerpt(value));
    return std::nullopt;
  }
  GoldenPair pair;
  pair.text = value["text"].get<std::string>();
  const auto ids = read_ids(value["ids"], where + ".ids", problems);
  if (has_key(value, "ids_with_special")) {
    pair.ids_with_special =
        read_ids(value["ids_with_special"], where + ".ids_with_special", problems);
  }
  if (!ids) return std::nullopt;
  pair.ids = *ids;
  return pair;
}

// Ids of a config: one or a list of them; none for anything else.
std::set<int64_t> ids_of(const json& config, const char* key) {
  std::set<int64_t> ids;
  if (!has_key(config, key)) return ids;
  const json& value = config[key];
  for (const json& id : value.is_array() ? value : json::array({value})) {
    if (id.is_number_integer()) ids.insert(id.get<int64_t>());
  }
  return ids;
}

std::string list_of(const std::set<int64_t>& ids) {
  std::string text;
  for (const int64_t id : ids) text += (text.empty() ? "" : ", ") + std::to_string(id);
  return text;
}

}  // namespace

fs::path tokenizer_goldens_path(const fs::path& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) return path / "tokenizer_goldens.json";
  return path.parent_path() / (path.stem().string() + "_goldens.json");
}

TokenizerGoldens read_tokenizer_goldens(const fs::path& file) {
  std::error_code error;
  if (!fs::exists(file, error)) {
    throw_bad_input(file.string() + ": no such file to check the tokenizer with\n  hint: " + kHint);
  }
  const json root = read_json_file(file);
  Problems problems(file.string());
  TokenizerGoldens goldens;
  if (!root.is_object() || !root.contains("pairs") || !root["pairs"].is_array()) {
    problems.add(R"(expected an object with an array "pairs", got )" + json_excerpt(root));
    problems.throw_if_any(kHint);
  }
  goldens.source = get_string(root, "source", "", problems);
  const json& pairs = root["pairs"];
  // Without texts to compare, every tokenizer would pass.
  if (pairs.empty()) problems.add("pairs: expected at least one, got none");
  for (size_t i = 0; i < pairs.size(); ++i) {
    auto pair = read_pair(pairs[i], "pairs[" + std::to_string(i) + "]", problems);
    if (pair) goldens.pairs.push_back(std::move(*pair));
  }
  problems.throw_if_any(kHint);
  return goldens;
}

TokenizerCheck check_tokenizer(const Tokenizer& tokenizer, const TokenizerGoldens& goldens) {
  TokenizerCheck result;
  result.pairs = goldens.pairs.size();
  for (size_t i = 0; i < goldens.pairs.size(); ++i) {
    const GoldenPair& pair = goldens.pairs[i];
    const size_t before = result.mismatches.size();
    const auto compare = [&](const std::vector<int32_t>& expected, bool with_special) {
      std::vector<int32_t> got = tokenizer.encode(pair.text, with_special);
      std::set<int32_t> unknown;
      for (const auto* ids : {&expected, &std::as_const(got)}) {
        for (const int32_t id : *ids) {
          if (id < 0 || id >= tokenizer.vocab_size()) unknown.insert(id);
        }
      }
      if (got == expected && unknown.empty()) return;
      GoldenMismatch mismatch;
      mismatch.pair = i;
      mismatch.text = pair.text;
      mismatch.with_special = with_special;
      const auto [a, b] = std::mismatch(expected.begin(), expected.end(), got.begin(), got.end());
      mismatch.first_difference = static_cast<size_t>(a - expected.begin());
      mismatch.unknown_ids.assign(unknown.begin(), unknown.end());
      mismatch.expected = expected;
      mismatch.got = std::move(got);
      result.mismatches.push_back(std::move(mismatch));
    };
    compare(pair.ids, false);
    if (pair.ids_with_special) compare(*pair.ids_with_special, true);
    if (result.mismatches.size() == before) ++result.agreeing;
  }
  return result;
}

std::vector<std::string> config_warnings(const Tokenizer& tokenizer, const json& config) {
  std::vector<std::string> warnings;
  Problems problems("config.json");
  const int64_t vocab_size = get_int(config, "vocab_size", -1, problems, 1);
  for (const std::string& problem : problems.list()) warnings.push_back("config.json: " + problem);
  // A larger one is common: embeddings are padded.
  if (vocab_size >= 0 && vocab_size < tokenizer.vocab_size()) {
    warnings.push_back("config.json: vocab_size " + std::to_string(vocab_size) +
                       " is smaller than the tokenizer's " +
                       std::to_string(tokenizer.vocab_size()) +
                       ": the model has no embeddings for the last ids");
  }
  const auto compare = [&](const char* key, const std::optional<int32_t>& own) {
    const std::set<int64_t> ids = ids_of(config, key);
    if (!own || ids.empty() || ids.contains(*own)) return;
    warnings.push_back("config.json: " + std::string(key) + " " + list_of(ids) +
                       " differs from the tokenizer's " + std::to_string(*own));
  };
  compare("bos_token_id", tokenizer.bos_id());
  compare("eos_token_id", tokenizer.eos_id());
  return warnings;
}

}  // namespace hla
