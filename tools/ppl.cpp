#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "hla/core/data_dir.h"
#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/eval/evaluation.h"
#include "hla/io/svg_plot.h"
#include "hla/model/device.h"
#include "hla/text/corpus.h"
#include "options.h"

namespace hla::tools {
namespace {

struct PplArguments {
  EvaluationOptions evaluation;
  std::string reference;
  std::string reference_dtype = "auto";
  std::string tokenizer;
  // The text.
  std::string text;
  std::string dataset;
  std::string split;
  CorpusOptions corpus;
  // The protocols.
  std::vector<std::string> protocols = {"gptq"};
  bool all_protocols = false;
  ProtocolOptions windows;
  // The reports.
  std::string json;
  std::string csv;
  std::string plot;
  bool force = false;
  DeviceOptions device;
};

std::string dataset_of(const PplArguments& arguments) {
  return arguments.dataset.empty() ? "wikitext-2-raw" : arguments.dataset;
}

Corpus load_corpus(const PplArguments& arguments) {
  if (!arguments.text.empty()) return read_corpus(arguments.text, arguments.corpus);
  return load_dataset(dataset_of(arguments), arguments.split, arguments.corpus);
}

EvaluationOptions evaluation_options(const PplArguments& arguments) {
  EvaluationOptions options = arguments.evaluation;
  options.load = resolve(arguments.device);
  if (!arguments.reference.empty()) options.reference = arguments.reference;
  options.reference_dtype = parse_dtype(arguments.reference_dtype, "--reference-dtype");
  if (!arguments.tokenizer.empty()) options.tokenizer = arguments.tokenizer;
  std::vector<Protocol> protocols = all_protocols();
  if (!arguments.all_protocols) {
    protocols.clear();
    for (const std::string& name : arguments.protocols) {
      protocols.push_back(protocol_from_string(name));
    }
  }
  const bool strided =
      std::find(protocols.begin(), protocols.end(), Protocol::kHfStride) != protocols.end();
  if (arguments.windows.stride && !strided) {
    throw_usage("[--stride] is of protocol hf-stride only");
  }
  for (const Protocol protocol : protocols) {
    if (std::count(protocols.begin(), protocols.end(), protocol) > 1) {
      throw_usage("[--protocol] expected each once, got " + to_string(protocol) + " twice");
    }
    options.protocols.push_back(arguments.windows);
    options.protocols.back().protocol = protocol;
  }
  return options;
}

void run_ppl(const PplArguments& arguments) {
  std::vector<std::string> inputs = arguments.evaluation.models;
  inputs.insert(inputs.end(), {arguments.reference, arguments.text, arguments.tokenizer});
  if (arguments.text.empty()) {
    inputs.push_back(dataset_of(arguments) +
                     (arguments.split.empty() ? "" : ":" + arguments.split));
  }
  check_output_targets(
      {{"--json", arguments.json}, {"--csv", arguments.csv}, {"--plot", arguments.plot}},
      arguments.force, inputs);
  const EvaluationOptions options = evaluation_options(arguments);
  const Corpus corpus = load_corpus(arguments);
  if (corpus.kind == Corpus::Kind::kText && arguments.corpus.max_documents) {
    throw_usage("[--documents] " + corpus.name + " is one text, not documents; use --limit");
  }
  if (corpus.format == "text" && arguments.corpus.text_field != CorpusOptions().text_field) {
    throw_usage("[--text-field] " + corpus.name + " is plain text, which has no fields");
  }
  const Evaluation result = evaluate(corpus, options);
  if (result.models.empty()) throw_if_interrupted();

  if (arguments.json != "-" && arguments.csv != "-") std::cout << result.to_text();
  if (!arguments.json.empty()) {
    write_json_result(arguments.json, result.to_json(), arguments.force);
  }
  if (!arguments.csv.empty()) write_text_result(arguments.csv, result.to_csv(), arguments.force);
  if (!arguments.plot.empty()) write_svg_file(arguments.plot, result.to_plot(), arguments.force);
  std::cout.flush();
  if (result.failure) std::rethrow_exception(result.failure);
  throw_if_interrupted();
}

}  // namespace

void add_ppl(CLI::App& app) {
  auto arguments = std::make_shared<PplArguments>();
  CLI::App* command =
      app.add_subcommand("ppl", "Measures perplexity, as several well-known tools do");
  command
      ->add_option("MODEL", arguments->evaluation.models,
                   "Model folders, HF ids in the local cache, or llama2.c files")
      ->required();
  command->add_option("--reference", arguments->reference,
                      "A teacher to compare with: KL divergence, same top-1, paired ratio");
  command
      ->add_option("--reference-dtype", arguments->reference_dtype,
                   "Of the teacher: auto (as --dtype), fp32, bf16, fp16 or fp64")
      ->capture_default_str();

  std::string names;
  for (const std::string& name : dataset_names()) names += (names.empty() ? "" : ", ") + name;
  CLI::Option* text =
      command
          ->add_option("--text", arguments->text,
                       "Text file, .jsonl, .parquet, or a folder of them; default: WikiText-2 raw")
          ->group("Text");
  CLI::Option* dataset = command
                             ->add_option("--dataset", arguments->dataset,
                                          "Known dataset, in the local HF cache or data/: " + names)
                             ->group("Text");
  CLI::Option* split =
      command
          ->add_option("--split", arguments->split,
                       "train, validation or test; default: test, or the only one there is")
          ->group("Text");
  text->excludes(dataset)->excludes(split);
  command
      ->add_option("--text-field", arguments->corpus.text_field,
                   "Field of JSONL objects, column of Parquet files")
      ->capture_default_str()
      ->group("Text");
  command
      ->add_option("--documents", arguments->corpus.max_documents,
                   "Read only the first N documents of JSONL or Parquet; fineweb: 1000")
      ->group("Text");
  command
      ->add_option("--tokenizer", arguments->tokenizer,
                   "Tokenizer folder or file; default: each model's own")
      ->group("Text");

  CLI::Option* protocol =
      add_list_option(*command, "--protocol", arguments->protocols,
                      "gptq (default), lm-eval, hf-stride, llama.cpp; several: gptq,lm-eval")
          ->group("Protocol");
  command->add_flag("--all-protocols", arguments->all_protocols, "All four, in one pass")
      ->excludes(protocol)
      ->group("Protocol");
  command
      ->add_option("--ctx", arguments->windows.context,
                   "Tokens per window; default: the protocol's own")
      ->group("Protocol");
  command
      ->add_option("--stride", arguments->windows.stride,
                   "hf-stride: tokens from window to window; default 512, at most the context")
      ->group("Protocol");
  CLI::Option* limit = command
                           ->add_option("--limit", arguments->windows.limit,
                                        "Only the first N windows (lm-eval: pages)")
                           ->group("Protocol");
  add_list_option(*command, "--windows", arguments->windows.windows,
                  "Only these windows: 0,73,147; not for lm-eval")
      ->excludes(limit)
      ->group("Protocol");

  ScoreOptions& scoring = arguments->evaluation.scoring;
  CLI::Option* decode =
      command
          ->add_option("--decode", scoring.decode_tokens,
                       "Read windows N tokens at a time through the cache, as hla generate does, "
                       "instead of at once; 1: as generated text is read")
          ->check(at_least(1))
          ->group("Decoding");
  for (CLI::Option* option : add_decoder_options(*command, scoring.decoder)) {
    option->needs(decode)->group("Decoding");
  }

  command
      ->add_flag("--by-position{16}", scoring.position_buckets,
                 "Break down by position in the window, in 16 parts; --by-position=N: in N parts")
      ->check(CLI::Range(1, 4096))
      ->group("Report");
  command
      ->add_flag("--by-layer", arguments->evaluation.by_layer,
                 "With --reference: what each layer alone costs, put into the teacher, on the "
                 "windows of the first protocol")
      ->group("Report");
  command
      ->add_flag("--profile", arguments->evaluation.profile,
                 "Where the time goes, by kind of operation (CPU)")
      ->group("Report");
  add_report_option(*command, "--json", arguments->json,
                    "Write the results to FILE as JSON; - for stdout")
      ->group("Report");
  add_report_option(*command, "--csv", arguments->csv, "Write a table to FILE as CSV; - for stdout")
      ->group("Report");
  command
      ->add_option("--plot", arguments->plot, "Write perplexity against cache bytes to FILE as SVG")
      ->group("Report");
  command->add_flag("--force", arguments->force, "Replace existing output files")->group("Report");
  add_device_options(*command, arguments->device);
  command->footer(
      "Protocols (docs/perplexity.md): gptq is the number of compression papers; lm-eval reports\n"
      "word_perplexity, byte_perplexity and bits_per_byte of lm-evaluation-harness; hf-stride is "
      "the\n"
      "sliding window of the transformers documentation; llama.cpp is llama-perplexity.\n\n"
      "Examples:\n"
      "  hla ppl models/SmolLM2-135M-Instruct\n"
      "  hla ppl models/SmolLM2-135M-Instruct --protocol llama.cpp --limit 20\n"
      "  hla ppl models/SmolLM2-135M-Instruct --all-protocols --ctx 1024 --limit 4\n"
      "  hla ppl models/latent-50 --reference models/SmolLM2-135M-Instruct --by-position --limit "
      "4\n"
      "  hla ppl models/SmolLM2-135M-Instruct models/latent-50 --csv table.csv --plot plot.svg\n"
      "  hla ppl models/latent-50 --decode 8 --cache-dtype bf16 --reference models/latent-50 "
      "--limit 1\n"
      "  hla ppl data/stories260K/stories260K.bin --text data/wikitext-2/wiki.test.raw --ctx 256 "
      "--limit 8 --json -");
  command->callback([arguments] { run_ppl(*arguments); });
}

}  // namespace hla::tools
