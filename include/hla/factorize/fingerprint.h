// What decides the bytes of a conversion.
#pragma once

#include <ATen/core/Tensor.h>

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "hla/factorize/calibration.h"
#include "hla/factorize/convert_options.h"
#include "hla/factorize/plan.h"
#include "hla/io/checkpoint.h"

namespace hla {

// A checkpoint's files (name, size, time of the last change, tensors) and config.
nlohmann::json checkpoint_fingerprint(const Checkpoint& checkpoint);
// The program with its LibTorch, and the number of threads, the processor and the GPU, if the
// device is one, which decide how sums are rounded.
nlohmann::json program_fingerprint();
nlohmann::json machine_fingerprint(const at::Device& device);

// Equal only for conversions that give the same folder: the base's files (name, size, time of the
// last change, tensors) and config, the plan, the options, the calibration texts and
// the type of device and numbers they are computed with, program_fingerprint() and
// machine_fingerprint(). An unfinished conversion is gone on with only where it is equal.
nlohmann::json conversion_fingerprint(const Checkpoint& base, const ConvertOptions& options,
                                      const ConversionPlan& plan,
                                      const std::vector<CalibrationText>& texts);

}  // namespace hla
