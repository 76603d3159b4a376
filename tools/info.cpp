#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "hla/core/error.h"
#include "hla/io/json_file.h"
#include "hla/model/summary.h"

namespace hla::tools {
namespace {

struct InfoArguments {
  std::string path;
  bool json = false;
};

void run_info(const InfoArguments& arguments) {
  const ModelSummary summary = summarize(Checkpoint::open(arguments.path));
  std::cout << (arguments.json ? json_text(summary.to_json()) : summary.to_text());
  if (!summary.problems.empty()) {
    std::cout.flush();
    throw_bad_input(summary.path + ": the tensors do not fit config.json, see the problems listed");
  }
}

}  // namespace

void add_info(CLI::App& app) {
  auto arguments = std::make_shared<InfoArguments>();
  CLI::App* command =
      app.add_subcommand("info", "Describes a checkpoint: sizes, cache bytes, problems");
  command
      ->add_option("PATH", arguments->path,
                   "Model folder, HF id in the local cache, or "
                   "llama2.c file")
      ->required();
  command->add_flag("--json", arguments->json, "Print JSON");
  command->footer(
      "Of tensors it reads no data, but of a head that is tied to embeddings and stored beside "
      "them.\n"
      "Exit code 3 when the checkpoint has problems.\n\n"
      "Examples:\n"
      "  hla info models/SmolLM2-135M-Instruct\n"
      "  hla info HuggingFaceTB/SmolLM2-135M-Instruct --json\n"
      "  hla info data/stories260K/stories260K.bin");
  command->callback([arguments] { run_info(*arguments); });
}

}  // namespace hla::tools
