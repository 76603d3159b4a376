#include "hla/train/finetune.h"

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "commands.h"
#include "hla/core/error.h"
#include "hla/core/memory.h"
#include "options.h"

namespace hla::tools {
namespace {

struct FinetuneArguments {
  std::string config;
  std::vector<std::string> assignments;
  bool print_config = false;
  std::string json;
  bool force = false;
  bool restart = false;
  DeviceOptions device;
};

void run_finetune(const FinetuneArguments& arguments) {
  const std::optional<std::filesystem::path> file =
      arguments.config.empty() ? std::nullopt
                               : std::optional<std::filesystem::path>(arguments.config);
  const ResolvedConfig config = resolve_config(file, arguments.assignments);
  if (arguments.print_config) {
    if (!arguments.json.empty()) throw_usage("[--json] has no effect with --print-config");
    std::cout << to_commented_json(config);
    return;
  }
  std::vector<std::string> inputs = config.config.data.train;
  inputs.insert(inputs.end(), {config.config.model, config.config.distill.teacher,
                               config.config.data.valid, arguments.config});
  check_output_targets({{"--json", arguments.json}}, arguments.force, inputs, config.config.output);
  keep_freed_memory();  // every step takes the same
  const FinetuneReport report = finetune(
      config,
      {.load = resolve(arguments.device), .force = arguments.force, .restart = arguments.restart});
  if (arguments.json != "-") std::cout << report.to_text(config.config);
  if (!arguments.json.empty()) {
    write_json_result(arguments.json, report.to_json(config), arguments.force);
  }
}

}  // namespace

void add_finetune(CLI::App& app) {
  auto arguments = std::make_shared<FinetuneArguments>();
  CLI::App* command = app.add_subcommand("finetune", "Tunes a model, Llama or HLA, on text");
  command->add_option("--config", arguments->config,
                      "JSON file, comments allowed; what it leaves out has its default");
  command
      ->add_option_function<std::string>(
          "--set", [arguments](const std::string& text) { arguments->assignments.push_back(text); },
          "KEY=VALUE over the config, e.g. optimizer.learning_rate=1e-4; lists: a,b or "
          "[\"one, with a comma\"]; may be given several times")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->trigger_on_parse();
  command->add_flag("--print-config", arguments->print_config,
                    "Show every key with its documentation and value, and stop");
  add_device_options(*command, arguments->device);
  add_report_option(*command, "--json", arguments->json,
                    "Write the results to FILE as JSON; - for stdout");
  command->add_flag("--force", arguments->force, "Replace existing outputs");
  command->add_flag("--restart", arguments->restart,
                    "Begin anew instead of going on with an unfinished run");
  command->footer(
      "A run that was killed or interrupted goes on when the same command is given again, and ends "
      "with the same\nweights (on a GPU as far as its operations are deterministic); until then it "
      "lies in\n.OUTPUT.hla-partial.\n\n"
      "Examples:\n"
      "  hla finetune --print-config\n"
      "  hla finetune --config configs/stories260K-smoke.json\n"
      "  hla finetune --set model=models/latent-50 --set output=models/latent-50-tuned \\\n"
      "      --set data.train=text.jsonl --set data.valid=held-out.jsonl");
  command->callback([arguments] { run_finetune(*arguments); });
}

}  // namespace hla::tools
