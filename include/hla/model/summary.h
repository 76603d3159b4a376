// What `hla info` says of a checkpoint. Reads headers only, no tensor data.
#pragma once

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/io/checkpoint.h"
#include "hla/model/config.h"

namespace hla {

std::string rope_type_name(RopeType type);  // as in config.json

struct ModelSummary {
  std::string path;
  std::string kind;  // of the checkpoint: "HF folder", "llama2.c"
  ModelConfig config;
  int64_t parameters = 0;
  uint64_t weight_bytes = 0;
  int64_t tensor_count = 0;
  std::map<std::string, int64_t> elements_by_dtype;  // "F32" -> elements
  int64_t cache_element_bytes = 0;                   // of the stored dtype
  int64_t cache_bytes_per_token = 0;                 // as this model caches
  int64_t base_cache_bytes_per_token = 0;            // as plain Llama would
  std::string tokenizer;                             // path, or "" when there is none
  std::vector<std::string> problems;                 // missing, extra, mis-shaped tensors

  nlohmann::json to_json() const;
  std::string to_text() const;
};

// Throws kBadInput when config.json cannot be understood; problems of the tensors are listed.
ModelSummary summarize(const Checkpoint& checkpoint);

}  // namespace hla
