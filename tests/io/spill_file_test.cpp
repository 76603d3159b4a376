#include "hla/io/spill_file.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::TempDir;

TEST(SpillFileTest, GivesBackWhatWasWritten) {
  const TempDir folder;
  std::vector<int32_t> numbers(1 << 20);  // more than is held back
  std::iota(numbers.begin(), numbers.end(), 5);
  std::shared_ptr<const MappedFile> content;
  {
    SpillFile file(folder.path());
    for (size_t at = 0; at < numbers.size(); at += 1000) {
      const size_t count = std::min<size_t>(1000, numbers.size() - at);
      file.append(numbers.data() + at, count * sizeof(int32_t));
    }
    content = file.finish();
    EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  }
  ASSERT_EQ(content->size(), numbers.size() * sizeof(int32_t));
  EXPECT_EQ(std::memcmp(content->data(), numbers.data(), content->size()), 0);
}

TEST(SpillFileTest, MayBeEmpty) {
  const TempDir folder;
  EXPECT_EQ(SpillFile(folder.path()).finish()->size(), 0u);
}

TEST(SpillFileTest, NamesTheFolder) {
  const TempDir folder;
  const Error error = error_of([&] { SpillFile file(folder / "missing"); });
  EXPECT_EQ(error.code(), ExitCode::kRuntime);
  EXPECT_NE(std::string(error.what()).find("missing: cannot make a temporary file"),
            std::string::npos)
      << error.what();
}

}  // namespace
}  // namespace hla
