#include "hla/eval/generate.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "commands.h"
#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/standard_input.h"
#include "hla/io/mapped_file.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"
#include "hla/text/chat.h"
#include "hla/text/unicode.h"
#include "options.h"

namespace hla::tools {
namespace {

struct GenerateArguments {
  std::string model;
  std::optional<std::string> prompt;
  std::string prompts;
  bool chat = false;
  std::optional<std::string> system;
  bool echo = false;
  bool stream = false;
  bool ignore_eos = false;
  DecoderOptions decoder;
  GenerateOptions generate;
  DeviceOptions device;
  std::string json;
  bool force = false;
};

void require_utf8(const std::string& prompt, const std::string& name) {
  if (!is_valid_utf8(prompt)) throw_bad_input(name + ": expected UTF-8, got other bytes");
}

// One prompt a line; of a *.jsonl file a JSON string, or an object with "prompt".
std::vector<std::string> read_prompts(const std::string& path) {
  const bool json_lines = path.ends_with(".jsonl");
  std::istringstream lines{std::string(MappedFile::open(path)->text())};
  std::vector<std::string> prompts;
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
    if (number == 1 && line.starts_with(kByteOrderMark)) line.erase(0, kByteOrderMark.size());
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty()) continue;
    require_utf8(line, path + ", line " + std::to_string(number));
    if (!json_lines) {
      prompts.push_back(line);
      continue;
    }
    const nlohmann::json value = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const nlohmann::json text = value.is_object() ? value.value("prompt", nlohmann::json()) : value;
    if (!text.is_string()) {
      throw_bad_input(path + ", line " + std::to_string(number) +
                      ": expected a JSON string or an object with \"prompt\"");
    }
    prompts.push_back(text.get<std::string>());
  }
  if (prompts.empty()) throw_bad_input(path + ": expected a prompt a line, got none");
  return prompts;
}

std::vector<std::string> prompts_of(const GenerateArguments& arguments) {
  if (!arguments.prompts.empty()) return read_prompts(arguments.prompts);
  if (arguments.prompt) {
    require_utf8(*arguments.prompt, "[--prompt]");
    return {*arguments.prompt};
  }
  std::string prompt = read_standard_input();
  if (prompt.ends_with('\n')) prompt.pop_back();  // as of `echo`
  require_utf8(prompt, "stdin");
  return {std::move(prompt)};
}

double per_second(int64_t count, double seconds) {
  return seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

nlohmann::json to_json(const GenerateReport& report, const std::vector<std::string>& prompts,
                       const GenerateArguments& arguments, uint64_t peak_bytes) {
  nlohmann::json list = nlohmann::json::array();
  for (size_t i = 0; i < prompts.size(); ++i) {
    const Continuation& continuation = report.continuations[i];
    list.push_back({{"prompt", prompts[i]},
                    {"text", continuation.text},
                    {"ids", continuation.ids},
                    {"stopped_by", to_string(continuation.reason)}});
  }
  const SamplingOptions& sampling = arguments.generate.sampling;
  return {{"model", arguments.model},
          {"partial", report.partial},
          {"device", report.device},
          {"dtype", report.dtype},
          {"cache_dtype", report.cache_dtype},
          {"sampling",
           {{"temperature", sampling.temperature},
            {"top_k", sampling.top_k},
            {"top_p", sampling.top_p},
            {"min_p", sampling.min_p},
            {"repetition_penalty", sampling.repetition_penalty},
            {"seed", sampling.seed}}},
          {"continuations", list},
          {"prompt_tokens", report.prompt_tokens},
          {"prompt_tokens_per_second", per_second(report.prompt_tokens, report.prompt_seconds)},
          {"decoded_tokens", report.step_tokens},
          {"decoded_tokens_per_second", per_second(report.step_tokens, report.step_seconds)},
          {"cache_bytes", report.cache_bytes},
          {"peak_rss_bytes", peak_bytes}};
}

std::string statistics(const GenerateReport& report, uint64_t peak_bytes) {
  char line[256];
  std::snprintf(line, sizeof line,
                "prompts %lld tokens, %.1f tokens/s; then %lld tokens, %.1f tokens/s; cache %s, "
                "peak memory %s",
                static_cast<long long>(report.prompt_tokens),
                per_second(report.prompt_tokens, report.prompt_seconds),
                static_cast<long long>(report.step_tokens),
                per_second(report.step_tokens, report.step_seconds),
                format_bytes(report.cache_bytes).c_str(), format_bytes(peak_bytes).c_str());
  return line;
}

// A chat template's text that was written out often begins with one.
void warn_of_two_bos(const std::vector<std::vector<int32_t>>& prompts, const Tokenizer& tokenizer) {
  const std::optional<int32_t> bos = tokenizer.bos_id();
  for (size_t i = 0; i < prompts.size(); ++i) {
    const std::vector<int32_t>& ids = prompts[i];
    if (ids.size() < 2 || ids[0] != bos || ids[1] != bos) continue;
    log_warning("prompt " + std::to_string(i + 1) + " begins with " + tokenizer.id_to_token(*bos) +
                ", which the tokenizer puts in front, too: the model gets two");
    return;
  }
}

void run_generate(const GenerateArguments& arguments) {
  check_output_targets({{"--json", arguments.json}}, arguments.force,
                       {arguments.model, arguments.prompts});
  if (arguments.stream && arguments.json == "-") {
    throw_usage("--stream and --json - exclude each other: both are for stdout");
  }
  if (arguments.echo && arguments.json == "-") {
    throw_usage("[--echo] has no effect with --json -, which has the prompts");
  }
  validate(arguments.generate.sampling);
  const std::vector<std::string> prompts = prompts_of(arguments);
  if (arguments.system) require_utf8(*arguments.system, "[--system]");
  if (arguments.stream && prompts.size() > 1) {
    throw_usage("--stream shows one continuation as it comes: give one prompt");
  }
  const Checkpoint checkpoint = Checkpoint::open(arguments.model);
  if (!checkpoint.tokenizer_path()) throw_bad_input(arguments.model + ": has no tokenizer");
  const auto tokenizer = load_tokenizer(*checkpoint.tokenizer_path());
  GenerateOptions options = arguments.generate;
  if (!arguments.ignore_eos) options.end_of_text = end_of_text_ids(checkpoint, *tokenizer);
  std::vector<std::vector<int32_t>> ids;
  if (arguments.chat) {
    const ChatTemplate chat = ChatTemplate::load(checkpoint.path());
    chat.check(*tokenizer, *checkpoint.tokenizer_path());
    for (const std::string& prompt : prompts) {
      ids.push_back(tokenizer->encode(chat.prompt(prompt, arguments.system),
                                      /*add_special_tokens=*/false));
    }
  } else {
    for (const std::string& prompt : prompts) ids.push_back(tokenizer->encode(prompt));
    warn_of_two_bos(ids, *tokenizer);
  }
  const ModelConfig config = parse_model_config(checkpoint.config(), checkpoint.path().string());
  const auto model = load_model(checkpoint, resolve(arguments.device));
  DecoderOptions decoding = arguments.decoder;
  const bool goes_beyond = decoding.max_length > 0;
  const int64_t limit = goes_beyond ? decoding.max_length : config.max_position_embeddings;
  decoding.max_length = longest_sequence(ids, options, limit);
  const Decoder decoder(*model, decoding);

  const bool to_stdout = arguments.json == "-";
  OnText on_text;
  if (arguments.stream && !to_stdout) {
    if (arguments.echo) std::cout << prompts[0];
    on_text = [&arguments](size_t, std::string_view text) {
      std::cout << text << std::flush;
      // Nobody reads on, but --json may be waited for.
      if (!std::cout && arguments.json.empty()) throw_runtime("stdout: write failed");
    };
  }
  const GenerateReport report = generate(decoder, *tokenizer, ids, options, on_text);
  const uint64_t peak_bytes = peak_memory_bytes(model->device());
  if (arguments.stream && !to_stdout) std::cout << "\n";
  for (size_t i = 0; i < prompts.size() && !arguments.stream && !to_stdout; ++i) {
    if (prompts.size() > 1) std::cout << (i == 0 ? "" : "\n") << "--- " << i + 1 << "\n";
    std::cout << (arguments.echo ? prompts[i] : "") << report.continuations[i].text << "\n";
  }
  if (!arguments.json.empty()) {
    write_json_result(arguments.json, to_json(report, prompts, arguments, peak_bytes),
                      arguments.force);
  }
  std::cout.flush();
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (report.continuations[i].reason != StopReason::kMaxLength) continue;
    log_info("prompt " + std::to_string(i + 1) + ": ended at " + std::to_string(limit) +
             " tokens, the longest sequence (" +
             (goes_beyond ? "--max-length" : "max_position_embeddings; --max-length goes beyond") +
             ")");
  }
  log_info(statistics(report, peak_bytes));
  if (report.partial) throw_if_interrupted();
}

}  // namespace

void add_generate(CLI::App& app) {
  auto arguments = std::make_shared<GenerateArguments>();
  CLI::App* command = app.add_subcommand("generate", "Continues prompts");
  command
      ->add_option("MODEL", arguments->model,
                   "Model folder, HF id in the local cache, or llama2.c file")
      ->required();
  CLI::Option* prompt =
      command->add_option("--prompt", arguments->prompt,
                          "Text to continue; default: stdin, without a line end at its end");
  command
      ->add_option("--prompts", arguments->prompts,
                   "File with a prompt a line, continued in one batch; *.jsonl: a JSON string a "
                   "line, or an object with \"prompt\"")
      ->excludes(prompt);
  CLI::Option* chat = command->add_flag("--chat", arguments->chat,
                                        "The prompt is a message: put it into the model's chat "
                                        "template, of ChatML's kind (others are "
                                        "refused)");
  command->add_option("--system", arguments->system, "System message instead of the template's own")
      ->needs(chat);
  command->add_flag("--echo", arguments->echo, "Print the prompt before its continuation");
  command->add_flag("--stream", arguments->stream, "Print text as it comes");

  GenerateOptions& generate = arguments->generate;
  SamplingOptions& sampling = generate.sampling;
  const char* group = "When to stop";
  command->add_option("-n,--max-new-tokens", generate.max_new_tokens, "Tokens per prompt, at most")
      ->check(at_least(0))
      ->capture_default_str()
      ->group(group);
  command
      ->add_option_function<std::string>(
          "--stop", [&generate](const std::string& text) { generate.stop.push_back(text); },
          "Stop before this text; may be given several times")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->trigger_on_parse()
      ->group(group);
  command->add_flag("--ignore-eos", arguments->ignore_eos, "Go on after an end-of-text token")
      ->group(group);
  command
      ->add_option(
          "--max-length", arguments->decoder.max_length,
          "Longest sequence, prompt included; default: the model's "
          "max_position_embeddings, beyond which it was not trained. (Where RoPE is scaled "
          "by length, \"dynamic\" and \"longrope\", it is by the longest that a batch can reach)")
      ->check(at_least(1))
      ->group(group);
  group = "Sampling";
  CLI::Option* temperature =
      command
          ->add_option("--temperature", sampling.temperature,
                       "0: always the likeliest token (greedy), and no top-k, top-p or min-p")
          ->capture_default_str()
          ->group(group);
  command->add_option("--top-k", sampling.top_k, "Of the K likeliest tokens only; 0: all")
      ->needs(temperature)
      ->capture_default_str()
      ->group(group);
  command->add_option("--top-p", sampling.top_p, "Of the fewest likeliest that have probability P")
      ->needs(temperature)
      ->capture_default_str()
      ->group(group);
  command
      ->add_option("--min-p", sampling.min_p,
                   "Of those at least P times as probable as the likeliest")
      ->needs(temperature)
      ->capture_default_str()
      ->group(group);
  command
      ->add_option("--repetition-penalty", sampling.repetition_penalty,
                   "Above 1: tokens that were there already become less likely")
      ->capture_default_str()
      ->group(group);
  command->add_option("--seed", sampling.seed, "Of the random numbers")
      ->needs(temperature)
      ->capture_default_str()
      ->group(group);

  add_device_options(*command, arguments->device);
  add_decoder_options(*command, arguments->decoder);
  add_report_option(*command, "--json", arguments->json,
                    "Write the results to FILE as JSON; - for stdout");
  command->add_flag("--force", arguments->force, "Replace an existing output file");
  command->footer(
      "Sampling applies, in this order: repetition penalty, temperature, top-k, top-p, min-p.\n\n"
      "Examples:\n"
      "  hla generate models/SmolLM2-135M-Instruct --prompt 'The capital of France is' -n 20\n"
      "  hla generate models/latent-50 --chat --prompt 'What is gravity?' --stream\n"
      "  hla generate models/latent-50 --prompts prompts.txt --temperature 0.8 --top-p 0.95 --seed "
      "1\n"
      "  hla generate data/stories260K/stories260K.bin --prompt 'Once upon a time' --json -");
  command->callback([arguments] { run_generate(*arguments); });
}

}  // namespace hla::tools
