#include "hla/text/wikitext.h"

#include "hla/core/sha256.h"
#include "test_util.h"

namespace hla {
namespace {

TEST(WikitextTest, JoinsRowsAsTheHubDoes) {
  EXPECT_EQ(join_hf_rows(""), "");
  EXPECT_EQ(join_hf_rows(" a \n \n b \n"), " a \n" "\n\n" "" "\n\n" " b \n");
  EXPECT_EQ(join_hf_rows("no newline"), "no newline");
}

TEST(WikitextTest, WikiText2Test) {
  const std::string joined =
      join_hf_rows(testing::read_file(testing::source_path("data/wikitext-2/wiki.test.raw")));
  EXPECT_EQ(joined.size(), 1296370u);
  EXPECT_EQ(sha256_hex(joined).substr(0, 8), "696cca6b");
}

}  // namespace
}  // namespace hla
