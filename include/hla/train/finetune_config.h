// What a fine-tuning run is asked for: one table of keys drives reading, printing and documenting.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace hla {

// Every field is documented in the table of config_fields().
struct FinetuneConfig {
  std::string model;
  std::string output;
  struct Data {
    std::vector<std::string> train = {"wikitext-2-raw:train"};
    std::string valid = "wikitext-2-raw:validation";
    std::string text_field = "text";
    std::string rows = "packed";
    int64_t context = 1024;
    int64_t max_tokens = 0;
    int64_t seed = 1;
  } data;
  struct Train {
    double epochs = 1;
    int64_t max_steps = 0;
    int64_t batch_rows = 4;
    int64_t accumulate = 1;
    std::string parameters = "all";
    int64_t lora_rank = 0;
    double lora_alpha = 16;
    std::string activations = "kept";
    std::string factors = "balanced";
  } train;
  struct Distill {
    std::string teacher;
    double text = 1;
    double kl = 1;
    double temperature = 1;
    double hidden = 0;
    int64_t attention_steps = 0;
    double attention_learning_rate = 0;
  } distill;
  struct Optimizer {
    double learning_rate = 5e-5;
    double beta1 = 0.9;
    double beta2 = 0.999;
    double epsilon = 1e-8;
    double weight_decay = 0.01;
    double max_gradient_norm = 1;
  } optimizer;
  struct Schedule {
    std::string kind = "cosine";
    int64_t warmup_steps = 0;
    double final_ratio = 0;
  } schedule;
  struct Eval {
    int64_t every_steps = 0;
    int64_t context = 0;
    int64_t windows = 0;
    int64_t patience = 0;
    std::vector<std::string> prompts;
    int64_t prompt_tokens = 40;
  } eval;
  struct Checkpoint {
    int64_t every_steps = 0;
    int64_t keep_last = 2;
    int64_t keep_best = 1;
  } checkpoint;
};

struct ConfigField {
  using Target = std::variant<std::string*, int64_t*, double*, std::vector<std::string>*>;
  std::string key;                        // "optimizer.learning_rate"
  std::string doc;                        // one line
  Target target;                          // in the config that the table was made for
  std::vector<std::string> choices = {};  // of a text; empty: any
  double min = -std::numeric_limits<double>::infinity();  // of a number
  double max = std::numeric_limits<double>::infinity();

  nlohmann::json value() const;
};

// In the order in which they are shown.
std::vector<ConfigField> config_fields(FinetuneConfig& config);

struct ResolvedConfig {
  FinetuneConfig config;
  std::map<std::string, std::string> origin;  // of every key: "default", the file, or "--set"
};

// The defaults, then a JSON file (comments allowed; keys nested or dotted), then "key=value" texts,
// whose values are JSON or plain text (for a list also "a,b"). Throws kBadInput (a file) or kUsage
// (--set alone) with every problem: unknown keys with the nearest name, wrong types, values out of
// range.
ResolvedConfig resolve_config(const std::optional<std::filesystem::path>& file,
                              const std::vector<std::string>& assignments);

// JSON that resolve_config() reads again, every key with its documentation and where its value is
// from as comments.
std::string to_commented_json(const ResolvedConfig& resolved);
// {"config": {nested}, "origin": {dotted key: text}}.
nlohmann::json to_json(const ResolvedConfig& resolved);

}  // namespace hla
