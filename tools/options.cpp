#include "options.h"

#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <thread>

#include "hla/core/error.h"
#include "hla/io/atomic_file.h"
#include "hla/io/checkpoint.h"
#include "hla/io/hub_cache.h"
#include "hla/io/json_file.h"
#include "hla/io/work_dir.h"
#include "hla/model/device.h"
#include "hla/text/corpus.h"

namespace hla::tools {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text + ",");
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

template <typename T>
std::optional<T> decimal_of(const std::string& text) {
  T number = 0;
  const char* end = text.data() + text.size();
  const auto [read, error] = std::from_chars(text.data(), end, number);
  return error == std::errc() && read == end ? std::optional(number) : std::nullopt;
}

std::optional<int64_t> integer_of(const std::string& text) { return decimal_of<int64_t>(text); }

CLI::Validator number_between(double least, double most) {
  return CLI::Validator(
      [least, most](std::string& text) {
        double number = 0;
        const bool is_number = CLI::detail::lexical_cast(text, number);
        if (!is_number || (number >= least && number <= most)) return std::string();
        std::ostringstream message;  // NaN, too
        message << "expected " << least << " to " << most << ", got " << text;
        return message.str();
      },
      "");
}

}  // namespace

void take_decimal_integers(CLI::App& command) {
  const auto take = []<typename T>(CLI::Option& option, const char* expected, T) {
    option.transform(CLI::Validator(
        [expected](std::string& text) {
          const std::optional<T> number = decimal_of<T>(text);
          if (!number) return std::string("expected ") + expected + ", got " + text;
          text = std::to_string(*number);  // without leading zeros
          return std::string();
        },
        ""));
  };
  for (CLI::Option* option : command.get_options()) {
    if (option->get_type_name() == "INT") {
      take(*option, "an integer", int64_t{});
    } else if (option->get_type_name() == "UINT") {
      take(*option, "an integer of at least 0", uint64_t{});
    }
  }
}

CLI::Option* add_report_option(CLI::App& command, const std::string& name, std::string& target,
                               const std::string& description) {
  return command.add_option(name, target, description)
      ->transform(CLI::Validator(
          [](std::string& text) {
            if (is_standard_output(text)) text = "-";
            return std::string();
          },
          ""));
}

CLI::Validator at_least(int64_t least) {
  return CLI::Validator(
      [least](std::string& text) {
        const std::optional<int64_t> number = integer_of(text);
        return number && *number < least
                   ? "expected at least " + std::to_string(least) + ", got " + text
                   : std::string();
      },
      "");
}

std::vector<CLI::Option*> add_decoder_options(CLI::App& command, DecoderOptions& target) {
  std::map<std::string, DecoderOptions::Attend> ways;
  for (const auto way : {DecoderOptions::Attend::kCheapest, DecoderOptions::Attend::kDecode,
                         DecoderOptions::Attend::kRebuild}) {
    ways.emplace(to_string(way), way);
  }
  CLI::Option* cache_dtype =
      command
          .add_option_function<std::string>(
              "--cache-dtype",
              [&target](const std::string& name) {
                target.cache_dtype = parse_dtype(name, "--cache-dtype");
              },
              "Of the caches: auto (as the model), fp32, bf16 or fp16")
          ->check(CLI::IsMember({"auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"}))
          ->default_str("auto");
  CLI::Option* attend =
      command
          .add_option_function<std::string>(
              "--attend",
              [ways, &target](const std::string& name) { target.attend = ways.at(name); },
              "How new tokens attend to the cache: decode (records are read as they are), rebuild "
              "(keys and values of all tokens are made anew) or cheapest, by products and, without "
              "the CPU's kernels, by how many operations have to be started")
          ->check(CLI::IsMember({"cheapest", "decode", "rebuild"}))
          ->default_str("cheapest");
  CLI::Option* absorb_error =
      command
          .add_option(
              "--absorb-error", target.absorb_error,
              "How far scores of cached keys that are not rebuilt may be off, relative to |q||k| "
              "of a frequency; 0: all such keys are rebuilt, which takes longer")
          ->check(number_between(0, 1))
          ->capture_default_str();
  CLI::Option* amplification =
      command
          .add_option(
              "--amplification", target.amplification,
              "How many times as much as latents the coordinates that HLA is decoded in may "
              "err where they are rounded: the more, the more of them are keys, which takes "
              "fewer products; 0: none")
          ->check(number_between(0, 1e6))
          ->default_str("50; 5 for caches of 16 bits, 0 for models of 16 bits or on a GPU");
  return {cache_dtype, attend, absorb_error, amplification};
}

CLI::Option* add_list_option(CLI::App& command, const std::string& name,
                             std::vector<std::string>& target, const std::string& description) {
  return command.add_option_function<std::string>(
      name, [&target](const std::string& text) { target = split(text); }, description);
}

CLI::Option* add_list_option(CLI::App& command, const std::string& name,
                             std::vector<int64_t>& target, const std::string& description) {
  return command.add_option_function<std::string>(
      name,
      [&target, name](const std::string& text) {
        target.clear();
        for (const std::string& part : split(text)) {
          const std::optional<int64_t> number = integer_of(part);
          if (!number) {
            throw CLI::ValidationError(name, "expected integers like 0,73,147, got " + text);
          }
          target.push_back(*number);
        }
      },
      description);
}

void add_dtype_option(CLI::App& command, std::string& target, const std::string& auto_dtype) {
  command.add_option("--dtype", target, "auto, fp32, bf16, fp16 or fp64; auto is " + auto_dtype)
      ->capture_default_str();
}

void add_threads_option(CLI::App& command, int& target) {
  command.add_option("--threads", target, "CPU threads; 0: one per core")
      ->check(at_least(0))
      ->check(CLI::Validator(
          [](std::string& text) {
            // Many more than processors only wait for each other.
            const int64_t most = std::max<int64_t>(64, 4 * std::thread::hardware_concurrency());
            const std::optional<int64_t> count = integer_of(text);
            return count && *count > most ? "expected at most " + std::to_string(most) +
                                                " on this machine, got " + text
                                          : std::string();
          },
          ""))
      ->capture_default_str();
}

void set_threads(int threads) {
  if (threads > 0) at::set_num_threads(threads);
}

void add_device_options(CLI::App& command, DeviceOptions& options, const std::string& auto_dtype) {
  command.add_option("--device", options.device, "auto, cpu, cuda or cuda:N")
      ->capture_default_str();
  add_dtype_option(command, options.dtype, auto_dtype);
  add_threads_option(command, options.threads);
}

void add_max_shard_size_option(CLI::App& command, uint64_t& target) {
  command.add_option("--max-shard-size", target, "Size of one file of weights, like 500MB or 2GB")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 62))
      ->default_str("5GB");
}

LoadOptions resolve(const DeviceOptions& options) {
  set_threads(options.threads);
  return {.device = parse_device(options.device), .dtype = parse_dtype(options.dtype)};
}

namespace {

// Where a file would come to lie.
std::string place_of(std::filesystem::path path) {
  std::error_code error;
  path = std::filesystem::absolute(path);
  while (!path.has_filename() && path.has_relative_path()) path = path.parent_path();  // "out/"
  return std::filesystem::weakly_canonical(path, error).string();
}

// Also what is read of inputs that are models (the folder of an id, a tokenizer beside a file) or
// datasets.
std::vector<std::string> with_files_of(std::vector<std::string> inputs) {
  const size_t given = inputs.size();
  for (size_t i = 0; i < given; ++i) {
    if (inputs[i].empty()) continue;
    try {
      for (const auto& file : corpus_files(inputs[i])) inputs.push_back(file.string());
      const auto path = resolve_model_path(inputs[i]);
      inputs.push_back(path.string());
      const auto tokenizer = Checkpoint::open(path.string()).tokenizer_path();
      if (tokenizer) inputs.push_back(tokenizer->string());
    } catch (const Error&) {  // neither; or it is refused when it is opened
    }
  }
  return inputs;
}

// Of one option, but for what it has to do with others.
void check_output_target(const std::string& option, const std::string& target, bool force,
                         const std::vector<std::string>& inputs) {
  if (target.empty() || target == "-" || is_standard_stream(target)) return;
  std::error_code error;
  const std::filesystem::path path(target);
  if (std::filesystem::is_directory(path, error)) {
    throw_usage("[" + option + "] " + target + " is a folder");
  }
  if (path.has_parent_path() && !std::filesystem::is_directory(path.parent_path(), error)) {
    throw_usage("[" + option + "] " + target + ": there is no folder " +
                path.parent_path().string());
  }
  // Before the work, not after it. What is no regular file is written straight to.
  const bool exists = std::filesystem::exists(path, error);
  if (!exists && std::filesystem::is_symlink(path, error)) {
    throw_usage("[" + option + "] " + target + " is a link to what is not there");
  }
  const std::filesystem::path folder = std::filesystem::path(place_of(path)).parent_path();
  if ((!exists || std::filesystem::is_regular_file(path, error)) &&
      ::access(folder.c_str(), W_OK | X_OK) != 0) {
    throw_runtime("[" + option + "] " + target + ": cannot write in " + folder.string() + ": " +
                  std::strerror(errno));
  }
  if (!std::filesystem::is_regular_file(target, error)) return;
  for (const std::string& input : with_files_of(inputs)) {
    if (input.empty() || !is_within(path, input)) continue;
    throw_usage("[" + option + "] " + target + " is " + (is_within(input, path) ? "" : "part of ") +
                "what is read; it is not replaced, even with --force");
  }
  if (!force) throw_usage("[" + option + "] " + target + " exists: use --force to replace it");
}

}  // namespace

void check_output_targets(const std::vector<std::pair<std::string, std::string>>& targets,
                          bool force, const std::vector<std::string>& inputs,
                          const std::string& folder) {
  std::vector<std::string> seen;
  if (!folder.empty()) seen.push_back(place_of(folder));
  for (const auto& [option, target] : targets) {
    check_output_target(option, target, force, inputs);
    if (target.empty()) continue;
    if (target == "-" && option != "--json" && option != "--csv") {
      throw_usage("[" + option + "] expected a file, got -");
    }
    const bool is_stream = target == "-" || is_standard_stream(target);
    const std::string place = is_stream ? target : place_of(target);
    if (!folder.empty() && is_within(target, folder)) {
      throw_usage("[" + option + "] " + target + " would lie in " + folder +
                  ", which is made anew\n  hint: another place for it");
    }
    if (std::find(seen.begin(), seen.end(), place) != seen.end()) {
      throw_usage("[" + option + "] expected a target of its own, got " + target +
                  " a second time");
    }
    seen.push_back(place);
  }
}

void write_json_result(const std::string& target, const nlohmann::json& value, bool force) {
  if (target == "-") {
    std::cout << json_text(value);
  } else {
    write_json_file(target, value, force);
  }
}

void write_text_result(const std::string& target, const std::string& text, bool force) {
  if (target == "-") {
    std::cout << text;
    return;
  }
  AtomicFile file(target, force);
  file.write(text);
  file.commit();
}

}  // namespace hla::tools
