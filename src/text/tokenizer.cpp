#include "hla/text/tokenizer.h"

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "hla/core/error.h"
#include "hla/core/log.h"
#include "hla/io/json_file.h"
#include "hla/text/bpe_tokenizer.h"
#include "hla/text/sentencepiece_tokenizer.h"

namespace hla {
namespace {

namespace fs = std::filesystem;

// Of {"content": "text"}.
std::optional<std::string> content_of(const nlohmann::json& token) {
  if (!token.is_object()) return std::nullopt;
  const auto found = token.find("content");
  if (found == token.end() || !found->is_string()) return std::nullopt;
  return found->get<std::string>();
}

// A token as "text" or {"content": "text"}; absent for null.
std::optional<std::string> token_text(const nlohmann::json& config, const char* key,
                                      Problems& problems) {
  if (!has_key(config, key)) return std::nullopt;
  const nlohmann::json& value = config[key];
  if (value.is_string()) return value.get<std::string>();
  const auto text = content_of(value);
  if (!text) problems.add(std::string(key) + ": expected a token, got " + json_excerpt(value));
  return text;
}

// The folder's tokenizer_config.json; an empty object where there is none.
nlohmann::json read_tokenizer_config(const fs::path& file) {
  std::error_code error;
  if (!fs::exists(file, error)) return nlohmann::json::object();
  nlohmann::json config = read_json_file(file);
  if (!config.is_object()) {
    throw_bad_input(file.string() + ": expected an object, got " + json_excerpt(config));
  }
  return config;
}

// As transformers does where tokenizer_config.json lists no added tokens: it is how older versions
// wrote a folder.
void add_special_tokens_map(nlohmann::json& config, const fs::path& file) {
  std::error_code error;
  if (config.contains("added_tokens_decoder") || !fs::is_regular_file(file, error)) return;
  const nlohmann::json map = read_json_file(file);
  if (!map.is_object()) {
    throw_bad_input(file.string() + ": expected an object, got " + json_excerpt(map));
  }
  Problems problems(file.string());
  for (const char* key : {"bos_token", "eos_token"}) {
    if (map.contains(key) && token_text(map, key, problems)) config[key] = map[key];
  }
  problems.throw_if_any();
}

TokenizerSettings read_settings(const nlohmann::json& config, const fs::path& file) {
  TokenizerSettings settings;
  Problems problems(file.string());
  settings.bos_token = token_text(config, "bos_token", problems);
  settings.eos_token = token_text(config, "eos_token", problems);
  const auto boolean = [&](const char* key) -> std::optional<bool> {
    if (!has_key(config, key)) return std::nullopt;
    return get_bool(config, key, false, problems);
  };
  settings.add_bos_token = boolean("add_bos_token");
  settings.add_eos_token = boolean("add_eos_token");
  problems.throw_if_any();
  return settings;
}

// What tokenizer.json has under "added_tokens", [{"id": id, "content": "token", …}]. As in
// transformers, what tokenizer_config.json says of them counts, {"added_tokens_decoder": {"id":
// {"content": "token", …}}}, and it may have more of them.
nlohmann::json added_tokens(const nlohmann::json& tokenizer, const nlohmann::json& config) {
  nlohmann::json added =
      tokenizer.is_object() ? tokenizer.value("added_tokens", nlohmann::json()) : nlohmann::json();
  const nlohmann::json decoder = config.value("added_tokens_decoder", nlohmann::json());
  if (!decoder.is_object() || !(added.is_null() || added.is_array())) return added;
  std::map<std::string, size_t> places;
  for (size_t i = 0; i < added.size(); ++i) {
    if (const auto content = content_of(added[i])) places.emplace(*content, i);
  }
  for (const auto& [id, token] : decoder.items()) {
    const auto content = content_of(token);
    if (!content) continue;
    const auto known = places.find(*content);
    if (known != places.end()) {
      added[known->second].update(token);
    } else {
      added.push_back(token);
      added.back()["id"] = std::strtoll(id.c_str(), nullptr, 10);
    }
  }
  return added;
}

// Those of a folder that its tokenizer.model has not: of the above, or in added_tokens.json,
// {"token": id}.
std::set<std::string> tokens_beyond(const nlohmann::json& added, const fs::path& folder,
                                    int64_t vocab_size) {
  std::set<std::string> tokens;
  const auto is_beyond = [&](const nlohmann::json& id) {
    return id.is_number_integer() && id.get<int64_t>() >= vocab_size;
  };
  for (const nlohmann::json& token : added) {
    const auto content = content_of(token);
    if (content && is_beyond(token.value("id", nlohmann::json()))) tokens.insert(*content);
  }
  std::error_code error;
  const fs::path file = folder / "added_tokens.json";
  if (!fs::is_regular_file(file, error)) return tokens;
  const nlohmann::json ids = read_json_file(file);
  for (const auto& [token, id] : ids.items()) {
    if (is_beyond(id)) tokens.insert(token);
  }
  return tokens;
}

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& path) {
  std::error_code error;
  const bool folder = fs::is_directory(path, error);
  const fs::path parent = folder ? path : path.parent_path();
  const fs::path json_file = folder ? path / "tokenizer.json" : path;
  const fs::path model_file = folder ? path / "tokenizer.model" : path;
  const bool has_json =
      folder ? fs::is_regular_file(json_file, error) : path.extension() == ".json";
  const bool has_model = folder ? fs::is_regular_file(model_file, error) : !has_json;
  if (!has_json && !has_model) {
    throw_bad_input(path.string() + ": no tokenizer.json and no tokenizer.model");
  }
  const fs::path config_file = parent / "tokenizer_config.json";
  nlohmann::json config = read_tokenizer_config(config_file);
  add_special_tokens_map(config, parent / "special_tokens_map.json");
  const TokenizerSettings settings = read_settings(config, config_file);
  nlohmann::json root;
  if (has_json) root = read_json_file(json_file);
  const nlohmann::json added = added_tokens(root, config);
  if (has_json) {
    if (root.is_object()) root["added_tokens"] = added;
    const std::vector<std::string> unsupported = unsupported_by_bpe(root);
    if (unsupported.empty() || !has_model) {
      auto tokenizer = load_bpe(root, json_file.string(), settings);
      // As in transformers: what is added is what the file's post-processor adds.
      // Of Llama 2's kind one is expected.
      const bool expects_bos = settings.add_bos_token.value_or(tokenizer->kind() == "BPE");
      if (expects_bos && tokenizer->encode("").empty()) {
        log_warning(
            json_file.string() + ": adds no BOS" +
            (settings.add_bos_token ? ", though tokenizer_config.json says add_bos_token" : "") +
            ", so none is added");
      }
      return tokenizer;
    }
    log_debug(json_file.string() + ": " + unsupported.front() +
              " is not supported, tokenizer.model is used");
  }
  auto tokenizer = load_sentencepiece(model_file, settings);
  const std::set<std::string> beyond = tokens_beyond(added, parent, tokenizer->vocab_size());
  if (!beyond.empty()) {
    log_warning(model_file.string() + ": " + std::to_string(beyond.size()) +
                " tokens that were added to it, like " + json_excerpt(*beyond.begin()) +
                ", are read as plain text");
  }
  return tokenizer;
}

}  // namespace hla
