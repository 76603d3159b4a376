#include <chrono>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "hla/io/checkpoint.h"
#include "hla/io/hub_cache.h"
#include "hla/io/mapped_file.h"
#include "hla/text/tokenizer.h"

namespace hla::tools {
namespace {

struct TokenizeArguments {
  std::string tokenizer;
  std::string text;
  bool ids = false;
  bool json = false;
  bool bench = false;
};

// Best of three runs, MB/s. Every run starts without cached words.
double best_speed(const Tokenizer& tokenizer, std::string_view text) {
  double best = 0;
  for (int run = 0; run < 3; ++run) {
    const auto start = std::chrono::steady_clock::now();
    const size_t count = tokenizer.encode(text).size();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (count > 0) best = std::max(best, static_cast<double>(text.size()) / 1e6 / elapsed.count());
  }
  return best;
}

// A model folder, llama2.c file or HF id means its tokenizer; a tokenizer file means itself.
std::filesystem::path tokenizer_of(const std::string& argument) {
  const std::filesystem::path path = resolve_model_path(argument);
  if (path.extension() == ".bin") {
    if (const auto found = Checkpoint::open(argument).tokenizer_path()) return *found;
  }
  return path;
}

void run_tokenize(const TokenizeArguments& arguments) {
  const auto tokenizer = load_tokenizer(tokenizer_of(arguments.tokenizer));
  std::string text;
  if (arguments.text.empty()) {
    text.assign(std::istreambuf_iterator<char>(std::cin), {});
  } else {
    text = MappedFile::open(arguments.text)->text();
  }
  const std::vector<int32_t> ids = tokenizer->encode(text);
  const double speed = arguments.bench ? best_speed(*tokenizer, text) : 0;
  if (arguments.json) {
    nlohmann::json json = {{"tokenizer", tokenizer->kind()},
                           {"vocab_size", tokenizer->vocab_size()},
                           {"bytes", text.size()},
                           {"tokens", ids.size()}};
    if (arguments.ids) json["ids"] = ids;
    if (arguments.bench) json["megabytes_per_second"] = speed;
    std::cout << json.dump(2) << "\n";
    return;
  }
  if (arguments.ids) {
    for (size_t i = 0; i < ids.size(); ++i) std::cout << (i == 0 ? "" : " ") << ids[i];
    std::cout << "\n";
    return;
  }
  std::printf("tokenizer      %s, %lld ids\n", tokenizer->kind().c_str(),
              static_cast<long long>(tokenizer->vocab_size()));
  std::printf("text           %zu bytes, %zu tokens\n", text.size(), ids.size());
  if (arguments.bench) std::printf("speed          %.1f MB/s on one thread\n", speed);
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto arguments = std::make_shared<TokenizeArguments>();
  CLI::App* command = app.add_subcommand("tokenize", "Counts or prints the token ids of a text");
  command
      ->add_option("TOKENIZER", arguments->tokenizer,
                   "Model folder, HF id in the local cache, tokenizer.json or *.model file")
      ->required();
  command->add_option("--text", arguments->text, "Text file; default: stdin");
  command->add_flag("--ids", arguments->ids, "Print the ids");
  command->add_flag("--json", arguments->json, "Print JSON");
  command->add_flag("--bench", arguments->bench, "Measure the speed");
  command->footer(
      "Examples:\n"
      "  echo -n 'Hello world' | hla tokenize models/SmolLM2-135M-Instruct --ids\n"
      "  hla tokenize data/tokenizers/cosmo2 --text data/wikitext-2/wiki.test.raw --bench");
  command->callback([arguments] { run_tokenize(*arguments); });
}

}  // namespace hla::tools
