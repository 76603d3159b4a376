// The small things of core: errors, progress, memory, hashes, data files.
#include <cstdlib>

#include "hla/core/cpu_features.h"
#include "hla/core/data_dir.h"
#include "hla/core/error.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/core/sha256.h"
#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::source_path;

TEST(ProblemsTest, ReportsAllProblemsInOneError) {
  Problems problems("config.json");
  problems.throw_if_any();  // none: nothing happens
  problems.add("first");
  problems.add("second");
  const Error error = error_of([&] { problems.throw_if_any("do this"); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_STREQ(error.what(), "config.json: 2 problems\n  - first\n  - second\n  hint: do this");
}

TEST(ProblemsTest, CutsLongLists) {
  Problems problems("x");
  for (int i = 0; i < 30; ++i) problems.add("p" + std::to_string(i));
  const std::string message = error_of([&] { problems.throw_if_any(); }).what();
  EXPECT_NE(message.find("30 problems"), std::string::npos);
  EXPECT_NE(message.find("and 10 more"), std::string::npos);
  EXPECT_EQ(message.find("p20"), std::string::npos);
}

TEST(ProgressTest, RendersShareAndEta) {
  EXPECT_EQ(Progress::render("windows", 1, 4, 10, "ppl 2.0"),
            "[#####...............]  25%  1/4  windows  00:30 left  ppl 2.0");
  EXPECT_EQ(Progress::render("windows", 4, 4, 10, ""), "[####################] 100%  4/4  windows");
  EXPECT_NE(Progress::render("w", 1, 1001, 10, "").find("2:46:40 left"), std::string::npos);
  // What was done before took none of the ten seconds.
  EXPECT_NE(Progress::render("w", 901, 1000, 10, "", 900).find("  16:30 left"), std::string::npos);
  EXPECT_EQ(Progress::render("w", 900, 1000, 10, "", 900).find("left"), std::string::npos);
}

// Where stderr is no terminal, as here.
TEST(ProgressTest, GoesToTheLogWhereThatIsWanted) {
  const auto shown = [](int64_t seconds) {
    ::testing::internal::CaptureStderr();
    Progress progress("tuning", 10);
    if (seconds >= 0) progress.log_every(std::chrono::seconds(seconds));
    progress.advance(4, "loss 2.5");
    return ::testing::internal::GetCapturedStderr();
  };
  EXPECT_NE(shown(0).find("40%  4/10  tuning"), std::string::npos) << shown(0);
  EXPECT_NE(shown(0).find("loss 2.5\n"), std::string::npos);
  EXPECT_EQ(shown(3600), "");
  EXPECT_EQ(shown(-1), "");
}

TEST(CpuFeaturesTest, KnowsTheModel) {
#if defined(__x86_64__)
  EXPECT_EQ(is_wide_amd(), simd_level() == SimdLevel::kAvx512 &&
                               cpu_model().starts_with("AuthenticAMD ") &&
                               std::stoi(cpu_model().substr(13)) >= 26);
  EXPECT_NE(cpu_model().find(' '), std::string::npos) << cpu_model();
  EXPECT_NE(cpu_model().find('/'), std::string::npos) << cpu_model();
#endif
}

TEST(MemoryTest, KnowsThisProcessAndRefusesTooMuch) {
  EXPECT_GT(peak_rss_bytes(), 1u << 20);
  EXPECT_GT(available_memory_bytes(), 1u << 20);
  EXPECT_EQ(format_bytes(999), "999 B");
  EXPECT_EQ(format_bytes(1'500'000'000), "1.50 GB");
  EXPECT_NO_THROW(preflight_memory(1, "a byte"));
  const Error error = error_of([] { preflight_memory(uint64_t{1} << 60, "a lot"); });
  EXPECT_EQ(error.code(), ExitCode::kOutOfMemory);
}

TEST(MemoryTest, KnowsTheLimitsOfControlGroups) {
  const testing::TempDir folder;
  const auto group = [&](const std::string& path, const std::string& limit,
                         const std::string& usage, const std::string& stat) {
    const bool v1 = path.starts_with("memory");
    const std::filesystem::path place = folder.path() / path;
    std::filesystem::create_directories(place);
    testing::write_file(place / (v1 ? "memory.limit_in_bytes" : "memory.max"), limit);
    testing::write_file(place / (v1 ? "memory.usage_in_bytes" : "memory.current"), usage);
    testing::write_file(place / "memory.stat", stat);
  };
  const auto room = [&](const std::string& membership) {
    testing::write_file(folder / "membership", membership);
    return cgroup_room_bytes(folder.path(), folder / "membership");
  };
  constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(room("0::/user/session\n"), kNone);
  group("user/session", "max\n", "50\n", "");
  EXPECT_EQ(room("0::/user/session\n"), kNone);
  group("user", "1000\n", "700\n", "anon 1\ninactive_file 100\n");
  EXPECT_EQ(room("0::/user/session\n"), 400u);  // that above counts
  group("user/session", "600\n", "500\n", "");
  EXPECT_EQ(room("0::/user/session\n"), 100u);
  EXPECT_EQ(room("0::/another\n"), kNone);
  group("user/session", "600\n", "700\n", "");
  EXPECT_EQ(room("0::/user/session\n"), 1u);  // 0 would be unknown
  group("memory/box", "5000\n", "1000\n", "inactive_file 7\ntotal_inactive_file 200\n");
  EXPECT_EQ(room("12:cpu,cpuacct:/box\n4:memory:/box\n"), 4200u);
  EXPECT_EQ(room("12:cpu,cpuacct:/box\n"), kNone);
}

TEST(Sha256Test, KnownDigests) {
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(
      sha256_hex(testing::read_file(source_path("data/wikitext-2/wiki.test.raw"))).substr(0, 8),
      "173c87a5");
}

TEST(DataDirTest, FindsCommittedDataAndSaysWhereItLooked) {
  EXPECT_TRUE(std::filesystem::exists(data_file("wikitext-2/wiki.test.raw")));
  const Error error = error_of([] { data_file("no/such"); });
  EXPECT_NE(std::string(error.what()).find("data/no/such"), std::string::npos);
}

}  // namespace
}  // namespace hla
