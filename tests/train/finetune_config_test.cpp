#include "hla/train/finetune_config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "hla/io/json_file.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::TempDir;
using testing::write_file;

TEST(FinetuneConfigTest, TakesDefaultsThenTheFileThenAssignments) {
  const TempDir folder;
  write_file(folder / "run.json", R"({
    // comments are allowed
    "model": "m", /* and these */ "optimizer": {"learning_rate": 1e-3, "beta1": 0.8},
    "train.batch_rows": 2
  })");
  const ResolvedConfig resolved = resolve_config(
      folder / "run.json", {"optimizer.beta1=0.7", "output=a=b", "data.train=x.txt,y.txt"});
  EXPECT_EQ(resolved.config.model, "m");
  EXPECT_EQ(resolved.config.output, "a=b");
  EXPECT_EQ(resolved.config.optimizer.learning_rate, 1e-3);
  EXPECT_EQ(resolved.config.optimizer.beta1, 0.7);
  EXPECT_EQ(resolved.config.optimizer.beta2, 0.999);
  EXPECT_EQ(resolved.config.train.batch_rows, 2);
  EXPECT_EQ(resolved.config.data.train, (std::vector<std::string>{"x.txt", "y.txt"}));
  EXPECT_EQ(resolved.origin.at("model"), (folder / "run.json").string());
  EXPECT_EQ(resolved.origin.at("optimizer.beta1"), "--set");
  EXPECT_EQ(resolved.origin.at("optimizer.beta2"), "default");
}

TEST(FinetuneConfigTest, WhatIsPrintedCanBeRead) {
  const TempDir folder;
  const ResolvedConfig resolved =
      resolve_config({}, {"model=some \"folder\"", "schedule.final_ratio=0.1",
                          "data.train=[\"a\", \"b,c\"]", "eval.patience=2"});
  write_file(folder / "printed.json", to_commented_json(resolved));
  const ResolvedConfig again = resolve_config(folder / "printed.json", {});
  EXPECT_EQ(to_json(again)["config"], to_json(resolved)["config"]);
  EXPECT_EQ(again.config.data.train, (std::vector<std::string>{"a", "b,c"}));
  EXPECT_EQ(to_json(resolved)["origin"]["eval.patience"], "--set");
  EXPECT_NE(to_commented_json(resolved).find("behind the warm-up: cosine, linear, constant\n"),
            std::string::npos);
  // Every key is documented.
  FinetuneConfig config;
  for (const ConfigField& field : config_fields(config)) {
    EXPECT_FALSE(field.doc.empty()) << field.key;
    EXPECT_NE(to_commented_json(resolved).find("// " + field.doc), std::string::npos) << field.key;
  }
}

TEST(FinetuneConfigTest, CommittedConfigsCanBeRead) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(testing::source_path("configs"))) {
    SCOPED_TRACE(entry.path());
    const FinetuneConfig config = resolve_config(entry.path(), {}).config;
    EXPECT_FALSE(config.model.empty());
    EXPECT_FALSE(config.output.empty());
    ++count;
  }
  EXPECT_GE(count, 5);
}

TEST(FinetuneConfigTest, NamesEveryProblem) {
  const TempDir folder;
  write_file(folder / "bad.json", R"({"optimiser": {"learning_rate": 1}, "train": {"epochs": "two",
    "batch_rows": 0, "parameters": "some"}, "data": {"train": [1], "contxt": 3}, "model": 5})");
  const Error error = error_of([&] { resolve_config(folder / "bad.json", {}); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  for (const char* part :
       {"did you mean optimizer.learning_rate?", "train.epochs", "train.batch_rows",
        "expected one of all, attention, factors, got some", "data.train: expected a list",
        "did you mean data.context?", "model: expected a text, got 5"}) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
  // Not as if it were not there.
  write_file(folder / "null.json", R"({"train": {"epochs": null}, "eval": {"windows": null}})");
  const std::string nulls = error_of([&] { resolve_config(folder / "null.json", {}); }).what();
  EXPECT_NE(nulls.find("train.epochs: expected a number, got null"), std::string::npos) << nulls;
  EXPECT_NE(nulls.find("eval.windows: expected a number, got null"), std::string::npos) << nulls;
  // Their product is a number of rows.
  EXPECT_EQ(error_of([] { resolve_config({}, {"train.batch_rows=9223372036854775807"}); }).code(),
            ExitCode::kUsage);
  write_file(folder / "twice.json", R"({"data": {"seed": 1}, "data.seed": 2})");
  EXPECT_EQ(error_of([&] { resolve_config(folder / "twice.json", {}); }).code(),
            ExitCode::kBadInput);
  for (const std::string text : {"output=caf\xe9", "data.train=[\"caf\xe9\"]"}) {
    EXPECT_EQ(error_of([&] { resolve_config({}, {text}); }).code(), ExitCode::kUsage) << text;
  }
  // Without its section, or in another one.
  const auto problem_of = [&](const std::string& assignment) {
    return std::string(error_of([&] { resolve_config({}, {assignment}); }).what());
  };
  EXPECT_NE(problem_of("learning_rate=1").find("did you mean optimizer.learning_rate?"),
            std::string::npos);
  EXPECT_NE(problem_of("context=1").find("did you mean data.context or eval.context?"),
            std::string::npos);
  EXPECT_EQ(problem_of("train.sparkle=1").find("did you mean"), std::string::npos);
  // Nothing in a section that there is not, nor where no section is.
  for (const std::string text : {R"({"optimizr": {}})", R"({"model": {}})"}) {
    write_file(folder / "empty.json", text);
    EXPECT_EQ(error_of([&] { resolve_config(folder / "empty.json", {}); }).code(),
              ExitCode::kBadInput)
        << text;
  }
  write_file(folder / "empty.json", R"({"optimizer": {}})");
  EXPECT_EQ(resolve_config(folder / "empty.json", {}).origin.at("optimizer.beta1"), "default");
  const Error usage = error_of([] { resolve_config({}, {"eval.patence=1", "model"}); });
  EXPECT_EQ(usage.code(), ExitCode::kUsage);
  EXPECT_NE(std::string(usage.what()).find("did you mean eval.patience?"), std::string::npos);
  EXPECT_NE(std::string(usage.what()).find("expected KEY=VALUE, got model"), std::string::npos);
}

}  // namespace
}  // namespace hla
