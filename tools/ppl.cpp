#include <cmath>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "hla/core/data_dir.h"
#include "hla/core/error.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/sha256.h"
#include "hla/core/version.h"
#include "hla/eval/perplexity.h"
#include "hla/io/mapped_file.h"
#include "hla/model/device.h"
#include "hla/text/tokenizer.h"
#include "hla/text/wikitext.h"
#include "options.h"

namespace hla::tools {
namespace {

struct PplArguments {
  std::string model;
  std::string text;
  std::string tokenizer;
  std::string json;
  bool force = false;
  PerplexityOptions scoring;
  DeviceOptions device;
};

nlohmann::json to_json(const PerplexityResult& result) {
  return {{"protocol", result.protocol},
          {"perplexity", result.perplexity},
          {"standard_error", result.standard_error},
          {"nll", result.nll},
          {"tokens_scored", result.tokens_scored},
          {"tokens", result.tokens},
          {"context", result.context},
          {"windows", result.windows.size()},
          {"window_indices", result.windows},
          {"window_nll", result.window_nll},
          {"total_windows", result.total_windows},
          {"seconds", result.seconds}};
}

void print(const std::string& model, const std::string& text, const PerplexityResult& result,
           const LlamaForCausalLM& loaded) {
  std::printf("model          %s\n", model.c_str());
  std::printf("text           %s (%lld tokens)\n", text.c_str(),
              static_cast<long long>(result.tokens));
  std::printf("protocol       %s, %zu of %lld windows of %lld tokens, %lld tokens scored\n",
              result.protocol.c_str(), result.windows.size(),
              static_cast<long long>(result.total_windows), static_cast<long long>(result.context),
              static_cast<long long>(result.tokens_scored));
  std::printf("device         %s, %s\n", loaded.device().str().c_str(),
              dtype_label(loaded.dtype()).c_str());
  std::printf("time           %.1f s, %.0f tokens/s, peak memory %s\n", result.seconds,
              static_cast<double>(result.tokens_scored) / result.seconds,
              format_bytes(peak_rss_bytes()).c_str());
  std::printf("perplexity     %.4f ± %.4f\n", result.perplexity, result.standard_error);
}

void run_ppl(const PplArguments& arguments) {
  check_json_target(arguments.json, arguments.force);
  const LoadOptions load = resolve(arguments.device);
  const Checkpoint checkpoint = Checkpoint::open(arguments.model);
  const std::filesystem::path text_path = arguments.text.empty()
                                              ? data_file("wikitext-2/wiki.test.raw")
                                              : std::filesystem::path(arguments.text);
  const auto file = MappedFile::open(text_path);
  if (file->size() == 0) throw_bad_input(text_path.string() + ": the text is empty");
  if (arguments.tokenizer.empty() && !checkpoint.tokenizer_path()) {
    throw_bad_input(checkpoint.path().string() + ": no tokenizer found\n  hint: --tokenizer PATH");
  }
  const auto tokenizer =
      load_tokenizer(arguments.tokenizer.empty() ? *checkpoint.tokenizer_path()
                                                 : std::filesystem::path(arguments.tokenizer));
  const std::vector<int32_t> ids = tokenizer->encode(join_hf_rows(file->text()));
  const auto model = load_model(checkpoint, load);
  const PerplexityResult result = gptq_perplexity(*model, ids, arguments.scoring);

  if (arguments.json != "-") print(arguments.model, text_path.string(), result, *model);
  if (!arguments.json.empty()) {
    nlohmann::json json = to_json(result);
    json["model"] = arguments.model;
    json["text"] = text_path.string();
    json["text_sha256"] = sha256_hex(file->text());
    json["tokenizer"] = tokenizer->kind();
    json["device"] = model->device().str();
    json["dtype"] = dtype_label(model->dtype());
    json["peak_rss_bytes"] = peak_rss_bytes();
    json["hla_version"] = version();
    json["hla_commit"] = version_commit();
    write_json_result(arguments.json, json, arguments.force);
  }
}

}  // namespace

void add_ppl(CLI::App& app) {
  auto arguments = std::make_shared<PplArguments>();
  CLI::App* command = app.add_subcommand("ppl", "Measures perplexity (protocol gptq)");
  command
      ->add_option("MODEL", arguments->model,
                   "Model folder, HF id in the local cache, or "
                   "llama2.c file")
      ->required();
  command->add_option("--text", arguments->text,
                      "Raw text file; default: the WikiText-2 raw test split");
  command->add_option("--tokenizer", arguments->tokenizer,
                      "Tokenizer folder or file; default: the model's own");
  command->add_option("--ctx", arguments->scoring.context, "Tokens per window")
      ->capture_default_str();
  command->add_option("--limit", arguments->scoring.limit, "Score only the first N windows");
  command->add_option("--windows", arguments->scoring.windows, "Score only these windows: 0,73,147")
      ->delimiter(',');
  command->add_option("--json", arguments->json, "Write the result to FILE as JSON; - for stdout");
  command->add_flag("--force", arguments->force, "Replace an existing --json file");
  add_device_options(*command, arguments->device);
  command->footer(
      "The text is read as the HF wikitext dataset gives it, tokenized once and cut into\n"
      "independent windows; all tokens but the first of each window are scored.\n\n"
      "Examples:\n"
      "  hla ppl models/SmolLM2-135M-Instruct\n"
      "  hla ppl models/SmolLM2-135M-Instruct --windows 0,73,147 --json base.json\n"
      "  hla ppl data/stories260K/stories260K.bin --text story.txt --ctx 256");
  command->callback([arguments] { run_ppl(*arguments); });
}

}  // namespace hla::tools
