#include "hla/factorize/transfer.h"

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "hla/model/device.h"
#include "options.h"

namespace hla::tools {
namespace {

struct TransferArguments {
  std::string conversion;
  std::string base;
  std::string tuned;
  std::string out;
  std::string json;
  std::string dtype = "auto";
  int threads = 0;
  TransferOptions options;
};

void run_transfer(TransferArguments& arguments) {
  check_output_targets({{"--json", arguments.json}}, arguments.options.force,
                       {arguments.conversion, arguments.base, arguments.tuned}, arguments.out);
  set_threads(arguments.threads);
  arguments.options.dtype = parse_dtype(arguments.dtype);
  const TransferReport report =
      transfer(Checkpoint::open(arguments.conversion), Checkpoint::open(arguments.base),
               Checkpoint::open(arguments.tuned), arguments.out, arguments.options);
  if (arguments.json != "-") {
    std::cout << "transferred    " << arguments.tuned << " -> " << arguments.out << '\n'
              << report.to_text();
  }
  if (!arguments.json.empty()) {
    write_json_result(arguments.json, report.to_json(), arguments.options.force);
  }
}

}  // namespace

void add_transfer(CLI::App& app) {
  auto arguments = std::make_shared<TransferArguments>();
  CLI::App* command =
      app.add_subcommand("transfer", "Carries a fine-tune of a model over to its conversion");
  command
      ->add_option("CONVERSION", arguments->conversion,
                   "HLA folder that hla convert made of BASE, as it is or healed since")
      ->required();
  command->add_option("BASE", arguments->base, "The model that it was made of")->required();
  command->add_option("TUNED", arguments->tuned, "A fine-tune of BASE")->required();
  command->add_option("OUT", arguments->out, "Folder to make: TUNED as CONVERSION is of BASE")
      ->required();
  add_report_option(*command, "--json", arguments->json,
                    "Write the report to FILE as JSON; - for stdout");
  add_dtype_option(*command, arguments->dtype, "CONVERSION's for attention, TUNED's for the rest");
  add_threads_option(*command, arguments->threads);
  add_max_shard_size_option(*command, arguments->options.max_shard_bytes);
  command->add_flag("--restart", arguments->options.restart,
                    "Throw away what an unfinished run of another command has left for OUT");
  command->add_flag("--force", arguments->options.force,
                    "Replace an existing OUT (or --json file)");
  command->footer(
      "No text is read and nothing is trained: TUNED - BASE is added to CONVERSION's weights, and "
      "its factors\ntake what they can of it. What has healed CONVERSION is kept for the most "
      "part.\n\n"
      "Examples:\n"
      "  hla transfer models/original-25-healed models/SmolLM2-135M-Instruct "
      "models/SmolLM2-135M-Instruct-tuned \\\n      models/tuned-25\n"
      "  hla transfer healed org/base org/base-instruct out --json -");
  command->callback([arguments] { run_transfer(*arguments); });
}

}  // namespace hla::tools
