// What a conversion will make and take, known before it begins: `hla convert --dry-run`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/factorize/convert_options.h"
#include "hla/factorize/plan.h"
#include "hla/io/checkpoint.h"
#include "hla/model/config.h"

namespace hla {

struct ConversionEstimate {
  struct File {
    std::string name;
    uint64_t bytes = 0;
  };

  ConversionPlan plan;
  ModelConfig base;
  ModelConfig hla;           // planned_config
  int64_t element_size = 0;  // bytes of one cached number
  int64_t base_parameters = 0;
  int64_t hla_parameters = 0;
  int64_t calib_tokens = 0;
  std::vector<File> files;     // of weights
  uint64_t scratch_bytes = 0;  // beside them on disk while the conversion runs
  uint64_t peak_memory_bytes = 0;
  double seconds = 0;
  double gemm_flops = 0;  // per second: what `seconds` counts with
  int threads = 0;

  uint64_t disk_bytes() const;  // of the files
  nlohmann::json to_json() const;
  std::string to_text() const;
};

// Reads headers, and tokenises the calibration text; measures how fast this machine multiplies
// matrices. Writes nothing. Throws what convert() would throw for these arguments before its first
// step.
ConversionEstimate estimate_conversion(const Checkpoint& base, const std::filesystem::path& out,
                                       const ConvertOptions& options);

// The formulas, in docs/design.md. `tokens` of calibration, 0 without.
uint64_t estimated_peak_memory(const Checkpoint& base, const ModelConfig& hla,
                               const ConvertOptions& options, int64_t tokens);
// Floating-point operations, as many of fp32 products as would take the same time.
double estimated_work(const ModelConfig& hla, const ConvertOptions& options, int64_t tokens);

}  // namespace hla
