#include "hla/core/text_table.h"

#include <gtest/gtest.h>

#include <cmath>

namespace hla {
namespace {

TEST(TextTableTest, AlignsAndLeavesEmptyColumnsOut) {
  TextTable table({"model", "unused", "ppl"});
  table.add({"a", "", "1.5"});
  table.add({"möb", "", "22.25"});
  table.add({"short"});
  EXPECT_EQ(table.render(),
            "model    ppl\n"
            "a        1.5\n"
            "möb    22.25\n"
            "short\n");
}

TEST(TextTableTest, CsvFields) {
  EXPECT_EQ(csv_field("plain text; more"), "plain text; more");
  EXPECT_EQ(csv_field("a,b"), "\"a,b\"");
  EXPECT_EQ(csv_field("a \"b\""), "\"a \"\"b\"\"\"");
  EXPECT_EQ(csv_field("two\nlines"), "\"two\nlines\"");
}

TEST(TextTableTest, Numbers) {
  EXPECT_EQ(with_thousands(0), "0");
  EXPECT_EQ(with_thousands(999), "999");
  EXPECT_EQ(with_thousands(1000), "1,000");
  EXPECT_EQ(with_thousands(-304978), "-304,978");
  EXPECT_EQ(with_thousands(-999), "-999");
  EXPECT_EQ(with_thousands(std::string("-1234567.50")), "-1,234,567.50");
  EXPECT_EQ(fixed(1.23456, 2), "1.23");
  EXPECT_EQ(fixed(123456789012345.0, 1), "123456789012345.0");
  EXPECT_EQ(fixed(1.5e80, 4), "1.5e+80");
  EXPECT_EQ(fixed(std::nan(""), 2), "nan");
}

}  // namespace
}  // namespace hla
