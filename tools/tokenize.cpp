#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "commands.h"
#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/standard_input.h"
#include "hla/io/checkpoint.h"
#include "hla/io/hub_cache.h"
#include "hla/io/json_file.h"
#include "hla/io/mapped_file.h"
#include "hla/text/tokenizer.h"
#include "hla/text/tokenizer_check.h"
#include "hla/text/unicode.h"

namespace hla::tools {
namespace {

struct TokenizeArguments {
  std::string tokenizer;
  std::string text;
  bool ids = false;
  bool pieces = false;
  bool check = false;
  std::string goldens;  // empty: those of the tokenizer
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

struct TokenizerSource {
  std::filesystem::path path;            // folder or file
  std::optional<nlohmann::json> config;  // of the model, if there is one and --check asks for it
};

// A model folder, llama2.c file or HF id means its tokenizer; a tokenizer file means itself.
TokenizerSource tokenizer_of(const TokenizeArguments& arguments) {
  TokenizerSource source = {resolve_model_path(arguments.tokenizer), std::nullopt};
  std::error_code error;
  const bool folder = std::filesystem::is_directory(source.path, error);
  if (!folder && source.path.extension() == ".bin") {
    const Checkpoint checkpoint = Checkpoint::open(arguments.tokenizer);
    if (!checkpoint.tokenizer_path()) throw_bad_input(arguments.tokenizer + ": has no tokenizer");
    source.path = *checkpoint.tokenizer_path();
    if (arguments.check) source.config = checkpoint.config();
  } else if (arguments.check) {
    const auto config = (folder ? source.path : source.path.parent_path()) / "config.json";
    if (std::filesystem::is_regular_file(config, error)) source.config = read_json_file(config);
  }
  return source;
}

// ---- --pieces ----

nlohmann::json piece_json(const Tokenizer& tokenizer, int32_t id) {
  const std::string bytes = tokenizer.token_bytes(id);
  nlohmann::json json = {{"id", id},
                         {"piece", sanitize_utf8(tokenizer.id_to_token(id))},
                         {"text", sanitize_utf8(bytes)}};
  // A part of a character has no text of its own.
  if (!is_valid_utf8(bytes)) {
    nlohmann::json list = nlohmann::json::array();
    for (const char byte : bytes) list.push_back(static_cast<unsigned char>(byte));
    json["bytes"] = std::move(list);
  }
  return json;
}

void print_pieces(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  for (const int32_t id : ids) {
    std::string piece = tokenizer.id_to_token(id);
    // As the file spells it, where that does not break the line.
    const std::string escaped = escape_for_display(piece);
    if (std::count(escaped.begin(), escaped.end(), '\\') !=
        2 * std::count(piece.begin(), piece.end(), '\\')) {
      piece = escaped;
    }
    std::cout << id << "\t" << piece << "\t\"" << escape_for_display(tokenizer.token_bytes(id))
              << "\"\n";
  }
}

// ---- --check ----

// The text, cut after some 60 bytes.
std::string text_excerpt(const std::string& text) {
  constexpr size_t kMax = 60;
  size_t end = std::min(text.size(), kMax);
  while (end < text.size() && end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) {
    --end;
  }
  return "\"" + escape_for_display(text.substr(0, end)) + "\"" +
         (end < text.size() ? " … (" + std::to_string(text.size()) + " bytes)" : "");
}

// A few ids around the place `at`, with their texts: "… 905 "world", 216 " " …".
std::string ids_excerpt(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, size_t at) {
  const size_t begin = at > 2 ? at - 2 : 0;
  const size_t end = std::min(ids.size(), at + 4);
  std::string line = begin > 0 ? "… " : "";
  for (size_t i = begin; i < end; ++i) {
    const bool known = ids[i] >= 0 && ids[i] < tokenizer.vocab_size();
    line += (i == begin ? "" : ", ") + std::string(i == at ? ">" : "") + std::to_string(ids[i]) +
            (known ? " \"" + escape_for_display(tokenizer.token_bytes(ids[i])) + "\""
                   : " (not in the vocabulary)");
  }
  if (at >= ids.size()) line += ids.empty() ? ">nothing" : ", >end";
  return line + (end < ids.size() ? " …" : "");
}

nlohmann::json check_json(const TokenizerCheck& check) {
  nlohmann::json mismatches = nlohmann::json::array();
  for (const GoldenMismatch& mismatch : check.mismatches) {
    mismatches.push_back({{"pair", mismatch.pair},
                          {"text", mismatch.text},
                          {"encoding", mismatch.with_special ? "ids_with_special" : "ids"},
                          {"first_difference", mismatch.first_difference},
                          {"expected", mismatch.expected},
                          {"got", mismatch.got},
                          {"unknown_ids", mismatch.unknown_ids}});
  }
  return {{"pairs", check.pairs}, {"agree", check.agreeing}, {"mismatches", mismatches}};
}

void print_check(const Tokenizer& tokenizer, const TokenizerCheck& check) {
  std::cout << "agree          " << check.agreeing << " of " << check.pairs << " pairs\n";
  for (const GoldenMismatch& mismatch : check.mismatches) {
    std::cout << "\npair " << mismatch.pair << (mismatch.with_special ? " (ids_with_special)" : "")
              << ": " << text_excerpt(mismatch.text) << "\n  expected  "
              << ids_excerpt(tokenizer, mismatch.expected, mismatch.first_difference)
              << "\n  got       " << ids_excerpt(tokenizer, mismatch.got, mismatch.first_difference)
              << "\n";
  }
}

void run_check(const TokenizeArguments& arguments) {
  const TokenizerSource source = tokenizer_of(arguments);
  const std::filesystem::path file = arguments.goldens.empty()
                                         ? tokenizer_goldens_path(source.path)
                                         : std::filesystem::path(arguments.goldens);
  const TokenizerGoldens goldens = read_tokenizer_goldens(file);
  const auto tokenizer = load_tokenizer(source.path);
  const TokenizerCheck check = check_tokenizer(*tokenizer, goldens);
  const std::vector<std::string> warnings =
      source.config ? config_warnings(*tokenizer, *source.config) : std::vector<std::string>{};
  if (arguments.json) {
    nlohmann::json json = check_json(check);
    json["tokenizer"] = tokenizer->kind();
    json["vocab_size"] = tokenizer->vocab_size();
    json["goldens"] = file.string();
    json["source"] = goldens.source;
    json["warnings"] = warnings;
    std::cout << json_text(json);
  } else {
    std::cout << "tokenizer      " << tokenizer->kind() << ", " << tokenizer->vocab_size()
              << " ids\ngoldens        " << file.string()
              << (goldens.source.empty() ? "" : " (" + escape_for_display(goldens.source) + ")")
              << "\n";
    print_check(*tokenizer, check);
  }
  std::cout.flush();
  for (const std::string& warning : warnings) log_warning(warning);
  if (check.agreeing < check.pairs) {
    throw_bad_input(source.path.string() + ": the tokenizer differs from its goldens in " +
                    std::to_string(check.pairs - check.agreeing) + " of " +
                    std::to_string(check.pairs) + " pairs");
  }
}

void run_tokenize(const TokenizeArguments& arguments) {
  if (!arguments.json && arguments.ids + arguments.pieces + arguments.bench > 1) {
    throw_usage("--ids, --pieces and --bench print different things: give one, or --json for all");
  }
  const auto tokenizer = load_tokenizer(tokenizer_of(arguments).path);
  std::string text;
  if (arguments.text.empty()) {
    text = read_standard_input();
  } else {
    text = MappedFile::open(arguments.text)->text();
  }
  const std::vector<int32_t> ids = tokenizer->encode(text);
  throw_if_interrupted();
  const double speed = arguments.bench ? best_speed(*tokenizer, text) : 0;
  if (arguments.json) {
    nlohmann::json json = {{"tokenizer", tokenizer->kind()},
                           {"vocab_size", tokenizer->vocab_size()},
                           {"bytes", text.size()},
                           {"tokens", ids.size()}};
    if (arguments.ids) json["ids"] = ids;
    if (arguments.pieces) {
      json["pieces"] = nlohmann::json::array();
      for (const int32_t id : ids) json["pieces"].push_back(piece_json(*tokenizer, id));
    }
    if (arguments.bench) json["megabytes_per_second"] = speed;
    std::cout << json_text(json);
    return;
  }
  if (arguments.ids) {
    for (size_t i = 0; i < ids.size(); ++i) std::cout << (i == 0 ? "" : " ") << ids[i];
    std::cout << "\n";
    return;
  }
  if (arguments.pieces) {
    print_pieces(*tokenizer, ids);
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
  CLI::App* command = app.add_subcommand(
      "tokenize", "Counts or prints the tokens of a text, or checks a tokenizer");
  command
      ->add_option("TOKENIZER", arguments->tokenizer,
                   "Model folder, HF id in the local cache, tokenizer.json or *.model file")
      ->required();
  CLI::Option* text = command->add_option("--text", arguments->text, "Text file; default: stdin");
  CLI::Option* ids = command->add_flag("--ids", arguments->ids, "Print the ids");
  CLI::Option* pieces =
      command->add_flag("--pieces", arguments->pieces,
                        "Print a line per token: id, piece as the tokenizer's file spells it, and "
                        "the text that it stands for (escaped), tab-separated");
  CLI::Option* check =
      command
          ->add_option("--check", arguments->goldens,
                       "Compare with golden ids instead; default FILE: the tokenizer_goldens.json "
                       "of the folder, or NAME_goldens.json beside NAME.model")
          ->expected(0, 1)
          ->type_name("[FILE]");
  command->add_flag("--json", arguments->json, "Print JSON");
  CLI::Option* bench = command->add_flag("--bench", arguments->bench, "Measure the speed");
  check->excludes(text)->excludes(ids)->excludes(pieces)->excludes(bench);
  command->footer(
      "With --check: exit code 3 when any ids differ.\n"
      ".venv/bin/python scripts/make_tokenizer_goldens.py --folder MODEL makes the file.\n\n"
      "Examples:\n"
      "  echo -n 'Hello world' | hla tokenize models/SmolLM2-135M-Instruct --ids\n"
      "  hla tokenize data/tokenizers/cosmo2 --text data/wikitext-2/wiki.test.raw --bench\n"
      "  hla tokenize models/SmolLM2-135M-Instruct --check");
  command->callback([arguments, check] {
    arguments->check = check->count() > 0;
    arguments->check ? run_check(*arguments) : run_tokenize(*arguments);
  });
}

}  // namespace hla::tools
