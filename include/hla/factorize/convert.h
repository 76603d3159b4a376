// `hla convert`: a Llama checkpoint becomes an HLA folder.
#pragma once

#include <filesystem>

#include "hla/factorize/conversion_report.h"
#include "hla/factorize/convert_options.h"
#include "hla/io/checkpoint.h"

namespace hla {

// Writes the complete folder `out` (config.json, model.safetensors or its shards, tokenizer,
// generation config, hla_report.json, README.md) or nothing. One layer is in memory at a time,
// beside the calibration's hidden states; Objective::kLoss first passes through all of them
// (LossCurvature). All factorisation in fp64.
ConvertReport convert(const Checkpoint& base, const std::filesystem::path& out,
                      const ConvertOptions& options);

}  // namespace hla
