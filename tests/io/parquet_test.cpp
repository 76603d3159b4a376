#include "hla/io/parquet.h"

#include <gmock/gmock.h>

#include <stdexcept>
#include <vector>

#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using ::testing::HasSubstr;
using testing::read_file;
using testing::source_path;
using testing::TempDir;
using testing::write_file;

std::filesystem::path fixture(const std::string& name) {
  return source_path("tests/data/text/" + name);
}

std::vector<std::string> read_column(const std::filesystem::path& file, const std::string& column) {
  std::vector<std::string> rows;
  EXPECT_TRUE(for_each_parquet_text(file, column, [&](std::string_view row) {
    rows.emplace_back(row);
    return true;
  }));
  return rows;
}

std::string message_of(const std::filesystem::path& file, const std::string& column) {
  const Error error = error_of([&] { read_column(file, column); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput) << error.what();
  EXPECT_THAT(error.what(), HasSubstr(file.string()));
  return error.what();
}

// What scripts/make_parquet_fixtures.py wrote.
std::vector<std::string> expected_rows() {
  std::vector<std::string> rows;
  for (int i = 0; i < 10; ++i) {
    rows.push_back("document " + std::to_string(i) + ": ");
    for (int k = 0; k < i % 4; ++k) rows.back() += "é🙂 text\n";
  }
  rows.insert(rows.end(), {"", "last"});
  return rows;
}

class ParquetTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_parquet_support()) GTEST_SKIP() << "built without Parquet support";
  }
};

TEST(ParquetSupportTest, SaysSoWhenItIsMissing) {
  if (has_parquet_support()) GTEST_SKIP() << "built with Parquet support";
  const Error error = error_of([] { read_column(fixture("strings_zstd.parquet"), "text"); });
  EXPECT_EQ(error.code(), ExitCode::kRuntime);
  EXPECT_THAT(error.what(), HasSubstr("no Parquet support"));
  EXPECT_THAT(error.what(), HasSubstr("pyarrow"));
}

TEST_F(ParquetTest, ReadsStringsOfEveryKind) {
  const std::vector<std::string> rows = expected_rows();
  for (const char* name : {"strings_snappy.parquet", "strings_zstd.parquet"}) {
    EXPECT_EQ(read_column(fixture(name), "text"), rows) << name;
    EXPECT_EQ(read_column(fixture(name), "large"), rows) << name;
    EXPECT_EQ(read_column(fixture(name), "struct.field"), rows) << name;
    const std::vector<std::string> dictionary = read_column(fixture(name), "dictionary");
    ASSERT_EQ(dictionary.size(), rows.size()) << name;
    for (size_t i = 0; i < rows.size(); ++i) EXPECT_EQ(dictionary[i], rows[i % 3]) << name << i;
  }
}

TEST_F(ParquetTest, StopsWhereItIsTold) {
  for (const int wanted : {1, 5, 7}) {  // in a row group, at the end of one, in the next one
    int count = 0;
    EXPECT_FALSE(for_each_parquet_text(fixture("strings_zstd.parquet"), "text",
                                       [&](std::string_view) { return ++count < wanted; }));
    EXPECT_EQ(count, wanted);
  }
}

TEST_F(ParquetTest, PassesOnWhatTheCallbackThrows) {
  EXPECT_THROW(for_each_parquet_text(fixture("strings_zstd.parquet"), "text",
                                     [](std::string_view) -> bool { throw std::out_of_range(""); }),
               std::out_of_range);
}

TEST_F(ParquetTest, RefusesOtherColumns) {
  const auto file = fixture("strings_snappy.parquet");
  const std::string missing = message_of(file, "content");
  EXPECT_THAT(missing, HasSubstr("no column \"content\""));
  EXPECT_THAT(missing, HasSubstr("id, text, large"));
  EXPECT_THAT(message_of(file, "id"), HasSubstr("expected strings, got INT64"));
  EXPECT_THAT(message_of(file, "binary"), HasSubstr("expected strings, got BYTE_ARRAY"));
  EXPECT_THAT(message_of(file, "list.list.element"), HasSubstr("lists"));
  // The seventh row is in the second row group.
  EXPECT_THAT(message_of(file, "nulls"), HasSubstr("row 7 of column \"nulls\" is null"));
}

TEST_F(ParquetTest, RefusesWhatIsNotParquet) {
  const TempDir folder;
  EXPECT_THAT(message_of(folder / "missing.parquet", "text"), HasSubstr("No such file"));
  EXPECT_THAT(message_of(folder.path(), "text"), HasSubstr("Is a directory"));
  for (const std::string& content :
       {std::string(), std::string("PAR1"), std::string("PAR1PAR1"), std::string(5000, 'x'),
        // A footer of 4 GB, of nothing, of garbage; an encrypted one.
        "PAR1" + std::string("\xff\xff\xff\xff", 4) + "PAR1",
        "PAR1" + std::string("\0\0\0\0", 4) + "PAR1",
        "PAR1garbage!" + std::string("\x08\0\0\0", 4) + "PAR1",
        "PAREgarbage!" + std::string("\x08\0\0\0", 4) + "PARE"}) {
    write_file(folder / "bad.parquet", content);
    EXPECT_THAT(message_of(folder / "bad.parquet", "text"), HasSubstr("Parquet"));
  }
}

TEST_F(ParquetTest, RefusesTruncatedFiles) {
  const TempDir folder;
  const std::string whole = read_file(fixture("strings_zstd.parquet"));
  for (size_t size = 0; size < whole.size(); size += 97) {
    write_file(folder / "cut.parquet", whole.substr(0, size));
    message_of(folder / "cut.parquet", "text");
  }
  // A page cut out of the middle, the footer as it was.
  write_file(folder / "cut.parquet", whole.substr(0, 40) + whole.substr(400));
  message_of(folder / "cut.parquet", "text");
}

// A flipped byte may hit what is not read (another column, statistics); it must never crash, nor
// give other text where pages have checksums.
TEST_F(ParquetTest, SurvivesEveryFlippedByte) {
  const TempDir folder;
  const std::string whole = read_file(fixture("not_utf8.parquet"));
  size_t refused = 0;
  for (size_t i = 0; i < whole.size(); ++i) {
    for (const char flip : {'\x01', '\x80', '\xff'}) {
      std::string damaged = whole;
      damaged[i] = static_cast<char>(damaged[i] ^ flip);
      write_file(folder / "flipped.parquet", damaged);
      try {
        for_each_parquet_text(folder / "flipped.parquet", "text",
                              [](std::string_view row) { return row.size() < 1000000; });
      } catch (const Error& error) {
        ++refused;
        EXPECT_EQ(error.code(), ExitCode::kBadInput) << error.what();
      }
    }
  }
  EXPECT_GT(refused, whole.size() / 2);
}

TEST_F(ParquetTest, ChecksumsCatchFlippedData) {
  const TempDir folder;
  const std::vector<std::string> rows = expected_rows();
  const std::string whole = read_file(fixture("strings_zstd.parquet"));
  for (size_t i = 4; i < whole.size() - 8; i += 13) {
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x10);
    write_file(folder / "flipped.parquet", damaged);
    std::vector<std::string> got;
    try {
      for_each_parquet_text(folder / "flipped.parquet", "text", [&](std::string_view row) {
        got.emplace_back(row);
        return true;
      });
    } catch (const Error&) {
      continue;
    }
    EXPECT_EQ(got, rows) << "byte " << i;
  }
}

}  // namespace
}  // namespace hla
