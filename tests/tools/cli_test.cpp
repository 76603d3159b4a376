// The program as a user meets it: outputs, exit codes, and that nothing is lost.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "hla/core/memory.h"
#include "hla/io/checkpoint.h"
#include "hla/io/json_file.h"
#include "hla/model/config.h"
#include "hla/model/llama.h"
#include "tensor_util.h"

namespace hla {
namespace {

using testing::CommandResult;
using testing::read_file;
using testing::run_command;
using testing::run_hla;
using testing::source_path;
using testing::TempDir;
using testing::write_file;

std::string stories() { return source_path("data/stories260K/stories260K.bin").string(); }

// What is said of arguments that are refused.
std::string usage_error(const std::string& arguments) {
  const CommandResult result = run_hla(arguments);
  EXPECT_EQ(result.code, 2) << arguments << result.err;
  return result.err;
}

void expect_refused(const std::string& arguments, const std::string& reason, int code = 2) {
  const CommandResult result = run_hla(arguments);
  EXPECT_EQ(result.code, code) << arguments << result.err;
  EXPECT_NE(result.err.find(reason), std::string::npos) << arguments << result.err;
}

TEST(CliTest, HelpAndVersion) {
  for (const char* command : {"", "info ", "ppl ", "convert ", "finetune ", "transfer ",
                              "generate ", "bench ", "tokenize "}) {
    const CommandResult result = run_hla(std::string(command) + "--help");
    EXPECT_EQ(result.code, 0);
    EXPECT_NE(result.out.find("Examples:"), std::string::npos) << command;
    EXPECT_EQ(result.err, "");
  }
  const CommandResult version = run_hla("--version");
  EXPECT_EQ(version.code, 0);
  EXPECT_NE(version.out.find("libtorch 2."), std::string::npos);
  EXPECT_NE(version.out.find("commit "), std::string::npos);
  EXPECT_NE(version.out.find("CUDA: "), std::string::npos);
}

TEST(CliTest, UsageErrorsExitWith2) {
  EXPECT_EQ(run_hla("").code, 2);
  EXPECT_EQ(run_hla("nonsense").code, 2);
  EXPECT_EQ(run_hla("ppl").code, 2);
  EXPECT_EQ(run_hla("info a --frobnicate").code, 2);
  EXPECT_EQ(run_hla("ppl " + stories() + " --device toaster").code, 2);
  EXPECT_EQ(run_hla("convert " + stories() + " out --rope spiral").code, 2);
  EXPECT_EQ(run_hla("convert " + stories() + " out --objective gain").code, 2);
  EXPECT_EQ(run_hla("convert " + stories() + " out --objective loss --value-weight 0.3").code, 2);
  EXPECT_EQ(run_hla("ppl " + stories() + " --windows 0 --limit 1").code, 2);
  EXPECT_EQ(run_hla("generate " + stories() + " --prompt a --seed 5").code, 2);
  EXPECT_EQ(run_hla("generate " + stories() + " --prompt a --stream --json -").code, 2);
}

TEST(CliTest, MisspeltNamesAreGuessed) {
  EXPECT_NE(usage_error("inof x").find("unknown command inof; did you mean info?"),
            std::string::npos);
  EXPECT_NE(usage_error("help").find("unknown command help; there are: info, "), std::string::npos);
  EXPECT_NE(usage_error("convert a b --target_ratio 0.5")
                .find("unknown option --target_ratio; did you mean --target-ratio?"),
            std::string::npos);
  EXPECT_NE(usage_error("info a --verbos").find("did you mean --verbose?"), std::string::npos);
  EXPECT_EQ(usage_error("info a --frobnicate").find("did you mean"), std::string::npos);
  EXPECT_EQ(usage_error("ppl").find("unknown"), std::string::npos);
  // Nothing that a name has not a letter of.
  const TempDir folder;
  write_file(folder / ".e", "");
  EXPECT_EQ(run_command("cd " + folder.path().string() + " && " + HLA_BINARY + " info 4")
                .err.find("did you mean"),
            std::string::npos);
}

TEST(CliTest, WhatIsReadIsNotReplaced) {
  const TempDir folder;
  const std::string model = (folder / "model").string();
  ASSERT_EQ(run_hla("convert --no-calib " + stories() + " " + model).code, 0);
  const std::filesystem::path text = folder / "text.txt";
  write_file(text, "Once upon a time there was a cat. It sat on a mat and looked at a bird.");
  const std::string config = read_file(folder / "model" / "config.json");
  const std::string ppl = "ppl " + model + " --text " + text.string() + " --ctx 8 --limit 1 ";
  for (const std::string& command :
       {ppl + "--json " + text.string(), ppl + "--csv " + model + "/config.json",
        "generate " + model + " --prompt a -n 1 --json " + model + "/config.json",
        "bench " + model + " -p 0 -n 1 -r 1 --json " + model + "/model.safetensors"}) {
    const CommandResult result = run_hla(command + " --force");
    EXPECT_EQ(result.code, 2) << command;
    EXPECT_NE(result.err.find("it is not replaced, even with --force"), std::string::npos)
        << result.err;
  }
  EXPECT_EQ(read_file(folder / "model" / "config.json"), config);
  EXPECT_EQ(read_file(text).substr(0, 9), "Once upon");
  // What is new beside them may be made.
  EXPECT_EQ(run_hla(ppl + "--json " + model + "/ppl.json").code, 0);
}

TEST(CliTest, APromptOfStdinEndsBeforeItsLineEnd) {
  const auto text = [](const std::string& input) {
    return run_command("printf '" + input + "' | " + HLA_BINARY + " generate " + stories() +
                       " -n 12 -q")
        .out;
  };
  EXPECT_EQ(text("Once upon\\n"), text("Once upon"));
  EXPECT_NE(text("Once upon\\n\\n"), text("Once upon"));
}

// A pipe that stays open: what is waited for there can be interrupted.
TEST(CliTest, ReadingStdinCanBeInterrupted) {
  for (const char* command : {"tokenize ", "generate "}) {
    SCOPED_TRACE(command);
    const CommandResult result = run_command("sleep 4 | timeout --preserve-status -s INT -k 1 2 " +
                                             std::string(HLA_BINARY) + " " + command + stories());
    EXPECT_EQ(result.code, 130) << result.err;
    EXPECT_EQ(result.out, "");
  }
}

TEST(CliTest, StdoutIsNoFileThatExists) {
  const CommandResult generated =
      run_hla("generate " + stories() + " --prompt a -n 2 --json /dev/stdout");
  EXPECT_EQ(generated.code, 0) << generated.err;
  EXPECT_NE(generated.out.find("\"continuations\""), std::string::npos) << generated.out;
}

// A variable of a script that is not set.
TEST(CliTest, EmptyValuesAreRefused) {
  const TempDir folder;
  for (const std::string& command : std::vector<std::string>{
           "info \"\"", "ppl " + stories() + " --text \"\" --limit 1",
           "ppl " + stories() + " --limit 1 --ctx 64 --json \"\"",
           "generate " + stories() + " -n 1 --prompts \"\" </dev/null",
           "convert " + stories() + " " + (folder / "out").string() + " --no-calib --plan \"\"",
           "finetune --print-config --config \"\"",
           "tokenize " + stories() + " --text \"\" </dev/null"}) {
    const CommandResult result = run_hla(command);
    EXPECT_EQ(result.code, 2) << command;
    EXPECT_NE(result.err.find("expected a value, got an empty one"), std::string::npos)
        << command << result.err;
  }
  EXPECT_EQ(run_hla("generate " + stories() + " -n 1 --prompt \"\"").code, 0);
}

TEST(CliTest, NumbersOutOfRangeAreRefusedInWords) {
  EXPECT_NE(usage_error("bench " + stories() + " -r 0").find("expected at least 1, got 0"),
            std::string::npos);
  EXPECT_NE(usage_error("ppl " + stories() + " --threads -1").find("expected at least 0, got -1"),
            std::string::npos);
  EXPECT_NE(usage_error("ppl " + stories() + " --threads 100000").find("expected at most"),
            std::string::npos);
}

// One report must not replace the other, nor what the command makes.
TEST(CliTest, TargetsAreTheirOwnThroughLinks) {
  const TempDir folder;
  const std::string json = (folder / "report.json").string();
  const auto refuses = [&](const std::string& options, const std::string& reason) {
    expect_refused("ppl " + stories() + " --limit 1 --ctx 64 --force " + options, reason);
  };
  std::filesystem::create_symlink("report.json", folder / "report.csv");
  refuses("--csv " + (folder / "report.csv").string(), "is a link to what is not there");
  write_file(json, "");
  refuses("--json " + json + " --csv " + (folder / "report.csv").string(), "a second time");
  const std::string out = (folder / "out").string();
  EXPECT_EQ(run_hla("convert " + stories() + " " + out + "/ --no-calib --json " + out).code, 2);
  EXPECT_FALSE(std::filesystem::exists(out));
}

TEST(CliTest, FoldersThatCannotBeWrittenAreFoundAtOnce) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write anywhere";
  const TempDir folder;
  std::filesystem::create_directory(folder / "closed");
  std::filesystem::permissions(
      folder / "closed", std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
  const CommandResult result =
      run_hla("convert " + stories() + " " + (folder / "out").string() + " --no-calib --json " +
              (folder / "closed/report.json").string());
  EXPECT_EQ(result.code, 1);
  EXPECT_NE(result.err.find("cannot write in"), std::string::npos) << result.err;
  EXPECT_FALSE(std::filesystem::exists(folder / "out"));
}

// It ends with the reader, not with the last of its tokens.
TEST(CliTest, StreamingEndsWithItsReader) {
  const CommandResult result =
      run_command("timeout 30 " + std::string(HLA_BINARY) + " generate " + stories() +
                  " --prompt a -n 1000000 --max-length 2000000 --ignore-eos --stream >/dev/full");
  EXPECT_EQ(result.code, 1);
  EXPECT_NE(result.err.find("stdout: write failed"), std::string::npos) << result.err;
}

TEST(CliTest, JsonIsWrittenWhereNobodyReadsTheStream) {
  const TempDir folder;
  const std::string json = (folder / "out.json").string();
  run_command(std::string(HLA_BINARY) + " generate " + stories() +
              " --prompt a -n 200 --stream --json " + json + " | head -c 5");
  EXPECT_EQ(read_json_file(json)["continuations"][0]["ids"].size(), 200u);
}

TEST(CliTest, SaysThatThereIsNoTokenizer) {
  const TempDir folder;
  std::filesystem::copy_file(stories(), folder / "model.bin");
  const CommandResult result =
      run_hla("tokenize " + (folder / "model.bin").string() + " </dev/null");
  EXPECT_EQ(result.code, 3);
  EXPECT_NE(result.err.find("model.bin: has no tokenizer"), std::string::npos) << result.err;
}

TEST(CliTest, InfoDescribes) {
  const CommandResult text = run_hla("info " + stories());
  EXPECT_EQ(text.code, 0);
  EXPECT_NE(text.out.find("problems       none"), std::string::npos) << text.out;
  const auto json = nlohmann::json::parse(run_hla("info --json " + stories()).out);
  EXPECT_EQ(json["parameters"], 260032);
  EXPECT_EQ(json["cache_bytes_per_token"], 5 * 2 * 4 * 8 * 4);
  EXPECT_EQ(json["problems"].size(), 0u);
}

TEST(CliTest, BadInputExitsWith3) {
  const TempDir folder;
  EXPECT_EQ(run_hla("info /no/such/folder").code, 3);
  EXPECT_EQ(run_hla("info " + folder.path().string()).code, 3);
  std::filesystem::copy(source_path("tests/data/models/gqa"), folder / "cut",
                        std::filesystem::copy_options::recursive);
  const auto weights = folder.path() / "cut" / "model.safetensors";
  std::filesystem::resize_file(weights, std::filesystem::file_size(weights) - 100);
  const CommandResult cut = run_hla("info " + (folder / "cut").string());
  EXPECT_EQ(cut.code, 3);
  EXPECT_NE(cut.err.find("model.safetensors"), std::string::npos) << cut.err;
  write_file(folder / "empty.txt", "");
  EXPECT_EQ(
      run_hla("ppl " + stories() + " --ctx 64 --text " + (folder / "empty.txt").string()).code, 3);
  write_file(folder / "short.txt", "Once upon a time");
  const CommandResult shorter =
      run_hla("ppl " + stories() + " --ctx 64 --text " + (folder / "short.txt").string());
  EXPECT_EQ(shorter.code, 3);
  EXPECT_EQ(shorter.out, "");
  // A tokenizer of another model.
  EXPECT_EQ(run_hla("ppl " + stories() + " --ctx 64 --limit 1 --tokenizer " +
                    source_path("data/tokenizers/cosmo2").string())
                .code,
            3);
}

TEST(CliTest, ConvertRefusesOtherModelsByName) {
  const TempDir folder;
  const auto model = folder / "model";
  std::filesystem::copy(source_path("tests/data/models/gqa"), model);
  const auto config = nlohmann::json::parse(read_file(model / "config.json"));
  for (const auto& [key, value] :
       {std::pair<std::string, nlohmann::json>("model_type", "mistral"),
        std::pair<std::string, nlohmann::json>("quantization_config",
                                               {{"quant_method", "awq"}, {"bits", 4}})}) {
    nlohmann::json changed = config;
    changed[key] = value;
    write_file(model / "config.json", changed.dump());
    const CommandResult result =
        run_hla("convert --no-calib " + model.string() + " " + (folder / "out").string());
    EXPECT_EQ(result.code, 3);
    EXPECT_NE(result.err.find(key), std::string::npos) << result.err;
    EXPECT_NE(result.err.find(key == "model_type" ? "mistral" : "awq"), std::string::npos);
    EXPECT_FALSE(std::filesystem::exists(folder / "out"));
  }
}

TEST(CliTest, PplWritesJson) {
  const TempDir folder;
  const std::string file = (folder / "out.json").string();
  const std::string command = "ppl " + stories() + " --ctx 128 --windows 0,2 --json ";
  // Options with lists leave the model alone that comes after them.
  EXPECT_EQ(
      run_hla("ppl --windows 0,2 --by-position --protocol gptq " + stories() + " --ctx 128").code,
      0);
  const CommandResult first = run_hla(command + file);
  EXPECT_EQ(first.code, 0) << first.err;
  EXPECT_NE(first.out.find("perplexity"), std::string::npos);
  const auto json = nlohmann::json::parse(read_file(file))["results"][0];
  EXPECT_EQ(json["protocol"], "gptq");
  EXPECT_EQ(json["windows"], 2);
  EXPECT_EQ(json["context"], 128);
  EXPECT_EQ(json["stride"], 128);
  EXPECT_EQ(json["tokens_scored"], 2 * 127);
  EXPECT_EQ(json["dtype"], "fp32");
  EXPECT_EQ(json["text_sha256"],
            "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08");
  EXPECT_NE(json["bos"].get<std::string>().find("<s> (1)"), std::string::npos);
  EXPECT_NEAR(std::exp(json["nll"].get<double>()), json["perplexity"].get<double>(), 1e-9);
  // An existing file is kept unless --force is given.
  EXPECT_EQ(run_hla(command + file).code, 2);
  EXPECT_EQ(run_hla(command + file + " --force").code, 0);
  // With "-", stdout holds the JSON and nothing else.
  EXPECT_EQ(nlohmann::json::parse(run_hla(command + "-").out)["results"][0]["windows"], 2);
}

TEST(CliTest, PplComparesModelsAndProtocols) {
  const TempDir folder;
  const std::string student = (folder / "student").string();
  ASSERT_EQ(run_hla("convert --no-calib " + stories() + " " + student).code, 0);
  const std::string csv = (folder / "out.csv").string();
  const std::string plot = (folder / "out.svg").string();
  const CommandResult result =
      run_hla("ppl " + stories() + " " + student + " --reference " + stories() +
              " --all-protocols --ctx 64 --limit 2 --by-position=4 --json - --csv " + csv +
              " --plot " + plot);
  ASSERT_EQ(result.code, 0) << result.err;
  const auto results = nlohmann::json::parse(result.out)["results"];
  ASSERT_EQ(results.size(), 8U);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(results[i]["divergence"]["kl_mean"], 0) << "a model against itself";
    EXPECT_EQ(results[i]["divergence"]["same_top1"], 1);
    EXPECT_GT(results[i + 4]["divergence"]["kl_mean"], 0);
    EXPECT_LT(results[i + 4]["cache_bytes_per_token"], results[i]["cache_bytes_per_token"]);
    EXPECT_EQ(results[i]["by_position"].size(), results[i]["protocol"] == "llama.cpp" ? 2U : 4U);
  }
  const std::string table = read_file(csv);
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 9);
  EXPECT_NE(read_file(plot).find("<svg"), std::string::npos);
  // Every layer of a model is worth nothing against itself.
  const CommandResult layers = run_hla("ppl " + stories() + " --reference " + stories() +
                                       " --by-layer --ctx 64 --limit 1 --json -");
  const auto by_layer = nlohmann::json::parse(layers.out)["results"][0]["by_layer"];
  ASSERT_EQ(by_layer.size(), 5U);
  EXPECT_EQ(by_layer[4]["kl_mean"], 0);
  // The tables of a terminal.
  const CommandResult text = run_hla("ppl " + student + " --reference " + stories() +
                                     " --ctx 64 --limit 2 --by-position --by-layer --profile");
  EXPECT_EQ(text.code, 0) << text.err;
  for (const char* part :
       {"ppl ratio", "same top-1", "position", "layer alone", "of peak", "BOS"}) {
    EXPECT_NE(text.out.find(part), std::string::npos) << part << "\n" << text.out;
  }
}

TEST(CliTest, PplSaysWhichWindows) {
  const std::string command = "ppl " + stories() + " --ctx 64 ";
  const std::string text = run_hla(command + "--windows 3,5").out;
  EXPECT_NE(text.find(" stride 64: 3, 5\n"), std::string::npos) << text;
  EXPECT_EQ(run_hla(command + "--limit 2").out.find(" stride 64: "), std::string::npos);
  EXPECT_NE(run_hla(command + "--windows 3,5 --csv -").out.find(",3 5,"), std::string::npos);
}

TEST(CliTest, PplReadsThroughTheCache) {
  const std::string command = "ppl " + stories() + " --ctx 64 --limit 2 --reference " + stories();
  const auto evaluated = [&](const std::string& options) {
    const CommandResult result = run_hla(command + " --json - " + options);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out)["results"][0];
  };
  const auto at_once = evaluated("");
  EXPECT_EQ(at_once["decode_tokens"], 0);
  EXPECT_EQ(at_once["divergence"]["logit_difference"], 0);
  const auto exact = evaluated("--decode 8 --reference-dtype fp64");
  EXPECT_EQ(exact["decode_tokens"], 8);
  EXPECT_EQ(exact["cache_dtype"], "fp32");
  EXPECT_NEAR(exact["nll"].get<double>(), at_once["nll"].get<double>(), 1e-6);
  const double difference = exact["divergence"]["logit_difference"];
  EXPECT_GT(difference, 0);
  EXPECT_LT(difference, 1e-3);
  EXPECT_EQ(run_hla(command + " --amplification 10").code, 2) << "of no use at once";
  const auto rounded = evaluated("--decode 8 --cache-dtype bf16");
  EXPECT_GT(rounded["divergence"]["logit_difference"].get<double>(), 10 * difference);
  EXPECT_EQ(2 * rounded["cache_bytes_per_token"].get<int64_t>(), at_once["cache_bytes_per_token"]);
  const CommandResult text = run_hla(command + " --decode 8 --cache-dtype bf16");
  EXPECT_NE(text.out.find("8 tokens at a time, through a cache in bf16"), std::string::npos)
      << text.out;
  // Options of the cache are of no use without one.
  EXPECT_EQ(run_hla(command + " --cache-dtype bf16").code, 2);
  EXPECT_EQ(run_hla(command + " --decode 0").code, 2);
}

TEST(CliTest, PplReadsTextsOfAnyKind) {
  const TempDir folder;
  const auto perplexity = [&](const std::string& options) {
    const CommandResult result = run_hla("ppl " + stories() + " --ctx 32 --json - " + options);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out)["results"][0]["perplexity"].get<double>();
  };
  std::string story;
  for (int i = 0; i < 30; ++i) story += "Once upon a time there was a little girl.";
  write_file(folder / "a.txt", story);
  write_file(folder / "a.jsonl", nlohmann::json{{"id", 1}, {"story", story}}.dump() + "\n");
  const double plain = perplexity("--text " + (folder / "a.txt").string());
  EXPECT_DOUBLE_EQ(perplexity("--text-field story --text " + (folder / "a.jsonl").string()), plain);
  EXPECT_EQ(run_hla("ppl " + stories() + " --text " + (folder / "a.jsonl").string()).code, 3);
  write_file(folder / "bad.txt", "caf\xE9 " + story);
  const CommandResult bad =
      run_hla("ppl " + stories() + " --ctx 32 --text " + (folder / "bad.txt").string());
  EXPECT_EQ(bad.code, 3);
  EXPECT_NE(bad.err.find("UTF-8"), std::string::npos) << bad.err;
  EXPECT_EQ(run_hla("ppl " + stories() + " --dataset nonsense").code, 2);
  EXPECT_EQ(run_hla("ppl " + stories() + " --dataset ptb --text x").code, 2);
  const CommandResult missing =
      run_command("HF_HOME=" + folder.path().string() + " " + std::string(HLA_BINARY) + " ppl " +
                  stories() + " --dataset ptb");
  EXPECT_EQ(missing.code, 3);
  EXPECT_NE(missing.err.find("hf download"), std::string::npos) << missing.err;
  // It warns of a text that is not what it looks like.
  std::string unk = " = Title = \n";
  for (int i = 0; i < 60; ++i) unk += " the <unk> was a <unk> @-@ like <unk> . \n";
  write_file(folder / "unk.txt", unk);
  const CommandResult warned =
      run_hla("ppl " + stories() + " --ctx 32 --text " + (folder / "unk.txt").string());
  EXPECT_NE(warned.err.find("<unk>"), std::string::npos) << warned.err;
}

TEST(CliTest, PplRefusesWhatCannotBeCompared) {
  EXPECT_EQ(run_hla("ppl " + stories() + " --protocol nonsense").code, 2);
  EXPECT_EQ(run_hla("ppl " + stories() + " --by-layer --ctx 64 --limit 1").code, 2);
  // Options that would do nothing, or contradict each other.
  for (const char* options :
       {"--stride 7", "--protocol gptq,gptq", "--protocol gptq --all-protocols", "--documents 3",
        "--text x --split train", "--windows 1,2", "--json - --csv -", "--plot -",
        "--json /no/such/folder/out.json", "--csv /tmp"}) {
    const CommandResult result = run_hla("ppl " + stories() + " --ctx 64 --limit 1 " + options);
    EXPECT_EQ(result.code, 2) << options << result.err;
    EXPECT_EQ(result.out, "") << options;
  }
  for (const auto& [windows, reason] :
       {std::pair("1,2,1", "got 1 twice"), {"1,x", "expected integers"}, {"''", "--windows"}}) {
    expect_refused("ppl " + stories() + " --ctx 64 --windows " + windows, reason);
  }
  expect_refused("ppl " + stories() + " --ctx 64 --limit 1 --text-field x", "is plain text");
  // A model that is not there shows before the first is scored.
  const CommandResult typo = run_hla("ppl " + stories() + " no-such-model --ctx 64 --limit 1");
  EXPECT_EQ(typo.code, 3);
  EXPECT_EQ(typo.out, "");
  // 2048 tokens, the protocol's own, are more than the model has positions.
  const CommandResult positions = run_hla("ppl " + stories());
  EXPECT_EQ(positions.code, 2);
  EXPECT_NE(positions.err.find("--ctx"), std::string::npos);
  // Another vocabulary.
  const CommandResult vocabulary =
      run_hla("ppl " + stories() + " --ctx 64 --limit 1 --reference " +
              source_path("tests/data/models/gqa").string() + " --tokenizer " +
              source_path("data/stories260K/tok512.model").string());
  EXPECT_EQ(vocabulary.code, 3);
  EXPECT_NE(vocabulary.err.find("vocabulary"), std::string::npos) << vocabulary.err;
}

// All bits of the last weights set: NaN, in the tensors that lie last.
std::string broken_model(const TempDir& folder) {
  const std::string bad = (folder / "bad").string();
  EXPECT_EQ(run_hla("convert --no-calib " + stories() + " " + bad).code, 0);
  const auto weights = folder.path() / "bad" / "model.safetensors";
  std::fstream file(weights, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-400, std::ios::end);
  file.write(std::string(400, '\xFF').data(), 400);
  return bad;
}

// A model that fails after others were scored does not take their results with it.
TEST(CliTest, PplKeepsResultsWhenALaterModelFails) {
  const TempDir folder;
  const std::string bad = broken_model(folder);
  const CommandResult result =
      run_hla("ppl " + stories() + " " + bad + " --ctx 64 --limit 2 --json -");
  EXPECT_EQ(result.code, 5) << result.err;
  EXPECT_NE(result.err.find("window 0"), std::string::npos) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  EXPECT_EQ(json["partial"], true);
  ASSERT_EQ(json["results"].size(), 1U);
  EXPECT_EQ(json["results"][0]["partial"], false);
  EXPECT_EQ(json["missing"], nlohmann::json({bad}));
  EXPECT_NE(result.err.find(bad + ": model, gptq window 0"), std::string::npos) << result.err;
  const std::string text = run_hla("ppl " + stories() + " " + bad + " --ctx 64 --limit 2").out;
  EXPECT_NE(text.find("MISSING: " + bad), std::string::npos) << text;
  EXPECT_EQ(text.find("PARTIAL"), std::string::npos) << "what there is of the first is whole";
}

// What a command prints that Ctrl-C ends; a busy machine takes longer to get to its first results.
std::string interrupted_hla(const std::string& arguments) {
  CommandResult result;
  for (int seconds = 3; result.out.empty() && seconds <= 24; seconds *= 2) {
    result = run_command("timeout --preserve-status -s INT " + std::to_string(seconds) + " " +
                         std::string(HLA_BINARY) + " " + arguments);
    EXPECT_EQ(result.code, 130) << result.err;
  }
  return result.out;
}

// Coordinates that amplify rounding more take fewer products.
TEST(CliTest, AmplificationIsTradedForProducts) {
  const TempDir folder;
  const std::string model = (folder / "half").string();
  ASSERT_EQ(run_hla("convert --no-calib " + stories() + " " + model).code, 0);
  const auto products = [&](const std::string& amplification) {
    const CommandResult result =
        run_hla("bench " + model + " -p 0 -n 1 -r 1 --json - --amplification " + amplification);
    EXPECT_EQ(result.code, 0) << result.err;
    const auto json = nlohmann::json::parse(result.out);
    EXPECT_EQ(json["amplification"], std::stod(amplification));
    return json["attending"][0]["decode_products"].get<double>();
  };
  EXPECT_LT(products("1000"), products("0"));
  EXPECT_EQ(run_hla("bench " + model + " --amplification -1").code, 2);
}

// Ctrl-C prints what there is, says that it is partial, and exits with 130.
TEST(CliTest, InterruptedPplPrintsAPartialResult) {
  const auto interrupted = [](const std::string& options) {
    return interrupted_hla("ppl " + stories() + " --ctx 512 --stride 4 " + options);
  };
  const std::string text = interrupted("--protocol hf-stride");
  EXPECT_NE(text.find("PARTIAL"), std::string::npos) << text;
  const auto result = nlohmann::json::parse(interrupted("--protocol hf-stride --json -"));
  EXPECT_EQ(result["partial"], true);
  EXPECT_EQ(result["results"][0]["partial"], true);
  EXPECT_GT(result["results"][0]["windows"], 0);
  EXPECT_LT(result["results"][0]["windows"], result["results"][0]["total_windows"]);
  // Protocols that were not reached have no numbers.
  const auto all =
      nlohmann::json::parse(interrupted("--protocol hf-stride,lm-eval --json -"))["results"];
  ASSERT_EQ(all.size(), 2U);
  EXPECT_GT(all[0]["perplexity"], 0);
  EXPECT_TRUE(all[1]["perplexity"].is_null());
  EXPECT_FALSE(all[1].contains("word_perplexity"));
}

// A breakdown that is interrupted keeps the perplexity that was there before it.
TEST(CliTest, InterruptedByLayerKeepsThePerplexity) {
  // A busy machine takes longer to get to the breakdown.
  nlohmann::json json;
  const auto is_scored = [&] {
    return json.is_object() && json["results"].size() == 1 && json["results"][0]["windows"] == 60;
  };
  for (int seconds = 4; !is_scored() && seconds <= 64; seconds *= 2) {
    const CommandResult result = run_command(
        "timeout --preserve-status -s INT " + std::to_string(seconds) + " " + HLA_BINARY + " ppl " +
        stories() + " --reference " + stories() + " --ctx 512 --limit 60 --by-layer --json -");
    ASSERT_EQ(result.code, 130) << result.err;
    if (!result.out.empty()) json = nlohmann::json::parse(result.out);
  }
  ASSERT_TRUE(is_scored()) << json.dump();
  EXPECT_EQ(json["partial"], true);
  const nlohmann::json& scored = json["results"][0];
  EXPECT_EQ(scored["partial"], false);
  EXPECT_TRUE(scored["perplexity"].is_number());
  for (const nlohmann::json& layer : scored.value("by_layer", nlohmann::json::array())) {
    EXPECT_LT(layer["tokens"], scored["tokens_scored"]);
  }
}

// A file that is opened in the place of a closed stderr gets nothing that is logged.
TEST(CliTest, ClosedStandardFilesAreNotTakenForOthers) {
  const TempDir folder;
  const std::string out = (folder / "out").string();
  // Warns, while weights are written, of biases that keys without floats lose.
  const std::string model = source_path("tests/data/models/attention_bias").string();
  const std::string plan = (folder / "plan.json").string();
  ASSERT_EQ(run_hla("convert " + model + " " + out + " --no-calib --dry-run --json " + plan).code,
            0);
  nlohmann::json edited = read_json_file(plan);
  for (nlohmann::json& layer : edited["plan"]["layers"]) {
    layer["fast_frequencies"] = 2;
    layer["k_rank"] = 0;
  }
  write_json_file(plan, edited, /*force=*/true);
  const std::string command = std::string(HLA_BINARY) + " convert " + model + " " + out +
                              " --no-calib --force --plan " + plan;
  EXPECT_NE(run_command(command).err.find("no floats"), std::string::npos);
  const auto convert = [&](const std::string& closed) {
    return run_command("sh -c '" + command + " " + closed + "'").code;
  };
  EXPECT_EQ(convert("<&- 2>&-"), 0);
  EXPECT_EQ(run_hla("info " + out).code, 0);
  EXPECT_EQ(convert("<&- >&- 2>&-"), 1);  // what it prints gets nowhere
  EXPECT_EQ(run_hla("info " + out).code, 0);
}

TEST(CliTest, ConvertNamesWhatIsWrong) {
  const TempDir folder;
  const std::string command = "convert " + stories() + " " + (folder / "out").string();
  const auto refuses = [&](const std::string& options, int code, const std::string& reason) {
    expect_refused(command + options, reason, code);
  };
  refuses(" --target-ppl-increase 1.5", 2, "which is 150 %");
  refuses(" --no-calib --value-weight nan", 2, "[--value-weight] expected a number");
  refuses(" --no-calib --value-weight 1e300", 2, "[--value-weight] expected a number");
  refuses(" --key-weighting plain --low-memory", 2, "has no effect with --objective attention");
  refuses(" --no-calib --no-refit-output", 2, "has no effect with --no-calib");
  refuses(" --no-calib --dry-run --restart", 2, "has no effect with --dry-run");
  const std::string shorter = (folder / "short.txt").string();
  write_file(shorter, "Too short.");
  refuses(" --calib " + shorter, 3, shorter + ": expected at least 512 tokens");
  refuses(" --target-ppl-increase 5% --valid " + shorter, 3, shorter + ": expected at least");
  // The paper's factors are of the weights alone.
  EXPECT_EQ(run_command("HLA_DATA_DIR=/no/such/folder " + std::string(HLA_BINARY) + " " + command +
                        " --rope paper")
                .code,
            0);
}

TEST(CliTest, FullDiskIsARuntimeErrorAndLeavesNothing) {
  EXPECT_EQ(run_hla("ppl " + stories() + " --ctx 64 --limit 1 --json /dev/full").code, 1);
  EXPECT_EQ(run_hla("info " + stories() + " >/dev/full").code, 1);
  const TempDir folder;
  // 200 blocks of 512 or 1024 bytes: less than the weights need.
  const CommandResult result =
      run_command("ulimit -f 200; " + std::string(HLA_BINARY) + " convert --no-calib " + stories() +
                  " " + (folder / "out").string());
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_TRUE(std::filesystem::is_empty(folder.path())) << result.err;
}

TEST(CliTest, ExistingOutputIsNeverOverwritten) {
  const TempDir folder;
  std::filesystem::create_directory(folder / "out");
  write_file(folder.path() / "out" / "precious.txt", "mine");
  const std::string command = "convert --no-calib " + stories() + " " + (folder / "out").string();
  EXPECT_EQ(run_hla(command).code, 2);
  EXPECT_NE(run_hla(command + " --force").code, 0);  // not a model folder
  EXPECT_EQ(read_file(folder.path() / "out" / "precious.txt"), "mine");
}

// Names of what lies in a folder.
std::vector<std::string> names_in(const std::filesystem::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

// Killed at any time, nothing half-written stands under the final name.
TEST(CliTest, KilledMidwayLeavesNoOutput) {
  const TempDir folder;
  const auto out = folder / "out";
  const std::string command = std::string(HLA_BINARY) + " convert " + stories() + " " +
                              out.string() + " --calib-tokens 200000 --calib-length 512";
  for (const char* signal : {"KILL", "TERM", "INT"}) {
    run_command("timeout -s " + std::string(signal) + " 1.5 " + command);
    EXPECT_FALSE(std::filesystem::exists(out)) << signal;
    // What there is of it stays for the same command; another one removes it.
    for (const std::string& name : names_in(folder.path())) EXPECT_EQ(name, ".out.hla-partial");
    EXPECT_EQ(run_hla("convert --no-calib " + stories() + " " + out.string()).code, 0);
    EXPECT_EQ(names_in(folder.path()), std::vector<std::string>{"out"});
    std::filesystem::remove_all(out);
  }
}

std::map<std::string, std::string> contents(const std::filesystem::path& folder) {
  std::map<std::string, std::string> files;
  for (const std::string& name : names_in(folder)) files[name] = read_file(folder / name);
  return files;
}

size_t complete_steps(const std::filesystem::path& steps) {
  const std::string text = read_file(steps);
  return text.empty() ? 0 : nlohmann::json::parse(text)["steps"].size();
}

// Not MODEL and OUT behind it; and is given again for another.
TEST(CliTest, AShareIsNoFactor) {
  const CommandResult result =
      run_hla("convert " + stories() + " /tmp/nowhere/out --target-ppl-increase 5");
  EXPECT_EQ(result.code, 2);
  EXPECT_NE(result.err.find("which is 500 %; did you mean 5%?"), std::string::npos) << result.err;
}

TEST(CliTest, SaysThatACalibrationTextIsShort) {
  const TempDir folder;
  write_file(folder / "short.txt", "Once upon a time there was a cat. It sat on a mat.");
  const auto said = [&](const std::string& options) {
    const CommandResult result =
        run_hla("convert " + stories() + " " + (folder / "out").string() + " --force --calib " +
                (folder / "short.txt").string() + " --calib-length 8 " + options);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.err;
  };
  EXPECT_NE(said("").find("tokens of the 65536 of --calib-tokens"), std::string::npos);
  EXPECT_NE(said("--calib-tokens 5").find("calibration takes 8 tokens"), std::string::npos);
  EXPECT_EQ(said("--calib-tokens 8").find("calib"), std::string::npos);
}

TEST(CliTest, CalibTakesOneText) {
  const TempDir folder;
  const std::string calib = "--calib " + testing::short_wikitext().string() + " ";
  EXPECT_EQ(run_hla("convert " + calib + calib + stories() + " " + (folder / "out").string() +
                    " --dry-run")
                .code,
            0);
}

// SIGKILL at random instants: the same command then gives the bytes of a run that nobody disturbed,
// whether the loss is read at once or a layer at a time.
TEST(CliTest, KilledConversionGoesOnToTheSameBytes) {
  const TempDir folder;
  const std::string options =
      " --calib " + testing::short_wikitext().string() +
      " --rope latent --calib-tokens 2048 --calib-length 256 --max-shard-size 150KB --threads 2 "
      "--report-perplexity --target-ppl-increase 10%";
  const auto command = [&](const std::filesystem::path& out, bool low_memory = false) {
    return std::string(HLA_BINARY) + " convert " + stories() + " " + out.string() + options +
           (low_memory ? " --low-memory" : "");
  };
  const auto start = std::chrono::steady_clock::now();
  ASSERT_EQ(run_command(command(folder / "whole")).code, 0);
  const auto whole_time = std::chrono::steady_clock::now() - start;
  const auto whole = contents(folder / "whole");
  ASSERT_TRUE(whole.contains("model.safetensors.index.json"));
  ASSERT_EQ(run_hla("info " + (folder / "whole").string()).code, 0);

  // How the loss is read, curvature, predicted loss, held-out perplexity of the base, trials; what
  // stands before the layers, the base's perplexity, five layers, what follows them. A layer at a
  // time, curvature is: the embedded text, five layers, the loss's gradient, five layers.
  const size_t steps_at_once =
      12 + nlohmann::json::parse(whole.at("hla_report.json"))["budget"]["trials"].size();
  std::mt19937 random(20);
  int resumed = 0;
  for (int round = 0; round < 8; ++round) {
    const bool low_memory = round % 2 == 0;
    const size_t whole_steps = steps_at_once + (low_memory ? 11 : 0);
    const auto out = folder / ("out" + std::to_string(round));
    const auto steps = folder.path() / ("." + out.filename().string() + ".hla-partial/steps.json");
    const size_t after_steps = random() % (whole_steps - 1);
    const auto pause = whole_time / whole_steps * (random() % 100) / 100;
    const pid_t child = fork();
    if (child == 0) {
      const std::string line = "exec " + command(out, low_memory) + " >/dev/null 2>&1";
      execl("/bin/sh", "sh", "-c", line.c_str(), nullptr);
      _exit(127);
    }
    while (complete_steps(steps) < after_steps && !std::filesystem::exists(out)) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::this_thread::sleep_for(pause);
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    if (!std::filesystem::exists(out)) {
      const size_t complete = complete_steps(steps);
      // As if it had been killed while it wrote the small files.
      if (complete > 0) write_file(steps.parent_path() / "output" / "config.json", "{");
      const CommandResult result = run_command(command(out, low_memory));
      ASSERT_EQ(result.code, 0) << result.err;
      if (complete > 0) {
        ++resumed;
        EXPECT_NE(result.err.find("going on after " + std::to_string(complete)), std::string::npos)
            << result.err;
      }
    }
    EXPECT_TRUE(contents(out) == whole) << "round " << round << ", after step " << after_steps;
  }
  EXPECT_GT(resumed, 0);
  for (const std::string& name : names_in(folder.path())) {
    EXPECT_EQ(name.find("partial"), std::string::npos) << name;
  }
}

TEST(CliTest, InterruptedConversionSaysHowToGoOn) {
  const TempDir folder;
  const std::string out = (folder / "out").string();
  const auto steps = folder.path() / ".out.hla-partial" / "steps.json";
  const std::string command = std::string(HLA_BINARY) + " convert " + stories() + " " + out +
                              " --calib-tokens 100000 --calib-length 512 --report-perplexity";
  // Interrupted as soon as a step is complete.
  const CommandResult result =
      run_command(command + " & pid=$!; while ! test -e " + steps.string() +
                  "; do sleep 0.02; done; sleep 0.1; kill -TERM $pid; wait $pid");
  EXPECT_EQ(result.code, 143) << result.err;
  EXPECT_NE(result.err.find("the same command goes on there"), std::string::npos) << result.err;
  EXPECT_EQ(names_in(folder.path()), std::vector<std::string>{".out.hla-partial"});
}

// One layer is in memory at a time: four times the layers take no more of it.
TEST(CliTest, ConversionMemoryDoesNotGrowWithLayers) {
  const TempDir folder;
  constexpr int64_t kMlp = 16384;
  constexpr int64_t kHidden = 256;
  const auto peak = [&](int64_t layers) {
    const auto model = folder / ("base" + std::to_string(layers));
    std::filesystem::create_directory(model);
    const nlohmann::json config = {{"model_type", "llama"},       {"hidden_size", kHidden},
                                   {"intermediate_size", kMlp},   {"num_attention_heads", 4},
                                   {"num_hidden_layers", layers}, {"vocab_size", 64},
                                   {"tie_word_embeddings", true}, {"torch_dtype", "bfloat16"}};
    write_file(model / "config.json", config.dump());
    std::vector<SafetensorsWriter::Entry> entries;
    for (const ParameterSpec& spec : parameter_specs(parse_model_config(config, "test"))) {
      entries.push_back({spec.name, DType::kBF16, spec.shape});
    }
    SafetensorsWriter writer(model / "model.safetensors", entries);
    const at::Tensor numbers = at::randn({kHidden * kMlp}).to(at::kBFloat16);
    for (const auto& entry : entries) {
      writer.write(entry.name, numbers.const_data_ptr(),
                   2 * static_cast<uint64_t>(c10::multiply_integers(entry.shape)));
    }
    writer.finish();
    const CommandResult result =
        run_hla("convert --no-calib --threads 1 --json - " + model.string() + " " +
                (folder / ("out" + std::to_string(layers))).string());
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out)["peak_rss_bytes"].get<double>();
  };
  const double layer_bytes = 3.0 * kMlp * kHidden * 2;
  EXPECT_LT(peak(8), peak(2) + 2 * layer_bytes);
}

TEST(CliTest, DryRunWritesNothing) {
  const TempDir folder;
  const std::string command = "convert " + stories() + " " + (folder / "out").string() +
                              " --rope latent --kv-ratio 0.25 --calib-tokens 1024 --dry-run";
  const CommandResult text = run_hla(command);
  EXPECT_EQ(text.code, 0) << text.err;
  for (const char* part : {"0-4", "25.0 %", "at the peak", "GFLOP/s", "1536 tokens"}) {
    EXPECT_NE(text.out.find(part), std::string::npos) << part << "\n" << text.out;
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  // Its plan can be converted by.
  const std::string plan = (folder / "plan.json").string();
  ASSERT_EQ(run_hla(command + " --json " + plan).code, 0);
  auto json = nlohmann::json::parse(read_file(plan));
  json["plan"]["layers"][2]["kv_rank"] = 5;
  write_file(plan, json.dump());
  const CommandResult made = run_hla("convert --no-calib " + stories() + " " +
                                     (folder / "out").string() + " --rope latent --plan " + plan);
  EXPECT_EQ(made.code, 0) << made.err;
  const auto config = nlohmann::json::parse(read_file(folder.path() / "out" / "config.json"));
  EXPECT_EQ(config["hla"]["layers"][2]["kv_rank"], 5);
  EXPECT_NE(config["hla"]["layers"][1]["kv_rank"], 5);
}

TEST(CliTest, WeightingsImplyTheAttentionObjective) {
  const TempDir folder;
  const auto objective = [&](const std::string& options) {
    const auto out = folder / "out";
    const std::string command = "convert " + stories() + " " + out.string() + " --force " + options;
    EXPECT_EQ(run_hla(command).code, 0) << options;
    return read_json_file(out / "hla_report.json")["objective"].get<std::string>();
  };
  const std::string short_text = "--calib-tokens 256 --calib-length 128 ";
  EXPECT_EQ(objective(short_text), "loss");
  EXPECT_EQ(objective(short_text + "--value-weight 0.3"), "attention");
  EXPECT_EQ(objective("--no-calib"), "attention");
}

// Half the cache, shared out over the layers where there is something to measure.
TEST(CliTest, ConvertHalvesTheCacheByDefault) {
  const TempDir folder;
  const auto convert = [&](const std::string& options) {
    const CommandResult result =
        run_hla("convert " + stories() + " " + (folder / "out").string() +
                " --force --json - --calib-tokens 1024 --calib-length 256 " + options);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out);
  };
  const auto shared_out = convert("");
  EXPECT_NEAR(shared_out["cache_ratio"].get<double>(), 0.5, 0.02);
  EXPECT_TRUE(shared_out["layers"][0].contains("predicted_loss"));
  for (const char* options : {"--kv-ratio 0.5", "--objective attention"}) {
    const auto uniform = convert(options);
    EXPECT_EQ(uniform["cache_ratio"], 0.5) << options;
    EXPECT_FALSE(uniform["layers"][0].contains("predicted_loss")) << options;
  }
}

TEST(CliTest, ConvertFitsTheOutputUnlessToldNotTo) {
  const TempDir folder;
  const auto out = folder / "out";
  const auto convert = [&](const std::string& options) {
    return run_hla("convert " + stories() + " " + out.string() +
                   " --force --calib-tokens 1024 --calib-length 256 " + options)
        .code;
  };
  const auto fitted = [&](const std::string& options) {
    EXPECT_EQ(convert(options), 0) << options;
    return read_json_file(out / "hla_report.json")["refit_output"].get<bool>();
  };
  EXPECT_TRUE(fitted(""));
  EXPECT_FALSE(fitted("--no-refit-output"));
  EXPECT_FALSE(fitted("--objective attention"));
  EXPECT_TRUE(fitted("--objective attention --refit-output"));
  EXPECT_EQ(convert("--refit-output --no-refit-output"), 2);
  EXPECT_EQ(
      run_hla("convert --no-calib --refit-output " + stories() + " " + (folder / "no").string())
          .code,
      2);
}

TEST(CliTest, ConvertShowsAndDrawsTheLayers) {
  const TempDir folder;
  const std::string plot = (folder / "plot.svg").string();
  const std::string command = "convert " + stories() + " " + (folder / "out").string() +
                              " --rope latent --plot " + plot +
                              " --calib-tokens 1024 --calib-length 256 --report-perplexity";
  const CommandResult result = run_hla(command);
  ASSERT_EQ(result.code, 0) << result.err;
  for (const char* part : {"attention", "k ranks", "perplexity"}) {
    EXPECT_NE(result.out.find(part), std::string::npos) << part << "\n" << result.out;
  }
  const std::string svg = read_file(plot);
  EXPECT_NE(svg.find("Error by layer"), std::string::npos);
  EXPECT_NE(svg.find("Rank by frequency"), std::string::npos);
  // What would do nothing, or write over something, is refused before the work.
  std::filesystem::remove_all(folder / "out");
  EXPECT_EQ(run_hla(command).code, 2);
  EXPECT_EQ(run_hla(command + " --force --dry-run").code, 2);
  EXPECT_EQ(run_hla("convert --no-calib --report-perplexity " + stories() + " " +
                    (folder / "out").string())
                .code,
            2);
  EXPECT_EQ(names_in(folder.path()), std::vector<std::string>{"plot.svg"});
}

// With no change to carry over it gives the conversion back.
TEST(CliTest, TransferOfTheBaseGivesTheConversion) {
  const TempDir folder;
  const std::string base = source_path("tests/data/models/gqa").string();
  const std::string hla = (folder / "hla").string();
  const std::string out = (folder / "out").string();
  ASSERT_EQ(run_hla("convert " + base + " " + hla + " --no-calib").code, 0);
  const std::string inputs = "transfer " + hla + " " + base + " " + base + " ";
  const CommandResult result = run_hla(inputs + out + " --json -");
  EXPECT_EQ(result.code, 0) << result.err;
  const auto report = nlohmann::json::parse(result.out);
  EXPECT_EQ(report["tuned_distance"], 0);
  EXPECT_EQ(report["factored_tensors"], 4);
  EXPECT_EQ(read_file(folder / "out/model.safetensors"),
            read_file(folder / "hla/model.safetensors"));
  EXPECT_EQ(read_json_file(folder / "out/config.json"), read_json_file(folder / "hla/config.json"));
  EXPECT_TRUE(std::filesystem::exists(folder / "out/modeling_hla.py"));
  EXPECT_EQ(run_hla(inputs + out).code, 2) << "it exists";
  EXPECT_EQ(run_hla(inputs + out + " --force").code, 0);
  EXPECT_EQ(run_hla(inputs + hla + " --force").code, 2) << "it is an input";
  EXPECT_EQ(run_hla("transfer " + base + " " + hla + " " + base + " " + out + " --force").code, 3);
  EXPECT_EQ(run_hla("transfer " + hla + " " + base).code, 2);
}

TEST(CliTest, InterruptsHaveTheirExitCodes) {
  const TempDir folder;
  const std::string command = std::string(HLA_BINARY) + " convert " + stories() + " " +
                              (folder / "out").string() +
                              " --calib-tokens 200000 --calib-length 512";
  EXPECT_EQ(run_command("timeout --preserve-status -s TERM 1.5 " + command).code, 143);
  EXPECT_EQ(run_command("timeout --preserve-status -s INT 1.5 " + command).code, 130);
}

TEST(CliTest, FindsModelsInTheHubCache) {
  const TempDir folder;
  const auto snapshot = folder.path() / "models--org--tiny" / "snapshots" / "abc";
  std::filesystem::create_directories(snapshot.parent_path());
  std::filesystem::copy(source_path("tests/data/models/gqa"), snapshot,
                        std::filesystem::copy_options::recursive);
  const std::string prefix = "HF_HUB_CACHE=" + folder.path().string() + " " + HLA_BINARY;
  EXPECT_EQ(run_command(prefix + " info org/tiny").code, 0);
  EXPECT_EQ(run_command(prefix + " info org/other").code, 3);
}

TEST(CliTest, GenerateContinuesPrompts) {
  const std::string command = "generate " + stories() + " -n 20 ";
  const CommandResult one = run_hla(command + "--prompt 'Once upon a time'");
  ASSERT_EQ(one.code, 0) << one.err;
  EXPECT_GT(one.out.size(), 20u);
  EXPECT_NE(one.err.find("tokens/s"), std::string::npos);
  // However it is asked for and shown, the text is the same.
  EXPECT_EQ(run_hla(command + "--prompt 'Once upon a time' --stream").out, one.out);
  EXPECT_EQ(run_hla(command + "--prompt 'Once upon a time' --echo").out,
            "Once upon a time" + one.out);
  EXPECT_EQ(
      run_command("printf 'Once upon a time' | " + std::string(HLA_BINARY) + " " + command).out,
      one.out);
  const TempDir folder;
  write_file(folder / "prompts.txt", "Once upon a time\n\nThe cat\n");
  const CommandResult two = run_hla(command + "--prompts " + (folder / "prompts.txt").string());
  EXPECT_EQ(two.out.rfind("--- 1\n" + one.out + "\n--- 2\n", 0), 0u) << two.out;
  write_file(folder / "prompts.jsonl", "\"Once upon a time\"\n{\"prompt\": \"The\\ncat\"}\n");
  const auto json = nlohmann::json::parse(
      run_hla(command + "--json - --prompts " + (folder / "prompts.jsonl").string()).out);
  ASSERT_EQ(json["continuations"].size(), 2u);
  EXPECT_EQ(json["continuations"][0]["text"].get<std::string>() + "\n", one.out);
  EXPECT_EQ(json["continuations"][1]["prompt"], "The\ncat");
  EXPECT_EQ(json["continuations"][0]["ids"].size(), 20u);
  EXPECT_EQ(json["decoded_tokens"], 38);
  EXPECT_EQ(json["device"], "cpu");
  EXPECT_EQ(json["cache_dtype"], "fp32");
  EXPECT_EQ(json["sampling"]["temperature"], 0.0);
  // One block of 256 tokens for each sequence: 5 layers of 2 x 32 floats.
  EXPECT_EQ(json["cache_bytes"], 2 * 256 * 5 * 64 * 4);
  const CommandResult half =
      run_hla(command + "--prompt 'Once upon a time' --cache-dtype fp16 --json -");
  ASSERT_EQ(half.code, 0) << half.err;
  EXPECT_EQ(nlohmann::json::parse(half.out)["cache_bytes"], 256 * 5 * 64 * 2);
}

// Not as in C, where 010 is 8, and not the nearest that fits.
TEST(CliTest, IntegersAreDecimal) {
  const std::string command = "generate " + stories() + " --prompt a --json - ";
  const auto seed = [&](const std::string& text) {
    const CommandResult result = run_hla(command + "-n 1 --temperature 1 --seed " + text);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out)["sampling"]["seed"].get<uint64_t>();
  };
  EXPECT_EQ(seed("010"), 10u);
  EXPECT_EQ(seed("18446744073709551615"), 18446744073709551615u);
  const CommandResult nine = run_hla(command + "-n 09");
  EXPECT_EQ(nlohmann::json::parse(nine.out)["continuations"][0]["ids"].size(), 9u);
  for (const char* options :
       {"--temperature 1 --seed 18446744073709551616", "--temperature 1 --seed -1", "-n 0x10",
        "-n 99999999999999999999", "-n 1e3", "-n 1.5"}) {
    const CommandResult result = run_hla(command + options);
    EXPECT_EQ(result.code, 2) << options;
    EXPECT_NE(result.err.find("expected an integer"), std::string::npos) << options << result.err;
  }
  const CommandResult windows =
      run_hla("ppl " + stories() + " --ctx 64 --windows 008 --json - --protocol gptq");
  EXPECT_EQ(nlohmann::json::parse(windows.out)["results"][0]["window_indices"],
            nlohmann::json::array({8}));
  EXPECT_EQ(run_hla(command + "-n 1 --absorb-error nan").code, 2);
}

// What a command has made, or reads, is no place for its report.
TEST(CliTest, ReportsDoNotReplaceWhatIsMadeOrRead) {
  const TempDir folder;
  const std::string out = (folder / "out").string();
  ASSERT_EQ(run_hla("convert " + stories() + " " + out + " --no-calib").code, 0);
  expect_refused(
      "convert " + stories() + " " + out + " --no-calib --force --json " + out + "/config.json",
      "is made anew");
  expect_refused("transfer " + out + " " + stories() + " " + stories() + " " + out + "-2 --json " +
                     out + "/model.safetensors --force",
                 "what is read");
  std::filesystem::copy_file(stories(), folder / "s.bin");
  std::filesystem::copy_file(source_path("data/stories260K/tok512.model"), folder / "tok512.model");
  expect_refused("generate " + (folder / "s.bin").string() + " --prompt a --force --json " +
                     (folder / "tok512.model").string(),
                 "what is read");
  EXPECT_EQ(run_hla("info " + out).code, 0);
  std::filesystem::create_directories(folder / "data/wikitext-2");
  std::filesystem::copy_file(source_path("data/wikitext-2/wiki.test.raw"),
                             folder / "data/wikitext-2/wiki.test.raw");
  for (const char* dataset : {"", " --dataset wikitext-2-raw --split test"}) {
    const CommandResult text =
        run_command("HLA_DATA_DIR=" + (folder / "data").string() + " HF_HUB_CACHE=/nowhere " +
                    HLA_BINARY + " ppl " + stories() + " --ctx 64 --limit 1 --force --csv " +
                    (folder / "data/wikitext-2/wiki.test.raw").string() + dataset);
    EXPECT_EQ(text.code, 2) << text.err;
    EXPECT_NE(text.err.find("what is read"), std::string::npos) << text.err;
  }
  // However stdout is spelt.
  expect_refused("generate " + stories() + " --prompt a --stream --json /dev/stdout",
                 "both are for stdout");
  expect_refused("ppl " + stories() + " --ctx 64 --limit 1 --json /dev/stdout --csv -",
                 "a second time");
  const CommandResult generated =
      run_hla("generate " + stories() + " --prompt a -n 2 --json /dev/fd/1");
  EXPECT_TRUE(nlohmann::json::parse(generated.out).is_object());
}

// A path need not be UTF-8, which JSON is.
TEST(CliTest, ReportsNameAnyPath) {
  const TempDir folder;
  const auto odd = folder / "mod\xe8le";
  std::filesystem::create_directory(odd);
  std::filesystem::copy_file(stories(), odd / "s.bin");
  std::filesystem::copy_file(source_path("data/stories260K/tok512.model"), odd / "tok512.model");
  const std::string model = "'" + (odd / "s.bin").string() + "'";
  for (const std::string& command :
       {"info " + model + " --json", "generate " + model + " --prompt a -n 1 --json -",
        "ppl " + model + " --ctx 64 --limit 1 --json -"}) {
    const CommandResult result = run_hla(command);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_TRUE(nlohmann::json::accept(result.out)) << command << result.out;
  }
}

TEST(CliTest, BenchTakesItsOwnSignals) {
  // More caches than any machine has memory for, also where their bytes are no 64-bit number.
  for (const char* batch : {"1000000000", "9223372036854775807"}) {
    const CommandResult result =
        run_hla("bench " + stories() + " -p 0 -n 1 -r 1 -b " + std::string(batch));
    EXPECT_EQ(result.code, 4) << batch << result.err;
  }
  // The process of the model is in the middle of a long prompt, and not told itself.
  const auto start = std::chrono::steady_clock::now();
  const CommandResult result =
      run_command(std::string(HLA_BINARY) + " bench " + stories() +
                  " -d 400000 -p 0 -n 1 -r 1 & p=$!; sleep 3; kill -TERM $p; wait $p; exit $?");
  EXPECT_EQ(result.code, 143) << result.err;
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

// What was there is shown.
TEST(CliTest, InterruptedContinuationsEndWhereTheyWere) {
  const auto interrupted = [](const std::string& options) {
    CommandResult result;
    // A busy machine takes longer to get to the prompt.
    for (int seconds = 3; result.out.empty() && seconds <= 48; seconds *= 2) {
      result = run_command("timeout --preserve-status -s INT " + std::to_string(seconds) + " " +
                           HLA_BINARY + " generate " + stories() +
                           " -n 200000 --max-length 400000 --ignore-eos --prompt Once" + options);
      EXPECT_EQ(result.code, 130) << result.err;
    }
    return result;
  };
  EXPECT_GT(interrupted("").out.size(), 5u);
  const CommandResult json = interrupted(" --json -");
  const auto report = nlohmann::json::parse(json.out);
  EXPECT_EQ(report["partial"], true);
  EXPECT_EQ(report["continuations"][0]["stopped_by"], "interrupted");
  EXPECT_GT(report["continuations"][0]["ids"].size(), 0u);
}

// Every option gets where it belongs.
TEST(CliTest, GenerateSamples) {
  const std::string command =
      "generate " + stories() + " -n 24 --json - --prompt 'Once upon a time' ";
  const auto sampled = [&](const std::string& options) {
    const CommandResult result = run_hla(command + options);
    EXPECT_EQ(result.code, 0) << options << result.err;
    return nlohmann::json::parse(result.out);
  };
  const auto ids_of = [&](const std::string& options) {
    return sampled(options)["continuations"][0]["ids"].get<std::vector<int>>();
  };
  const std::vector<int> greedy = ids_of("");
  const std::vector<int> hot = ids_of("--temperature 3 --seed 7");
  EXPECT_NE(hot, greedy);
  EXPECT_EQ(ids_of("--temperature 3 --seed 7"), hot);
  EXPECT_NE(ids_of("--temperature 3 --seed 8"), hot);
  EXPECT_NE(ids_of("--temperature 0.5 --seed 7"), hot);
  for (const char* one : {"--top-k 1", "--top-p 1e-6", "--min-p 1"}) {
    EXPECT_EQ(ids_of("--temperature 3 --seed 7 " + std::string(one)), greedy) << one;
  }
  const std::vector<int> penalised = ids_of("--repetition-penalty 1e6");
  EXPECT_EQ(std::set<int>(penalised.begin(), penalised.end()).size(), penalised.size());
  const auto settings = sampled(
      "--temperature 2 --top-k 9 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.5 --seed 3")
      ["sampling"];
  EXPECT_EQ(settings["temperature"], 2.0);
  EXPECT_EQ(settings["top_k"], 9);
  EXPECT_EQ(settings["top_p"], 0.9);
  EXPECT_EQ(settings["min_p"], 0.01);
  EXPECT_EQ(settings["repetition_penalty"], 1.5);
  EXPECT_EQ(settings["seed"], 3);
  const auto whole = sampled("")["continuations"][0]["text"].get<std::string>();
  const std::string stop = whole.substr(whole.size() / 2, 3);
  EXPECT_EQ(sampled("--stop '" + stop + "'")["continuations"][0]["text"],
            whole.substr(0, whole.find(stop)));
}

TEST(CliTest, GenerateRefuses) {
  const std::string command = "generate " + stories() + " ";
  EXPECT_EQ(run_hla(command + "--prompt a --temperature 1 --top-p 0").code, 2);
  EXPECT_EQ(run_hla(command + "--prompt a --top-k 5").code, 2);  // greedy
  EXPECT_EQ(run_hla(command + "--prompt a --stop \"$(printf '\\200')\"").code, 2);
  EXPECT_EQ(run_hla(command + "--prompt a --prompts b").code, 2);
  // Where it ends for want of positions, it says so.
  const CommandResult full =
      run_hla(command + "--prompt a --max-length 8 --absorb-error 1e-3 --attend rebuild");
  EXPECT_EQ(full.code, 0) << full.err;
  EXPECT_NE(full.err.find("prompt 1: ended at 8 tokens"), std::string::npos) << full.err;
  EXPECT_EQ(run_hla(command + "--prompt a --system b").code, 2);
  EXPECT_EQ(run_hla(command + "--prompt a --chat").code, 3);  // no template
  EXPECT_EQ(run_hla(command + "--prompt a --cache-dtype fp7").code, 2);
  const TempDir folder;
  EXPECT_NE(run_hla(command + "--prompt a --echo --json -").err.find("[--echo] has no effect"),
            std::string::npos);
  write_file(folder / "mark.txt",
             "\xEF\xBB\xBF"
             "a\n");
  const CommandResult marked =
      run_hla(command + "-n 1 --json - --prompts " + (folder / "mark.txt").string());
  EXPECT_EQ(nlohmann::json::parse(marked.out)["continuations"][0]["prompt"], "a");
  write_file(folder / "two.txt", "a\nb\n");
  EXPECT_EQ(run_hla(command + "--stream --prompts " + (folder / "two.txt").string()).code, 2);
  write_file(folder / "none.txt", "\n");
  EXPECT_EQ(run_hla(command + "--prompts " + (folder / "none.txt").string()).code, 3);
  write_file(folder / "bad.jsonl", "{\"text\": 1}\n");
  const CommandResult bad = run_hla(command + "--prompts " + (folder / "bad.jsonl").string());
  EXPECT_EQ(bad.code, 3);
  EXPECT_NE(bad.err.find("line 1"), std::string::npos) << bad.err;
  const CommandResult longer = run_hla(command + "--prompt 'one two three four' --max-length 3");
  EXPECT_EQ(longer.code, 3);
  EXPECT_NE(longer.err.find("--max-length"), std::string::npos) << longer.err;
}

TEST(CliTest, BenchComparesModels) {
  const TempDir folder;
  const std::string half = (folder / "half").string();
  ASSERT_EQ(run_hla("convert " + stories() + " " + half + " --no-calib --kv-ratio 0.5").code, 0);
  const std::string command =
      "bench " + stories() + " " + half + " -p 16 -n 3 -d 20,0 -b 1,2 -r 2 ";
  const CommandResult table = run_hla(command + "--csv " + (folder / "a.csv").string() +
                                      " --plot " + (folder / "a.svg").string());
  ASSERT_EQ(table.code, 0) << table.err;
  EXPECT_NE(table.out.find("| stories260K.bin | pp16 | 0 | 1 |"), std::string::npos) << table.out;
  EXPECT_NE(table.out.find("| half | tg3 | 20 | 2 |"), std::string::npos) << table.out;
  EXPECT_NE(table.out.find("memory is read at"), std::string::npos);
  EXPECT_NE(table.out.find("half: decoding takes "), std::string::npos) << table.out;
  const std::string csv = read_file(folder / "a.csv");
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 1 + 2 * 3 * 2 * 2);
  EXPECT_NE(read_file(folder / "a.svg").find("half, batch 2"), std::string::npos);

  const auto json = nlohmann::json::parse(run_hla(command + "--json -").out);
  EXPECT_GT(json["bandwidth"], 0);
  EXPECT_EQ(json["models"], (std::vector<std::string>{stories(), (folder / "half").string()}));
  EXPECT_EQ(json["cache_dtype"], "auto");
  ASSERT_EQ(json["results"].size(), 12u);
  const auto& base = json["results"][10];
  const auto& row = json["results"][11];  // deepest, largest batch, second model
  EXPECT_EQ(row["model"], "half");
  EXPECT_EQ(row["depth"], 20);
  EXPECT_EQ(row["batch"], 2);
  EXPECT_EQ(row["seconds"].size(), 2u);
  EXPECT_EQ(base["speedup"], 1.0);
  // Two sequences of a block each; records of 20 tokens are read.
  const ModelConfig config =
      parse_model_config(read_json_file(folder / "half" / "config.json"), "config.json");
  const auto token = static_cast<uint64_t>(config.cache_bytes_per_token(4));
  EXPECT_EQ(row["cache_bytes"], 2 * 256 * token);
  EXPECT_EQ(row["cached_bytes"], 2 * 20 * token);
  const double base_bytes = base["weight_bytes"].get<double>() + base["cached_bytes"].get<double>();
  const double bytes = row["weight_bytes"].get<double>() + row["cached_bytes"].get<double>();
  EXPECT_DOUBLE_EQ(row["bound"], base_bytes / bytes);
  EXPECT_GE(row["peak_rss_bytes"], row["rss_bytes"]);
  // A Llama has nothing to rebuild; what the conversion would rebuild costs more than one reading.
  ASSERT_EQ(json["attending"].size(), 2u);
  EXPECT_EQ(json["attending"][0]["rebuild_products"], 0);
  EXPECT_EQ(json["attending"][1]["model"], "half");
  EXPECT_GT(json["attending"][1]["rebuild_products"], json["attending"][1]["decode_products"]);
  EXPECT_GT(json["attending"][1]["rebuilds_from"], 1);
  EXPECT_LE(json["attending"][1]["prompt_rebuilds_from"], json["attending"][1]["rebuilds_from"]);
  EXPECT_GT(json["attending"][1]["prompt_rebuilds_from"], 0);
}

// Memory is that of the test's own sequences, whatever the tests and repetitions before had.
TEST(CliTest, BenchMeasuresTheMemoryOfEveryBatch) {
  const CommandResult result =
      run_hla("bench " + stories() + " -p 0 -n 1 -d 4096 -b 16,1 -r 2 --json -");
  ASSERT_EQ(result.code, 0) << result.err;
  const auto rows = nlohmann::json::parse(result.out)["results"];
  ASSERT_EQ(rows.size(), 2u);
  const bool resets_peaks =
      static_cast<bool>(std::ofstream("/proc/self/clear_refs") << "5" << std::flush);
  for (const std::string key : {"rss_bytes", "peak_rss_bytes"}) {
    if (key == "peak_rss_bytes" && !resets_peaks) continue;
    const double less = rows[0][key].get<double>() - rows[1][key].get<double>();
    const double caches =
        rows[0]["cache_bytes"].get<double>() - rows[1]["cache_bytes"].get<double>();
    EXPECT_GT(caches, 50e6);
    EXPECT_GT(less, 0.8 * caches) << key;
  }
  EXPECT_NE(result.err.find("max_position_embeddings"), std::string::npos) << result.err;
}

TEST(CliTest, BenchTakesTurns) {
  // To one token of the longest sequence, so that a test that left its tokens would fail the next.
  const CommandResult result =
      run_hla("bench " + stories() + " " + stories() + " -p 0 -n 11 -d 500 -r 2 --json -");
  ASSERT_EQ(result.code, 0) << result.err;
  for (const auto& row : nlohmann::json::parse(result.out)["results"]) {
    const auto turns = row["turns"].get<std::vector<double>>();
    const auto seconds = row["seconds"].get<std::vector<double>>();
    ASSERT_EQ(turns.size(), 4u);  // of 8 and 3 steps, twice
    ASSERT_EQ(seconds.size(), 2u);
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_DOUBLE_EQ(turns[2 * i] + turns[2 * i + 1], seconds[i]);
      EXPECT_GT(turns[2 * i + 1], 0);
    }
  }
}

// A prompt of its own before the first step of all, to one token of the longest sequence.
TEST(CliTest, BenchReadsPromptsAtTheLongestDepth) {
  const CommandResult result =
      run_hla("bench " + stories() + " " + stories() + " -p 16 -n 4 -d 512 -r 1 --json -");
  ASSERT_EQ(result.code, 0) << result.err;
  const auto rows = nlohmann::json::parse(result.out)["results"];
  ASSERT_EQ(rows.size(), 4u);
  // The same model twice has two names.
  EXPECT_NE(rows[0]["model"], rows[1]["model"]);
}

TEST(CliTest, BenchRefuses) {
  const std::string command = "bench " + stories() + " ";
  EXPECT_EQ(run_hla("bench").code, 2);
  EXPECT_EQ(run_hla(command + "-p 0 -n 0").code, 2);
  EXPECT_EQ(run_hla(command + "-b 0").code, 2);
  EXPECT_EQ(run_hla(command + "-d x").code, 2);
  EXPECT_EQ(run_hla(command + "--cache-dtype fp7").code, 2);
  EXPECT_EQ(run_hla(command + "--absorb-error 2").code, 2);
  EXPECT_EQ(run_hla(command + "--plot -").code, 2);
  EXPECT_NE(run_hla(command + "-n 0 -p 8 --plot /tmp/x.svg --force").err.find("[--plot] draws"),
            std::string::npos);
  EXPECT_EQ(run_hla("-v -q " + command).code, 2);
  EXPECT_EQ(run_hla(command + "--json - --csv -").code, 2);
  EXPECT_EQ(run_hla(command + "--json /tmp/x --csv /tmp/../tmp/x").code, 2);
  // What a model's process finds out comes back with its exit code.
  const CommandResult missing = run_hla("bench /nowhere/model -n 1");
  EXPECT_EQ(missing.code, 3);
  EXPECT_NE(missing.err.find("/nowhere/model"), std::string::npos) << missing.err;
  const CommandResult large = run_hla(command + "-p 0 -n 1 -d 2000000000");
  EXPECT_EQ(large.code, 4) << large.err;
  EXPECT_NE(large.err.find("the caches of all models and the memory test: needs about 2.56 TB"),
            std::string::npos)
      << large.err;
  // Each of them would fit: they are in memory together.
  const uint64_t available = available_memory_bytes();
  const ModelConfig config = parse_model_config(Checkpoint::open(stories()).config(), "stories");
  const auto depth = static_cast<uint64_t>(0.7 * static_cast<double>(available)) /
                     static_cast<uint64_t>(config.cache_bytes_per_token(4));
  const CommandResult two =
      run_hla("bench " + stories() + " " + stories() + " -p 0 -n 1 -d " + std::to_string(depth));
  EXPECT_EQ(two.code, 4) << two.err;
  EXPECT_NE(two.err.find("the caches of all models"), std::string::npos) << two.err;
}

TEST(CliTest, BenchNamesAModelOfNaN) {
  const TempDir folder;
  const std::string bad = broken_model(folder);
  for (const char* tests : {" -p 0 -n 2 -r 1", " -p 8 -n 0 -r 1"}) {
    const CommandResult result = run_hla("bench " + stories() + " " + bad + tests);
    EXPECT_EQ(result.code, 5) << result.err;
    EXPECT_NE(result.err.find(bad + ": logits: NaN or Inf"), std::string::npos) << result.err;
  }
}

// Depths that were through are not lost with the one that was not.
TEST(CliTest, InterruptedBenchPrintsWhatItHas) {
  const TempDir folder;
  const std::string json = (folder / "bench.json").string();
  const std::string text =
      interrupted_hla("bench " + stories() + " -p 0 -n 2 -r 1 -d 0,4,200000 --json " + json);
  EXPECT_NE(text.find("PARTIAL"), std::string::npos) << text;
  const nlohmann::json report = read_json_file(json);
  EXPECT_EQ(report["partial"], true);
  ASSERT_EQ(report["results"].size(), 2U);
  EXPECT_EQ(report["results"][1]["depth"], 4);
}

// As the kernel does where memory is out.
TEST(CliTest, BenchWhoseModelIsKilledExitsWith4) {
  const CommandResult result = run_command(
      std::string(HLA_BINARY) + " bench " + stories() + " -n 100000 & pid=$!; sleep 2; " +
      "set -- $(cat /proc/$pid/task/$pid/children); kill -9 $1; wait $pid");
  EXPECT_EQ(result.code, 4) << result.err;
  EXPECT_NE(result.err.find("ended unexpectedly: killed"), std::string::npos) << result.err;
}

// LibTorch must get to throw: symbols that it shares with another library once made it abort.
TEST(CliTest, FailedAllocationsExitWith4) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer takes more address space than this limit";
#endif
  const CommandResult result =
      run_command("ulimit -v 1500000; " + std::string(HLA_BINARY) + " generate " + stories() +
                  " --prompt a -n 30000000 --max-length 30000000 --threads 1 --device cpu");
  EXPECT_EQ(result.code, 4) << result.err;
  EXPECT_NE(result.err.find("can't allocate memory"), std::string::npos) << result.err;
}

// The sentencepiece library says on std::cerr what is wrong with it, and must have one.
TEST(CliTest, SentencePieceModelsThatFailTheirTestExitWith3) {
  const TempDir folder;
  const std::string sample = {0x22, 0x0A, 0x0A, 0x08, 0x0A, 0x01, 'a', 0x12, 0x03, 'x', 'y', 'z'};
  write_file(folder / "bad.model",
             read_file(source_path("data/stories260K/tok512.model")) + sample);
  write_file(folder / "text", "Hi");
  const CommandResult result = run_hla("tokenize --ids --text " + (folder / "text").string() + " " +
                                       (folder / "bad.model").string());
  EXPECT_EQ(result.code, 3) << result.err;
  EXPECT_NE(result.err.find("bad.model: not a SentencePiece model"), std::string::npos)
      << result.err;
}

TEST(CliTest, PromptsAreUtf8) {
  const TempDir folder;
  const std::string command = "generate " + stories() + " -n 1 --json - ";
  write_file(folder / "prompts.txt", "fine\nna\xefve\n");
  const CommandResult of_file = run_hla(command + "--prompts " + (folder / "prompts.txt").string());
  EXPECT_EQ(of_file.code, 3);
  EXPECT_NE(of_file.err.find("prompts.txt, line 2"), std::string::npos) << of_file.err;
  EXPECT_EQ(run_hla(command + "--prompt 'na\xefve'").code, 3);
  EXPECT_EQ(run_command("echo 'na\xefve' | " + std::string(HLA_BINARY) + " " + command).code, 3);
}

TEST(CliTest, ConvertRefusesOptionsWithoutEffect) {
  const TempDir folder;
  const auto message = [&](const std::string& options) {
    const CommandResult result =
        run_hla("convert " + stories() + " " + (folder / "out").string() + " " + options);
    EXPECT_EQ(result.code, 2) << options;
    return result.err;
  };
  for (const auto& [options, named] : std::vector<std::pair<std::string, std::string>>{
           {"--no-calib --calib-tokens 100", "--calib-tokens"},
           {"--no-calib --objective loss", "--objective"},
           {"--no-calib --low-memory", "--low-memory"},
           {"--rotary-fraction 0.5", "--rotary-fraction"},
           {"--rope paper --calib x.txt", "--calib"},
           {"--rope paper --key-weighting plain", "--key-weighting"}}) {
    EXPECT_NE(message(options).find("[" + named + "]"), std::string::npos) << options;
  }
  const std::string file = (folder / "x").string();
  EXPECT_NE(message("--json " + file + " --plot " + file).find("a second time"), std::string::npos);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(CliTest, TokenizeShowsPieces) {
  const TempDir folder;
  write_file(folder / "text", "Hi\n本\x01日");
  const std::string command = "tokenize --text " + (folder / "text").string() + " ";
  const std::string cosmo2 = source_path("data/tokenizers/cosmo2").string();
  const CommandResult text = run_hla(command + cosmo2 + " --pieces");
  EXPECT_EQ(text.code, 0) << text.err;
  EXPECT_EQ(text.out,
            "26843\tHi\t\"Hi\"\n198\tĊ\t\"\\n\"\n40993\tæľ¬\t\"本\"\n191\tā\t\"\\u{0001}\"\n"
            "23274\tæĹ\t\"\\xE6\\x97\"\n115\t¥\t\"\\xA5\"\n");
  const auto json = nlohmann::json::parse(run_hla(command + cosmo2 + " --pieces --json").out);
  EXPECT_EQ(json["tokens"], 6);
  EXPECT_EQ(json["pieces"][2], (nlohmann::json{{"id", 40993}, {"piece", "æľ¬"}, {"text", "本"}}));
  // A piece of SentencePiece that is a part of a character.
  const auto parts = nlohmann::json::parse(run_hla(command + stories() + " --pieces --json").out);
  EXPECT_EQ(parts["pieces"][0], (nlohmann::json{{"id", 1}, {"piece", "<s>"}, {"text", "<s>"}}));
  EXPECT_NE(std::find(parts["pieces"].begin(), parts["pieces"].end(),
                      nlohmann::json{
                          {"id", 233}, {"piece", "<0xE6>"}, {"text", "\uFFFD"}, {"bytes", {0xE6}}}),
            parts["pieces"].end());
}

TEST(CliTest, TokenizeChecksGoldens) {
  const std::string cosmo2 = source_path("data/tokenizers/cosmo2").string();
  for (const std::string& tokenizer :
       {cosmo2, stories(), source_path("data/stories260K/tok512.model").string()}) {
    for (const std::string& command :
         {"tokenize " + tokenizer + " --check", "tokenize --check " + tokenizer}) {
      const CommandResult result = run_hla(command);
      EXPECT_EQ(result.code, 0) << result.out << result.err;
      EXPECT_EQ(result.err, "");
      EXPECT_NE(result.out.find(" pairs\n"), std::string::npos);
    }
  }
  EXPECT_EQ(run_hla("tokenize " + cosmo2 + " --check --ids").code, 2);

  // A folder whose tokenizer is another one, and whose config does not go with it.
  const TempDir folder;
  std::filesystem::copy_file(source_path("tests/data/text/llama3_style.json"),
                             folder / "tokenizer.json");
  const CommandResult missing = run_hla("tokenize " + folder.path().string() + " --check");
  EXPECT_EQ(missing.code, 3);
  EXPECT_NE(missing.err.find("make_tokenizer_goldens.py"), std::string::npos) << missing.err;
  write_file(folder / "tokenizer_goldens.json",
             R"({"source": "test", "pairs": [{"text": "", "ids": []},
                 {"text": "a\nb", "ids": [66, 9999]}]})");
  write_file(folder / "config.json", R"({"vocab_size": 5})");
  const CommandResult wrong = run_hla("tokenize " + folder.path().string() + " --check");
  EXPECT_EQ(wrong.code, 3);
  for (const char* part : {"1 of 2 pairs", "\"a\\nb\"", "9999 (not in the vocabulary)"}) {
    EXPECT_NE(wrong.out.find(part), std::string::npos) << wrong.out;
  }
  EXPECT_NE(wrong.err.find("vocab_size 5"), std::string::npos) << wrong.err;
  const auto json =
      nlohmann::json::parse(run_hla("tokenize " + folder.path().string() + " --check --json").out);
  EXPECT_EQ(json["agree"], 1);
  EXPECT_EQ(json["mismatches"][0]["pair"], 1);
  EXPECT_EQ(json["mismatches"][0]["expected"], (nlohmann::json{66, 9999}));
  EXPECT_EQ(json["warnings"].size(), 1u);
  // Another file of goldens.
  EXPECT_EQ(
      run_hla("tokenize " + cosmo2 + " --check " + (folder / "tokenizer_goldens.json").string())
          .code,
      3);
}

TEST(CliTest, ConvertCarriesTheGoldens) {
  const TempDir folder;
  const std::string out = (folder / "out").string();
  EXPECT_EQ(run_hla("convert --no-calib " + stories() + " " + out).code, 0);
  EXPECT_EQ(run_hla("tokenize " + out + " --check").code, 0);
}

}  // namespace
}  // namespace hla
