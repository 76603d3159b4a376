#include "hla/io/work_dir.h"

#include "test_util.h"

namespace hla {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::error_of;
using testing::read_file;
using testing::TempDir;
using testing::write_file;

const json kFingerprint = {{"options", {{"rank", 3}}}, {"base", "a"}};

size_t entries(const fs::path& folder) {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(folder)) ++count;
  return count;
}

TEST(WorkDirTest, AppearsWhole) {
  const TempDir folder;
  {
    WorkDir dir(folder / "out", false);
    dir.begin(kFingerprint, false);
    write_file(dir.output() / "config.json", "{}");
    EXPECT_FALSE(fs::exists(folder / "out"));
  }
  EXPECT_EQ(entries(folder.path()), 0u) << "no step was complete";
  WorkDir dir(folder / "out", false);
  dir.begin(kFingerprint, false);
  write_file(dir.output() / "config.json", "{}");
  write_file(dir.scratch() / "temporary", "");
  dir.complete("only");
  dir.commit();
  EXPECT_EQ(read_file(folder.path() / "out" / "config.json"), "{}");
  EXPECT_EQ(entries(folder.path() / "out"), 1u);
}

TEST(WorkDirTest, RemovesItsOwnFolderWhenDone) {
  const TempDir folder;
  {
    WorkDir dir(folder / "out", false);
    dir.begin(kFingerprint, false);
    dir.complete("only");
    dir.commit();
  }
  EXPECT_EQ(entries(folder.path()), 1u);
}

// Makes two steps of an output that is not finished.
void leave_two_steps(const fs::path& target) {
  WorkDir dir(target, false);
  dir.begin(kFingerprint, false);
  for (const char* step : {"one", "two"}) {
    dir.step(step, [&] {
      write_file(dir.output() / step, step);
      return json{{"made", step}};
    });
  }
}

TEST(WorkDirTest, GoesOnWithCompleteSteps) {
  const TempDir folder;
  leave_two_steps(folder / "out");
  EXPECT_TRUE(fs::exists(folder / ".out.hla-partial"));
  WorkDir dir(folder / "out", false);
  dir.begin(kFingerprint, false);
  EXPECT_EQ(dir.step("two", []() -> json { throw_runtime("is complete"); })["made"], "two");
  EXPECT_EQ(dir.result("three"), nullptr);
  dir.complete("three");
  dir.commit();
  EXPECT_EQ(read_file(folder.path() / "out" / "one"), "one");
}

TEST(WorkDirTest, StartsOverWhereItCannotGoOn) {
  json other = kFingerprint;
  other["options"]["rank"] = 4;
  const auto starts_over = [](const json& fingerprint, bool restart, auto damage) {
    const TempDir folder;
    leave_two_steps(folder / "out");
    damage(folder / ".out.hla-partial");
    WorkDir dir(folder / "out", false);
    dir.begin(fingerprint, restart);
    return dir.result("one") == nullptr && fs::is_empty(dir.output());
  };
  const auto nothing = [](const fs::path&) {};
  EXPECT_FALSE(starts_over(kFingerprint, false, nothing));
  EXPECT_TRUE(starts_over(kFingerprint, true, nothing));
  EXPECT_TRUE(starts_over(other, false, nothing));
  EXPECT_TRUE(starts_over(kFingerprint, false,
                          [](const fs::path& root) { fs::remove(root / "steps.json"); }));
}

TEST(WorkDirTest, SaysWhatIsOther) {
  const TempDir folder;
  leave_two_steps(folder / "out");
  json other = kFingerprint;
  other["options"]["rank"] = 4;
  WorkDir dir(folder / "out", false);
  ::testing::internal::CaptureStderr();
  dir.begin(other, false);
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("(options/rank)"), std::string::npos) << said;
}

// Of what is known early, before the rest has cost any time.
TEST(WorkDirTest, OtherSettingsAreRefusedByThePartThatIsKnown) {
  const TempDir folder;
  leave_two_steps(folder / "out");
  const auto refusal = [&](const json& settings) -> std::string {
    const WorkDir dir(folder / "out", false);
    try {
      dir.check_settings(settings);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal({{"options", {{"rank", 3}}}}), "");
  EXPECT_NE(refusal({{"options", {{"rank", 4}}}}).find("other settings (options/rank); give"),
            std::string::npos);
  EXPECT_EQ(refusal({{"options", {{"rank", 4}}}, {"command", "convert"}}), "") << "begin() does";
  write_file(folder / ".out.hla-partial" / "steps.json", "{");
  EXPECT_EQ(refusal({{"options", {{"rank", 4}}}}), "") << "begin() does";
  EXPECT_TRUE(fs::exists(folder / ".out.hla-partial" / "output" / "one"));
}

// What another command has made there may have taken hours.
TEST(WorkDirTest, WhatAnotherCommandLeftIsRefused) {
  const TempDir folder;
  json mine = kFingerprint;
  mine["command"] = "finetune";
  {
    WorkDir dir(folder / "out", false);
    dir.begin(mine, false);
    write_file(dir.scratch() / "checkpoint", "weights");
    dir.complete("one");
  }
  json other = kFingerprint;
  for (const json& command : {json("convert"), json()}) {
    other["command"] = command;
    WorkDir dir(folder / "out", false);
    const Error error = error_of([&] { dir.begin(other, false); });
    EXPECT_EQ(error.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(error.what()).find("was begun by hla finetune"), std::string::npos)
        << error.what();
  }
  EXPECT_EQ(read_file(folder.path() / ".out.hla-partial" / "scratch" / "checkpoint"), "weights");
  WorkDir dir(folder / "out", false);
  dir.begin(other, /*restart=*/true);
  EXPECT_TRUE(fs::is_empty(dir.scratch()));
}

// Nor may what cannot be read go: whose it is cannot be told.
TEST(WorkDirTest, WhatCannotBeReadIsRefused) {
  for (const char* text : {"{", "[]", R"({"format": 99, "steps": {}, "fingerprint": {}})"}) {
    SCOPED_TRACE(text);
    const TempDir folder;
    leave_two_steps(folder / "out");
    write_file(folder.path() / ".out.hla-partial" / "steps.json", text);
    {
      WorkDir dir(folder / "out", false);
      const Error error = error_of([&] { dir.begin(kFingerprint, false); });
      EXPECT_EQ(error.code(), ExitCode::kUsage);
    }
    EXPECT_TRUE(fs::exists(folder.path() / ".out.hla-partial" / "output" / "one"));
  }
}

// A run that was killed between the renaming and the removal of its work folder.
TEST(WorkDirTest, WhatIsFinishedIsNotTakenUp) {
  for (const bool replaces : {false, true}) {
    SCOPED_TRACE(replaces);
    const TempDir folder;
    const fs::path out = folder / "out";
    leave_two_steps(out);
    if (replaces) {
      fs::create_directory(out);
      write_file(out / "config.json", "old");
      fs::copy(out, folder / "left", fs::copy_options::recursive);  // where it goes in exchange
    }
    const fs::path copy = folder / "steps.json";
    {
      WorkDir dir(out, replaces);
      dir.begin(kFingerprint, false);
      write_file(dir.output() / "config.json", "new");
      dir.commit();
      fs::copy_file(dir.root() / "steps.json", copy);
    }
    fs::create_directory(folder / ".out.hla-partial");
    fs::rename(copy, folder.path() / ".out.hla-partial" / "steps.json");
    if (replaces) fs::rename(folder / "left", folder.path() / ".out.hla-partial" / "output");
    WorkDir dir(out, true);
    dir.begin(kFingerprint, false);
    EXPECT_EQ(dir.result("one"), nullptr);
    EXPECT_TRUE(fs::is_empty(dir.output()));
  }
}

// Killed while it removed what it had worked with: the target is there, so that nobody begins it
// again.
TEST(WorkDirTest, WhatIsFinishedIsRemovedWhereItsTargetIsRefused) {
  const TempDir folder;
  const fs::path out = folder / "out";
  const fs::path root = folder / ".out.hla-partial";
  leave_two_steps(out);
  fs::create_directory(out);
  EXPECT_EQ(error_of([&] { WorkDir::check_target(out, false); }).code(), ExitCode::kUsage);
  EXPECT_TRUE(fs::exists(root / "steps.json")) << "it may go on with --force";
  json state = json::parse(read_file(root / "steps.json"));
  state["steps"]["commit"] = 1;  // no folder has that number
  fs::remove(root / "steps.json");
  write_file(root / "steps.json", state.dump());
  EXPECT_EQ(error_of([&] { WorkDir::check_target(out, false); }).code(), ExitCode::kUsage);
  EXPECT_FALSE(fs::exists(root));
  EXPECT_TRUE(fs::exists(out));
}

// What can be wrong before the steps are looked at must not cost them.
TEST(WorkDirTest, StepsAreKeptUntilItBegins) {
  const TempDir folder;
  leave_two_steps(folder / "out");
  { const WorkDir dir(folder / "out", false); }
  WorkDir dir(folder / "out", false);
  dir.begin(kFingerprint, false);
  EXPECT_NE(dir.result("two"), nullptr);
  { const WorkDir other(folder / "other", false); }
  EXPECT_FALSE(fs::exists(folder / ".other.hla-partial"));
}

TEST(WorkDirTest, InputsAreNotReplaced) {
  const TempDir folder;
  fs::create_directories(folder.path() / "models" / "base");
  const fs::path base = folder.path() / "models" / "base";
  const auto code = [&](const fs::path& target, const fs::path& input) {
    return error_of([&] { WorkDir::check_inputs(target, {"", input}); }).code();
  };
  EXPECT_EQ(code(base, base), ExitCode::kUsage);
  EXPECT_EQ(code(base / ".", base / "model.safetensors"), ExitCode::kUsage);
  EXPECT_EQ(code(folder / "models", base), ExitCode::kUsage);
  fs::create_directory_symlink(base, folder / "link");
  EXPECT_EQ(code(base, folder / "link"), ExitCode::kUsage);
  EXPECT_NO_THROW(WorkDir::check_inputs(folder.path() / "models" / "other", {base, "org/name"}));
  EXPECT_NO_THROW(WorkDir::check_inputs(base, {folder / "models", "wikitext-2:test"}));
  // Nor is what an unfinished run of the same output has made, with which it would go.
  const fs::path out = folder.path() / "models" / "out";
  leave_two_steps(out);
  const fs::path root = folder.path() / "models" / ".out.hla-partial";
  EXPECT_EQ(code(out, root / "scratch" / "model-100"), ExitCode::kUsage);
  EXPECT_EQ(code(folder.path() / "models" / "." / "out", root), ExitCode::kUsage);
  EXPECT_NO_THROW(WorkDir::check_inputs(folder.path() / "models" / "other", {root / "scratch"}));
}

TEST(WorkDirTest, DiscardRemovesEverything) {
  const TempDir folder;
  {
    WorkDir dir(folder / "out", false);
    dir.begin(kFingerprint, false);
    dir.complete("one");
    dir.discard();
  }
  EXPECT_EQ(entries(folder.path()), 0u);
}

TEST(WorkDirTest, OneProcessAtATime) {
  const TempDir folder;
  WorkDir dir(folder / "out", false);
  dir.begin(kFingerprint, false);
  dir.complete("one");
  // flock belongs to the open file, so another open in this process stands for another process.
  const Error error = error_of([&] { WorkDir(folder / "out", false); });
  EXPECT_EQ(error.code(), ExitCode::kUsage);
  EXPECT_NE(std::string(error.what()).find("another process"), std::string::npos);
  EXPECT_TRUE(fs::exists(dir.output()));
}

TEST(WorkDirTest, ForceReplacesOnlyModelFolders) {
  const TempDir folder;
  fs::create_directory(folder / "out");
  write_file(folder.path() / "out" / "notes.txt", "mine");
  EXPECT_EQ(error_of([&] { WorkDir(folder / "out", false); }).code(), ExitCode::kUsage);
  EXPECT_EQ(error_of([&] { WorkDir(folder / "out", true); }).code(), ExitCode::kUsage);
  write_file(folder.path() / "out" / "config.json", "old");
  WorkDir dir(folder / "out", true);
  dir.begin(kFingerprint, false);
  write_file(dir.output() / "config.json", "new");
  EXPECT_EQ(read_file(folder.path() / "out" / "config.json"), "old");
  dir.commit();
  EXPECT_EQ(read_file(folder.path() / "out" / "config.json"), "new");
  EXPECT_FALSE(fs::exists(folder.path() / "out" / "notes.txt"));
}

TEST(WorkDirTest, RefusesFilesAndMissingParents) {
  const TempDir folder;
  write_file(folder / "file", "");
  EXPECT_THROW(WorkDir(folder / "file", true), Error);
  EXPECT_THROW(WorkDir(folder.path() / "no" / "out", false), Error);
}

TEST(WorkDirTest, AFolderThatAppearsMeanwhileIsKept) {
  const TempDir folder;
  WorkDir dir(folder / "out", false);
  dir.begin(kFingerprint, false);
  fs::create_directory(folder / "out");
  EXPECT_EQ(error_of([&] { dir.commit(); }).code(), ExitCode::kUsage);
}

}  // namespace
}  // namespace hla
