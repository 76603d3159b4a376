#include "hla/train/finetune_config.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "hla/core/error.h"
#include "hla/core/join.h"
#include "hla/core/nearest.h"
#include "hla/io/json_file.h"
#include "hla/text/unicode.h"

namespace hla {
namespace {

using nlohmann::json;

constexpr double kInf = std::numeric_limits<double>::infinity();

// {"a": {"b": 1}, "c.d": 2} -> {"a.b": 1, "c.d": 2}, in order of the keys. An empty section that is
// none of `sections` stays as it is, for its name to be refused.
void flatten(const json& object, const std::string& prefix, const std::set<std::string>& sections,
             std::map<std::string, json>& to, Problems& problems) {
  for (const auto& [name, value] : object.items()) {
    const std::string key = prefix + name;
    if (value.is_object() && (!value.empty() || sections.contains(key))) {
      flatten(value, key + ".", sections, to, problems);
    } else if (!to.emplace(key, value).second) {
      problems.add(key + ": given twice, nested and with a dot");
    }
  }
}

// Keys that a mistyped one may have meant, by all of it or, like learning_rate or
// train.learning_rate, by what stands behind the section.
std::vector<std::string> nearest_keys(const std::string& wanted,
                                      const std::vector<std::string>& keys) {
  if (const std::string nearest = nearest_name(wanted, keys); !nearest.empty()) return {nearest};
  const auto name = [](const std::string& key) { return key.substr(key.find('.') + 1); };
  std::vector<std::string> names;
  for (const std::string& key : keys) names.push_back(name(key));
  const std::string nearest = nearest_name(name(wanted), names);
  std::vector<std::string> result;
  std::copy_if(keys.begin(), keys.end(), std::back_inserter(result),
               [&](const std::string& key) { return !nearest.empty() && name(key) == nearest; });
  return result;
}

// What is recorded beside a run is JSON.
bool check_utf8(const ConfigField& field, const std::string& text, Problems& problems) {
  if (is_valid_utf8(text)) return true;
  problems.add(field.key + ": expected UTF-8, got " + sanitize_utf8(text));
  return false;
}

void set_text(const ConfigField& field, std::string& target, const json& value,
              Problems& problems) {
  if (!value.is_string()) {
    problems.add(field.key + ": expected a text, got " + json_excerpt(value));
    return;
  }
  const auto text = value.get<std::string>();
  if (!check_utf8(field, text, problems)) return;
  const auto& choices = field.choices;
  if (!choices.empty() && std::find(choices.begin(), choices.end(), text) == choices.end()) {
    problems.add(field.key + ": expected one of " + join(choices, ", ") + ", got " + text);
    return;
  }
  target = text;
}

void set_list(const ConfigField& field, std::vector<std::string>& target, const json& value,
              Problems& problems) {
  const json list = value.is_string() ? json::array({value}) : value;
  const bool texts = list.is_array() && std::all_of(list.begin(), list.end(),
                                                    [](const json& x) { return x.is_string(); });
  if (!texts) {
    problems.add(field.key + ": expected a list of texts, got " + json_excerpt(value));
    return;
  }
  auto entries = list.get<std::vector<std::string>>();
  for (const std::string& text : entries) {
    if (!check_utf8(field, text, problems)) return;
  }
  target = std::move(entries);
}

void set(const ConfigField& field, const json& value, Problems& problems) {
  if (const auto* text = std::get_if<std::string*>(&field.target)) {
    set_text(field, **text, value, problems);
  } else if (const auto* list = std::get_if<std::vector<std::string>*>(&field.target)) {
    set_list(field, **list, value, problems);
  } else if (value.is_null()) {
    problems.add(field.key + ": expected a number, got null");
  } else if (const auto* number = std::get_if<double*>(&field.target)) {
    const json object = {{field.key, value}};
    **number = get_double(object, field.key, **number, problems, field.min, field.max);
  } else {
    int64_t& integer = *std::get<int64_t*>(field.target);
    const json object = {{field.key, value}};
    // Limits of integers are small numbers, or none.
    constexpr auto kMost = std::numeric_limits<int64_t>::max();
    integer = get_int(object, field.key, integer, problems, static_cast<int64_t>(field.min),
                      field.max == kInf ? kMost : static_cast<int64_t>(field.max));
  }
}

// What stands behind "key=": JSON where it is that, else text.
json assigned_value(const ConfigField& field, const std::string& text) {
  const bool is_list = std::holds_alternative<std::vector<std::string>*>(field.target);
  const json parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (std::holds_alternative<std::string*>(field.target) || is_list) {
    if (parsed.is_string() || (is_list && parsed.is_array())) return parsed;
    if (!is_list) return text;
    json list = json::array();
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) list.push_back(part);
    return list;
  }
  return parsed.is_discarded() ? json(text) : parsed;
}

}  // namespace

json ConfigField::value() const {
  return std::visit([](const auto* of) { return json(*of); }, target);
}

std::vector<ConfigField> config_fields(FinetuneConfig& c) {
  return {
      {"model",
       "the model to tune: a folder (Llama or HLA), an HF id in the local cache, or a "
       "llama2.c file",
       &c.model},
      {"output", "the folder to make", &c.output},
      {"data.train", "texts to tune on: files or folders as of `hla ppl --text`, or DATASET:SPLIT",
       &c.data.train},
      {"data.valid", "the text that evaluations measure, of the same form", &c.data.valid},
      {"data.text_field", "the field of JSONL objects, the column of Parquet files",
       &c.data.text_field},
      {"data.rows",
       "packed: one stream of tokens, cut; padded: a line or document a row, of longer ones the "
       "first data.context tokens, padding not learnt; padded-unmasked: padding learnt, as "
       "sodabreak/MHA2HLA has it",
       &c.data.rows,
       {"packed", "padded", "padded-unmasked"}},
      {"data.context", "tokens of a row", &c.data.context, {}, 2},
      {"data.max_tokens",
       "tokens to take of the texts in their order, padding not counted; 0: all",
       &c.data.max_tokens,
       {},
       0},
      {"data.seed",
       "of the order of the rows, which is another one in every epoch",
       &c.data.seed,
       {},
       0},
      {"train.epochs",
       "how often every row is read, steps on attention not counted",
       &c.train.epochs,
       {},
       0,
       1e6},
      {"train.max_steps",
       "no more steps than these, of those of train.epochs; steps on attention do not count. 0: no "
       "such limit",
       &c.train.max_steps,
       {},
       0},
      {"train.batch_rows", "rows that are read at once", &c.train.batch_rows, {}, 1, 1e9},
      {"train.accumulate", "batches whose gradients make a step", &c.train.accumulate, {}, 1, 1e9},
      {"train.parameters",
       "what is tuned: all; attention (self_attn of every layer); factors (latents' down and up "
       "matrices)",
       &c.train.parameters,
       {"all", "attention", "factors"}},
      {"train.lora_rank",
       "the layers' matrices that train.parameters leaves out learn a product of two of so many "
       "columns and rows (LoRA), "
       "which is added to them in what is written; 0: they stay as they are",
       &c.train.lora_rank,
       {},
       0},
      {"train.lora_alpha",
       "such a product counts lora_alpha / lora_rank times",
       &c.train.lora_alpha,
       {},
       0},
      {"train.activations",
       "of a layer: kept for the way back, or recomputed there, for less memory and about a third "
       "more time",
       &c.train.activations,
       {"kept", "recomputed"}},
      {"train.factors",
       "of HLA, before the first step: balanced (scaled so that down and up matrices have entries "
       "of like size, which leaves what they compute as it is), or kept",
       &c.train.factors,
       {"balanced", "kept"}},
      {"distill.teacher",
       "a model of the same tokenizer to learn from, named as `model`; empty: none, and the "
       "other keys of this section have to do nothing (attention_steps 0) or are without effect",
       &c.distill.teacher},
      {"distill.text",
       "weight of the loss on the text itself, with a teacher",
       &c.distill.text,
       {},
       0},
      {"distill.kl", "weight of temperature² · KL(teacher‖model), by token", &c.distill.kl, {}, 0},
      {"distill.temperature",
       "divides both models' logits there",
       &c.distill.temperature,
       {},
       0.01,
       100},
      {"distill.hidden",
       "weight of the relative squared error of what leaves the layers, mean over tokens and "
       "layers",
       &c.distill.hidden,
       {},
       0},
      {"distill.attention_steps",
       "steps before all others, in which each layer's attention learns the teacher's on the "
       "teacher's inputs, errors weighted by what they cost the teacher's predictions: cheap, and "
       "with a schedule of their own",
       &c.distill.attention_steps,
       {},
       0},
      {"distill.attention_learning_rate",
       "learning rate of these steps, at its highest; 0: optimizer.learning_rate",
       &c.distill.attention_learning_rate,
       {},
       0,
       1},
      {"optimizer.learning_rate", "of AdamW, at its highest", &c.optimizer.learning_rate, {}, 0, 1},
      {"optimizer.beta1", "decay of the mean gradient", &c.optimizer.beta1, {}, 0, 0.999999},
      {"optimizer.beta2", "decay of the mean square", &c.optimizer.beta2, {}, 0, 0.999999},
      {"optimizer.epsilon", "added to the root of the mean square", &c.optimizer.epsilon, {}, 0},
      {"optimizer.weight_decay",
       "of matrices, decoupled; norms and biases have none",
       &c.optimizer.weight_decay,
       {},
       0},
      {"optimizer.max_gradient_norm",
       "longer gradients are shortened to it; 0: no limit",
       &c.optimizer.max_gradient_norm,
       {},
       0},
      {"schedule.kind",
       "of the learning rate behind the warm-up",
       &c.schedule.kind,
       {"cosine", "linear", "constant"}},
      {"schedule.warmup_steps", "steps of linear rise", &c.schedule.warmup_steps, {}, 0},
      {"schedule.final_ratio",
       "the last learning rate, divided by the highest",
       &c.schedule.final_ratio,
       {},
       0,
       1},
      {"eval.every_steps",
       "steps from evaluation to evaluation; 0: after every epoch",
       &c.eval.every_steps,
       {},
       0},
      {"eval.context",
       "tokens of a window (protocol gptq); 0: data.context",
       &c.eval.context,
       {},
       0},
      {"eval.windows", "the first so many windows; 0: all", &c.eval.windows, {}, 0},
      {"eval.patience",
       "evaluations without a better one after which it ends; 0: no such end",
       &c.eval.patience,
       {},
       0},
      {"eval.prompts", "texts that the model continues, greedily, at every evaluation",
       &c.eval.prompts},
      {"eval.prompt_tokens", "tokens of a continuation", &c.eval.prompt_tokens, {}, 1},
      {"checkpoint.every_steps",
       "steps after which all that a killed run needs to go on is saved, beside before every "
       "evaluation; 0: only then",
       &c.checkpoint.every_steps,
       {},
       0},
      {"checkpoint.keep_last",
       "how many of the last are kept until the end; one that is damaged is passed over",
       &c.checkpoint.keep_last,
       {},
       1},
      {"checkpoint.keep_best",
       "how many of the best evaluated models are written: the best as `output`, the others as its "
       "step-N; best is the least perplexity, or, where the text itself is not learnt "
       "(distill.text "
       "0, or steps on attention alone), the least KL to the teacher",
       &c.checkpoint.keep_best,
       {},
       1},
  };
}

ResolvedConfig resolve_config(const std::optional<std::filesystem::path>& file,
                              const std::vector<std::string>& assignments) {
  ResolvedConfig resolved;
  const std::vector<ConfigField> fields = config_fields(resolved.config);
  std::vector<std::string> names;
  std::set<std::string> sections;
  for (const ConfigField& field : fields) {
    names.push_back(field.key);
    if (const size_t dot = field.key.find('.'); dot != std::string::npos) {
      sections.insert(field.key.substr(0, dot));
    }
    resolved.origin[field.key] = "default";
  }
  const auto find = [&](const std::string& key, Problems& problems) -> const ConfigField* {
    for (const ConfigField& field : fields) {
      if (field.key == key) return &field;
    }
    const std::string meant = join(nearest_keys(key, names), " or ");
    problems.add(key + ": unknown key" + (meant.empty() ? "" : "; did you mean " + meant + "?"));
    return nullptr;
  };

  const char* hint = "`hla finetune --print-config` shows all keys";
  if (file) {
    Problems problems(file->string());
    const json content = read_json_file(*file, {.comments = true});
    if (!content.is_object()) {
      throw_bad_input(file->string() + ": expected a JSON object, got " + json_excerpt(content));
    }
    std::map<std::string, json> values;
    flatten(content, "", sections, values, problems);
    for (const auto& [key, value] : values) {
      const ConfigField* field = find(key, problems);
      if (field == nullptr) continue;
      set(*field, value, problems);
      resolved.origin[key] = file->string();
    }
    problems.throw_if_any(hint);
  }
  Problems problems("--set", ExitCode::kUsage);
  for (const std::string& assignment : assignments) {
    const size_t equals = assignment.find('=');
    if (equals == std::string::npos || equals == 0) {
      problems.add("expected KEY=VALUE, got " + assignment);
      continue;
    }
    const ConfigField* field = find(assignment.substr(0, equals), problems);
    if (field == nullptr) continue;
    set(*field, assigned_value(*field, assignment.substr(equals + 1)), problems);
    resolved.origin[field->key] = "--set";
  }
  problems.throw_if_any(hint);
  return resolved;
}

std::string to_commented_json(const ResolvedConfig& resolved) {
  FinetuneConfig config = resolved.config;
  const std::vector<ConfigField> fields = config_fields(config);
  std::string text = "{\n";
  std::string section;
  for (size_t i = 0; i < fields.size(); ++i) {
    const ConfigField& field = fields[i];
    const size_t dot = field.key.find('.');
    const std::string name = dot == std::string::npos ? field.key : field.key.substr(dot + 1);
    const std::string of = dot == std::string::npos ? "" : field.key.substr(0, dot);
    if (of != section) {
      if (!section.empty()) text += "  },\n";
      text += "  \"" + of + "\": {\n";
      section = of;
    }
    const std::string indent = section.empty() ? "  " : "    ";
    const bool last = i + 1 == fields.size() ||
                      (!section.empty() && !fields[i + 1].key.starts_with(section + "."));
    const bool names_choices = std::all_of(
        field.choices.begin(), field.choices.end(),
        [&](const std::string& choice) { return field.doc.find(choice) != std::string::npos; });
    text +=
        indent + "// " + field.doc + (names_choices ? "" : ": " + join(field.choices, ", ")) + "\n";
    const std::string& origin = resolved.origin.at(field.key);
    text += indent + "\"" + name + "\": " + field.value().dump() + (last ? "" : ",") +
            (origin == "default" ? "" : "  // " + origin) + "\n";
  }
  return text + (section.empty() ? "}\n" : "  }\n}\n");
}

json to_json(const ResolvedConfig& resolved) {
  FinetuneConfig config = resolved.config;
  json nested = json::object();
  for (const ConfigField& field : config_fields(config)) {
    const size_t dot = field.key.find('.');
    json& at = dot == std::string::npos ? nested : nested[field.key.substr(0, dot)];
    at[dot == std::string::npos ? field.key : field.key.substr(dot + 1)] = field.value();
  }
  return {{"config", std::move(nested)}, {"origin", resolved.origin}};
}

}  // namespace hla
