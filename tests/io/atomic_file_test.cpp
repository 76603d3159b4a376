#include "hla/io/atomic_file.h"

#include <nlohmann/json.hpp>

#include "hla/io/json_file.h"
#include "test_util.h"

namespace hla {
namespace {

namespace fs = std::filesystem;
using testing::error_of;
using testing::read_file;
using testing::TempDir;
using testing::write_file;

size_t entries(const fs::path& folder) {
  size_t count = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(folder)) ++count;
  return count;
}

TEST(AtomicFileTest, AppearsOnlyWhenCommitted) {
  const TempDir folder;
  {
    AtomicFile file(folder / "a", false);
    file.write("half");
    EXPECT_FALSE(fs::exists(folder / "a"));
  }
  EXPECT_EQ(entries(folder.path()), 0u);
  AtomicFile file(folder / "a", false);
  file.write("whole");
  file.commit();
  EXPECT_EQ(read_file(folder / "a"), "whole");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(AtomicFileTest, KeepsExistingFilesUnlessForced) {
  const TempDir folder;
  write_file(folder / "a", "old");
  EXPECT_EQ(error_of([&] { AtomicFile(folder / "a", false); }).code(), ExitCode::kUsage);
  AtomicFile file(folder / "a", true);
  file.write("new");
  EXPECT_EQ(read_file(folder / "a"), "old");
  file.commit();
  EXPECT_EQ(read_file(folder / "a"), "new");
}

TEST(AtomicFileTest, AFileThatAppearsMeanwhileIsKept) {
  const TempDir folder;
  AtomicFile file(folder / "a", false);
  file.write("mine");
  write_file(folder / "a", "theirs");
  EXPECT_EQ(error_of([&] { file.commit(); }).code(), ExitCode::kUsage);
  EXPECT_EQ(read_file(folder / "a"), "theirs");
}

TEST(AtomicFileTest, FullDisk) {
  const std::string text(1 << 20, 'x');
  const Error error = error_of([&] {
    AtomicFile file("/dev/full", false);
    file.write(text);
    file.commit();
  });
  EXPECT_EQ(error.code(), ExitCode::kRuntime);
  EXPECT_NE(std::string(error.what()).find("/dev/full"), std::string::npos);
}

TEST(JsonFileTest, StrictAndLocated) {
  const auto message = [](std::string_view text) {
    const Error error = error_of([&] { parse_json(text, "x.json"); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput);
    return std::string(error.what());
  };
  EXPECT_NE(message("{\n \"a\": ?}").find("x.json:2:"), std::string::npos);
  EXPECT_NE(message(R"({"wide": 1, "wide": 2})").find("wide"), std::string::npos);
  message("");
  message("\xFF");
  message("{} {}");
  message(std::string(1000, '[') + std::string(1000, ']'));
  EXPECT_EQ(parse_json(R"({"a": 1})", "x")["a"], 1);
}

TEST(JsonFileTest, TypedAccess) {
  Problems problems("x");
  const nlohmann::json object = {{"i", 3}, {"f", 2.0}, {"h", 2.5}, {"b", true}, {"n", nullptr}};
  EXPECT_EQ(get_int(object, "i", 0, problems), 3);
  EXPECT_EQ(get_int(object, "f", 0, problems), 2);
  EXPECT_EQ(get_int(object, "n", 7, problems), 7);
  EXPECT_TRUE(problems.empty());
  EXPECT_EQ(get_int(object, "h", 9, problems), 9);
  EXPECT_EQ(get_int(object, "b", 9, problems), 9);
  EXPECT_EQ(get_int(object, "i", 9, problems, 0, 2), 9);
  EXPECT_EQ(problems.list().size(), 3u);
}

}  // namespace
}  // namespace hla
