#include "hla/factorize/model_card.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "hla/core/text_table.h"

namespace hla {
namespace {

const char* rope_text(const std::string& rope) {
  if (rope == "original") {
    return "The latents are cached unrotated; keys are rebuilt from them and rotated by the "
           "ordinary RoPE.";
  }
  if (rope == "latent") {
    return "Fast frequencies are cached as exact complex latents, rotated in the latent space; "
           "slow frequencies share one unrotated latent with the values.";
  }
  return "The construction of sodabreak/MHA2HLA: real latents rotated in pairs. It does not equal "
         "the pretrained RoPE and needs fine-tuning before it is of use.";
}

// How transformers runs the folder.
constexpr const char* kUse = R"(## Use

With transformers; `trust_remote_code` runs `modeling_hla.py` of this folder.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

With `hla`: `hla ppl <this folder>` measures it, `hla info <this folder>` describes it.

)";

std::string objective_text(const nlohmann::json& report) {
  if (report["rope"] == "paper") return "The factors are a plain SVD of the weights.";
  if (report["objective"] == "loss") {
    return "The factors keep small what the model's loss feels of an error in keys and values.";
  }
  return "Keys weighted by `" + report["key_weighting"].get<std::string>() + "`, values by `" +
         report["value_weighting"].get<std::string>() + "`.";
}

}  // namespace

std::string model_card(const nlohmann::json& report) {
  const auto rope = report["rope"].get<std::string>();
  const auto& calibration = report["calibration"];
  std::string card;
  card +=
      "---\nlibrary_name: transformers\ntags:\n- custom_code\n- llama\n- hla\n- low-rank\n- "
      "kv-cache\n---\n\n";
  card += "# A Llama model converted to HLA (low-rank latent attention)\n\n";
  card += "Made by `hla convert` " + report["hla_version"].get<std::string>() + " (commit " +
          report["hla_commit"].get<std::string>() + ").";
  if (report["base_name_or_path"].is_string()) {
    card += " Base model: `" + report["base_name_or_path"].get<std::string>() + "`.";
  }
  card += " The base model's licence applies.\n\n";
  card += "| | base | this model |\n|---|---|---|\n";
  card += "| cache bytes per token | " + report["base_cache_bytes_per_token"].dump() + " | " +
          report["cache_bytes_per_token"].dump() + " (" +
          percent(report["cache_ratio"].get<double>(), 1) + ") |\n";
  card += "| parameters | " + report["base_parameters"].dump() + " | " +
          report["parameters"].dump() + " |\n\n";
  card += "`rope: " + rope + "`. " + rope_text(rope) + "\n\n";
  card += "Calibration: " + calibration["text"].get<std::string>() + ", " +
          calibration["tokens"].dump() + " tokens. " + objective_text(report) +
          (report["refit_output"].get<bool>() ? " W_o is fitted to what is left of them." : "") +
          "\n\n";
  card += kUse;
  card +=
      "## Layers\n\nErrors are relative: of keys and values in the norm that was minimised, of the "
      "attention output on the calibration text.\n\n";
  card += "| layer | cached floats | key error | value error | attention output |\n";
  card += "|---|---|---|---|---|\n";
  for (const auto& layer : report["layers"]) {
    card += "| " + layer["layer"].dump() + " | " + layer["cache_floats"].dump() + " | " +
            percent(layer["key_error"].get<double>(), 1) + " | " +
            percent(layer["value_error"].get<double>(), 1) + " | ";
    const auto& attention = layer["attention_output_error"];
    card += (attention.is_null() ? "" : percent(attention.get<double>(), 1) + " ") + "|\n";
  }
  return card;
}

}  // namespace hla
