// Options that several subcommands share, declared once.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "hla/model/decoder.h"
#include "hla/model/load.h"

namespace hla::tools {

struct DeviceOptions {
  std::string device = "auto";
  std::string dtype = "auto";
  int threads = 0;  // 0: as many as LibTorch takes, one per core
};

// Refuses integers below `least`, saying so.
CLI::Validator at_least(int64_t least);

// Integers are decimal and within their range: CLI11 alone takes 010 for 8, and clamps. To be
// called when all options are registered.
void take_decimal_integers(CLI::App& command);

// Registers --json or --csv; however stdout is spelt, `target` is "-" then.
CLI::Option* add_report_option(CLI::App& command, const std::string& name, std::string& target,
                               const std::string& description);

// Registers --device, --dtype and --threads; `auto_dtype` says what the dtype is by default.
void add_device_options(
    CLI::App& command, DeviceOptions& options,
    const std::string& auto_dtype = "fp32 on the CPU and the checkpoint's own on CUDA");

// Registers --dtype alone, for parse_dtype().
void add_dtype_option(CLI::App& command, std::string& target, const std::string& auto_dtype);

// Registers --threads alone, for set_threads().
void add_threads_option(CLI::App& command, int& target);
void set_threads(int threads);

// Registers --max-shard-size.
void add_max_shard_size_option(CLI::App& command, uint64_t& target);

// Applies --threads and resolves device and dtype.
LoadOptions resolve(const DeviceOptions& options);

// Registers --cache-dtype, --attend, --absorb-error and --amplification.
std::vector<CLI::Option*> add_decoder_options(CLI::App& command, DecoderOptions& target);

// An option that takes a list in one argument, "a,b". (CLI11's own lists go on to take the
// positional that comes after them.)
CLI::Option* add_list_option(CLI::App& command, const std::string& name,
                             std::vector<std::string>& target, const std::string& description);
CLI::Option* add_list_option(CLI::App& command, const std::string& name,
                             std::vector<int64_t>& target, const std::string& description);

// Writes a result for machines: to stdout for "-", else to a file, which --force may replace.
// An existing file is refused before the work begins by check_output_targets.
void write_json_result(const std::string& target, const nlohmann::json& value, bool force);
void write_text_result(const std::string& target, const std::string& text, bool force);
// A file that is among `inputs` (files, folders, models and datasets), or in a folder of them, is
// not replaced even with force: it is read. No two options may name the same place, and none but
// --json and --csv stdout. Nor may one be `folder`, which the command makes, or in it.
void check_output_targets(const std::vector<std::pair<std::string, std::string>>& targets,
                          bool force, const std::vector<std::string>& inputs,
                          const std::string& folder = "");

}  // namespace hla::tools
