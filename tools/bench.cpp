#include "hla/eval/bench.h"

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "hla/core/error.h"
#include "hla/io/svg_plot.h"
#include "hla/model/device.h"
#include "options.h"

namespace hla::tools {
namespace {

struct BenchArguments {
  BenchOptions bench;
  std::string json;
  std::string csv;
  std::string plot;
  bool force = false;
  DeviceOptions device;
};

void run_bench(const BenchArguments& arguments) {
  check_output_targets(
      {{"--json", arguments.json}, {"--csv", arguments.csv}, {"--plot", arguments.plot}},
      arguments.force, arguments.bench.models);
  BenchOptions options = arguments.bench;
  if (!arguments.plot.empty() && options.generated_tokens == 0) {
    throw_usage("[--plot] draws decoding, and -n 0 has none");
  }
  options.load = [&arguments] { return resolve(arguments.device); };
  const BenchReport report = bench(options);
  if (arguments.json != "-" && arguments.csv != "-") std::cout << report.to_markdown();
  if (!arguments.json.empty()) {
    write_json_result(arguments.json, report.to_json(), arguments.force);
  }
  if (!arguments.csv.empty()) write_text_result(arguments.csv, report.to_csv(), arguments.force);
  if (!arguments.plot.empty()) write_svg_file(arguments.plot, report.to_plot(), arguments.force);
  if (report.failure) std::rethrow_exception(report.failure);
}

}  // namespace

void add_bench(CLI::App& app) {
  auto arguments = std::make_shared<BenchArguments>();
  BenchOptions& bench = arguments->bench;
  CLI::App* command =
      app.add_subcommand("bench", "Measures speed and memory of models side by side");
  command
      ->add_option("MODEL", bench.models,
                   "Model folders, HF ids in the local cache, or llama2.c files; the others are "
                   "compared with the first")
      ->required();
  command
      ->add_option("-p,--prompt-tokens", bench.prompt_tokens, "Tokens of a prompt; 0: no such test")
      ->check(at_least(0))
      ->capture_default_str();
  command
      ->add_option("-n,--generated-tokens", bench.generated_tokens,
                   "Tokens decoded of every sequence; 0: no such test")
      ->check(at_least(0))
      ->capture_default_str();
  add_list_option(*command, "-d,--depth", bench.depths,
                  "Tokens in the cache before a test; several: 0,2048,8192; default 0");
  add_list_option(*command, "-b,--batch", bench.batches,
                  "Sequences decoded at once; several: 1,4; default 1");
  command->add_option("-r,--repetitions", bench.repetitions, "Of every test")
      ->check(at_least(1))
      ->capture_default_str();
  add_decoder_options(*command, bench.decoder);
  add_device_options(*command, arguments->device);
  add_report_option(*command, "--json", arguments->json,
                    "Write the results to FILE as JSON; - for stdout");
  add_report_option(*command, "--csv", arguments->csv,
                    "Write every repetition to FILE as CSV; - for stdout");
  command->add_option("--plot", arguments->plot, "Draw tokens/s against depth into FILE.svg");
  command->add_flag("--force", arguments->force, "Replace existing output files");
  command->footer(
      "Every model runs in a process of its own, and they take turns of a prompt or a few steps; "
      "\"to the first\" is\nthe median over the turns. \"bound\" is the speed-up that memory "
      "traffic allows, (weights + cached records) of\nthe first model over the row's; \"share\" "
      "is how much of it was reached, (speed-up - 1) / (bound - 1). \"memory\"\nand \"peak\" "
      "are resident (on a GPU: held by LibTorch), at the end of the test and at most during it. "
      "Positions beyond the\nmodel's max_position_embeddings are timed as any others.\n\n"
      "Examples:\n"
      "  hla bench models/SmolLM2-135M-Instruct models/latent-50\n"
      "  hla bench models/SmolLM2-135M-Instruct models/latent-50 -d 0,2048,8192 -b 1,4 --plot "
      "speed.svg\n"
      "  hla bench models/latent-50 -p 2048 -n 0 --json -");
  command->callback([arguments] { run_bench(*arguments); });
}

}  // namespace hla::tools
