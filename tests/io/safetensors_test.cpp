// The strict reader against malformed files built inline, and the writer.
#include "hla/io/safetensors.h"

#include <cstring>
#include <numeric>

#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::read_file;
using testing::TempDir;
using testing::write_file;

std::string file_of(const std::string& header, const std::string& data,
                    std::optional<uint64_t> length = std::nullopt) {
  const uint64_t n = length.value_or(header.size());
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &n, 8);
  return bytes + header + data;
}

const std::string kData(16, '\1');

TEST(SafetensorsTest, ReadsAGoodFile) {
  const TempDir folder;
  write_file(folder / "a.safetensors",
             file_of(R"({"__metadata__":{"format":"pt"},)"
                     R"("b":{"dtype":"F32","shape":[],"data_offsets":[8,12]},)"
                     R"("a":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},)"
                     R"("e":{"dtype":"I8","shape":[0,3],"data_offsets":[12,12]},)"
                     R"("c":{"dtype":"BF16","shape":[2],"data_offsets":[12,16]}}   )",
                     kData));
  const auto reader = SafetensorsReader::open(folder / "a.safetensors");
  EXPECT_EQ(reader.tensors().size(), 4u);
  EXPECT_EQ(reader.metadata().at("format"), "pt");
  EXPECT_EQ(reader.view("a").nbytes, 8u);
  EXPECT_TRUE(reader.view("b").shape.empty());
  EXPECT_EQ(reader.view("e").nbytes, 0u);
  EXPECT_EQ(error_of([&] { reader.view("zz"); }).code(), ExitCode::kBadInput);
}

struct Malformed {
  std::string name;
  std::string bytes;
};
void PrintTo(const Malformed& value, std::ostream* out) { *out << value.name; }

std::string one(const std::string& entry, const std::string& data = kData) {
  return file_of(R"({"a":)" + entry + "}", data);
}

std::vector<Malformed> malformed() {
  const std::string good = R"({"dtype":"F32","shape":[4],"data_offsets":[0,16]})";
  return {
      {"empty_file", ""},
      {"shorter_than_the_length_field", "1234"},
      {"header_longer_than_file", file_of("{}", "", 1000)},
      {"header_is_longer_than_any", file_of("{}", "", 100'000'001)},
      {"header_length_overflows", file_of("{}", "", ~uint64_t{0})},
      {"header_is_not_json", file_of("{\"a\":", "")},
      {"header_is_an_array", file_of("[]", "")},
      {"header_does_not_start_with_brace", file_of(" {}", "")},
      {"header_is_not_utf8", file_of("{\"\xFF\":" + good + "}", kData)},
      {"duplicate_key", file_of("{\"a\":" + good + ",\"a\":" + good + "}", kData)},
      {"truncated_data", one(good, kData.substr(0, 15))},
      {"trailing_data", one(good, kData + "x")},
      {"first_offset_not_zero", one(R"({"dtype":"F32","shape":[3],"data_offsets":[4,16]})")},
      {"hole", file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                       R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                       kData)},
      {"overlap", file_of(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},)"
                          R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                          kData)},
      {"end_before_begin", one(R"({"dtype":"F32","shape":[4],"data_offsets":[16,0]})")},
      {"negative_offset", one(R"({"dtype":"F32","shape":[4],"data_offsets":[-16,0]})")},
      {"offsets_are_not_two", one(R"({"dtype":"F32","shape":[4],"data_offsets":[0]})")},
      {"offset_is_a_string", one(R"({"dtype":"F32","shape":[4],"data_offsets":["0","16"]})")},
      {"size_is_not_the_product", one(R"({"dtype":"F32","shape":[5],"data_offsets":[0,16]})")},
      {"product_overflows",
       one(R"({"dtype":"F32","shape":[4611686018427387905,4],"data_offsets":[0,16]})")},
      {"negative_dimension", one(R"({"dtype":"F32","shape":[-4],"data_offsets":[0,16]})")},
      {"fractional_dimension", one(R"({"dtype":"F32","shape":[4.5],"data_offsets":[0,16]})")},
      {"unknown_dtype", one(R"({"dtype":"F8_E4M3","shape":[16],"data_offsets":[0,16]})")},
      {"missing_dtype", one(R"({"shape":[4],"data_offsets":[0,16]})")},
      {"missing_shape", one(R"({"dtype":"F32","data_offsets":[0,16]})")},
      {"entry_is_a_number", one("7")},
      {"metadata_of_numbers", file_of(R"({"__metadata__":{"x":1},"a":)" + good + "}", kData)},
  };
}

class MalformedSafetensorsTest : public ::testing::TestWithParam<Malformed> {};

TEST_P(MalformedSafetensorsTest, IsRefused) {
  const TempDir folder;
  const auto path = folder / "bad.safetensors";
  write_file(path, GetParam().bytes);
  const Error error = error_of([&] { SafetensorsReader::open(path); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_NE(std::string(error.what()).find("bad.safetensors"), std::string::npos) << error.what();
}

INSTANTIATE_TEST_SUITE_P(All, MalformedSafetensorsTest, ::testing::ValuesIn(malformed()),
                         [](const auto& param_info) { return param_info.param.name; });

TEST(SafetensorsTest, NamesDtypeAndSaysWhatToDo) {
  const TempDir folder;
  const auto path = folder / "bad.safetensors";
  write_file(path, one(R"({"dtype":"F8_E4M3","shape":[16],"data_offsets":[0,16]})"));
  const std::string message = error_of([&] { SafetensorsReader::open(path); }).what();
  EXPECT_NE(message.find("F8_E4M3"), std::string::npos) << message;
  EXPECT_NE(message.find("hint: the file may be sound"), std::string::npos) << message;
}

TEST(SafetensorsTest, WritesWhatItReads) {
  const TempDir folder;
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const auto write = [&](const std::filesystem::path& path) {
    SafetensorsWriter writer(path, {{"w", DType::kF32, {2, 3}}, {"s", DType::kF32, {}}});
    writer.write("w", values.data(), 24);
    writer.write("s", values.data(), 4);
    writer.finish();
  };
  write(folder / "a.safetensors");
  write(folder / "b.safetensors");
  const std::string bytes = read_file(folder / "a.safetensors");
  EXPECT_EQ(bytes, read_file(folder / "b.safetensors"));
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  EXPECT_EQ(header % 8, 0u);
  const auto reader = SafetensorsReader::open(folder / "a.safetensors");
  EXPECT_EQ(std::memcmp(reader.view("w").data, values.data(), 24), 0);
  EXPECT_EQ(reader.metadata().at("format"), "pt");
}

// Tensors and parts below, at and above the 2 MiB pieces that the file is written in.
TEST(SafetensorsTest, PiecesOfTheFileAreComplete) {
  const TempDir folder;
  const auto path = folder / "a.safetensors";
  constexpr int64_t kPage = int64_t{1} << 19;  // in floats
  const std::vector<int64_t> counts = {3, kPage - 40, 1, 2 * kPage + 5, kPage, 0, 5 * kPage, 7};
  const std::map<std::string, std::string> kMetadata = {{"format", "pt"}};
  std::vector<SafetensorsWriter::Entry> entries;
  std::vector<std::vector<float>> tensors;
  for (const int64_t count : counts) {
    entries.push_back({"t" + std::to_string(entries.size()), DType::kF32, {count}});
    tensors.emplace_back(count);
    std::iota(tensors.back().begin(), tensors.back().end(), 1000.0F * entries.size());
  }
  for (const size_t synced : {size_t{0}, size_t{2}, size_t{3}, size_t{6}}) {
    std::filesystem::remove(path);
    auto writer = std::make_unique<SafetensorsWriter>(path, entries);
    uint64_t synced_size = 0;
    for (size_t i = 0; i < entries.size(); ++i) {
      const uint64_t size = std::filesystem::file_size(path);
      EXPECT_TRUE(size == synced_size || size % (4 * kPage) == 0) << size;
      if (i == synced) {
        writer->sync();
        uint64_t expected = SafetensorsWriter::file_bytes(entries);
        for (size_t rest = i; rest < entries.size(); ++rest) expected -= 4 * counts[rest];
        synced_size = std::filesystem::file_size(path);
        EXPECT_EQ(synced_size, expected) << "synced before " << i;
        if (i == 3) {  // what follows a sync is cut off, also where it has reached the disk
          writer->write(entries[3].name, tensors[3].data(), 4 * tensors[3].size());
          writer->write_part(entries[4].name, tensors[3].data(), 4000);
          EXPECT_GT(std::filesystem::file_size(path), synced_size);
          writer = std::make_unique<SafetensorsWriter>(path, entries, kMetadata, i);
        }
      }
      const size_t half = tensors[i].size() / 2;
      if (half > 0) writer->write_part(entries[i].name, tensors[i].data(), 4 * half);
      writer->write_part(entries[i].name, tensors[i].data() + half, 4 * (tensors[i].size() - half));
    }
    writer->finish();
    const auto reader = SafetensorsReader::open(path);
    for (size_t i = 0; i < entries.size(); ++i) {
      const auto view = reader.view(entries[i].name);
      ASSERT_EQ(view.nbytes, 4 * tensors[i].size());
      EXPECT_TRUE(view.nbytes == 0 || std::memcmp(view.data, tensors[i].data(), view.nbytes) == 0)
          << entries[i].name << ", synced before " << synced;
    }
  }
}

TEST(SafetensorsTest, WriterRefusesWrongOrderAndSize) {
  const TempDir folder;
  const float value = 1;
  SafetensorsWriter writer(folder / "a.safetensors",
                           {{"a", DType::kF32, {}}, {"b", DType::kF32, {}}});
  writer.sync();
  const auto begun = std::filesystem::file_size(folder / "a.safetensors");
  EXPECT_THROW(writer.write("b", &value, 4), Error);
  EXPECT_THROW(writer.write_part("a", &value, 5), Error);
  writer.sync();
  EXPECT_EQ(std::filesystem::file_size(folder / "a.safetensors"), begun) << "nothing of it written";
  EXPECT_THROW(writer.write("a", &value, 3), Error);
  EXPECT_THROW(writer.finish(), Error);
}

}  // namespace
}  // namespace hla
