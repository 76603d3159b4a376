#include "hla/io/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "hla/core/error.h"
#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/io/mapped_file.h"

namespace hla {

static_assert(std::endian::native == std::endian::little, "tensor data is used as it lies on disk");

namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
// The limit of the reference implementation.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr const char* kMetadataKey = "__metadata__";
constexpr const char* kAgainHint = "download the file again or convert it again";
constexpr const char* kDtypeHint =
    "the file may be sound; store its weights as BF16, F16 or F32 (quantized ones: dequantized)";

std::string quoted(const std::string& name) { return json_excerpt(name); }

// The size of a tensor in bytes; nullopt on overflow.
std::optional<uint64_t> checked_bytes(const std::vector<int64_t>& shape, DType dtype) {
  int64_t product = 1;
  for (const int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(product, extent, &product)) return std::nullopt;
  }
  const auto item = static_cast<int64_t>(dtype_size(dtype));
  if (__builtin_mul_overflow(product, item, &product)) return std::nullopt;
  return static_cast<uint64_t>(product);
}

// A JSON value that is a non-negative integer that fits int64.
std::optional<int64_t> as_size(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return static_cast<int64_t>(number);
}

std::optional<std::vector<int64_t>> as_sizes(const json& value) {
  if (!value.is_array()) return std::nullopt;
  std::vector<int64_t> sizes;
  for (const json& item : value) {
    const std::optional<int64_t> size = as_size(item);
    if (!size) return std::nullopt;
    sizes.push_back(*size);
  }
  return sizes;
}

struct Located {
  TensorInfo info;
  uint64_t begin = 0;
  uint64_t end = 0;
  bool is_known_dtype = true;
};

// One entry of the header. Adds what is wrong with it to the problems; nullopt if its place in the
// data is not known.
std::optional<Located> parse_entry(const std::string& name, const json& entry,
                                   const std::filesystem::path& path, Problems& problems) {
  const std::string subject = "tensor " + quoted(name) + ": ";
  if (!entry.is_object()) {
    problems.add(subject + "expected an object, got " + json_excerpt(entry));
    return std::nullopt;
  }
  const auto field = [&](const char* key) {
    const auto found = entry.find(key);
    return found == entry.end() ? json() : *found;
  };

  const json dtype_field = field("dtype");
  std::optional<DType> dtype;
  bool is_known_dtype = true;
  if (!dtype_field.is_string()) {
    problems.add(subject + "dtype: expected a string, got " + json_excerpt(dtype_field));
  } else {
    dtype = dtype_from_name(dtype_field.get_ref<const std::string&>());
    is_known_dtype = dtype.has_value();
    if (!is_known_dtype) {
      problems.add(subject + "dtype " + json_excerpt(dtype_field) + " is not supported");
    }
  }

  const json shape_field = field("shape");
  const auto shape = as_sizes(shape_field);
  if (!shape) {
    problems.add(subject + "shape: expected an array of non-negative integers, got " +
                 json_excerpt(shape_field));
  }

  const json offsets_field = field("data_offsets");
  const auto offsets = as_sizes(offsets_field);
  if (!offsets || offsets->size() != 2) {
    problems.add(subject + "data_offsets: expected two non-negative integers, got " +
                 json_excerpt(offsets_field));
    return std::nullopt;
  }
  const auto begin = static_cast<uint64_t>((*offsets)[0]);
  const auto end = static_cast<uint64_t>((*offsets)[1]);
  if (end < begin) {
    problems.add(subject +
                 "data_offsets: the end lies before the begin: " + json_excerpt(offsets_field));
    return std::nullopt;
  }
  if (dtype && shape) {
    const std::optional<uint64_t> bytes = checked_bytes(*shape, *dtype);
    if (!bytes) {
      problems.add(subject + "shape " + json_excerpt(shape_field) +
                   ": the number of bytes overflows");
    } else if (*bytes != end - begin) {
      problems.add(subject + "expected " + std::to_string(*bytes) + " bytes for " +
                   std::string(dtype_name(*dtype)) + " " + json_excerpt(shape_field) +
                   ", got data_offsets of " + std::to_string(end - begin) + " bytes");
    }
  }
  Located result;
  result.info.name = name;
  result.info.dtype = dtype.value_or(DType::kU8);
  result.info.shape = shape.value_or(std::vector<int64_t>{});
  result.info.file = path;
  result.begin = begin;
  result.end = end;
  result.is_known_dtype = is_known_dtype;
  return result;
}

// The offsets must cover [0, data_bytes) exactly. `located` is in the order of the data.
void check_coverage(const std::vector<Located>& located, uint64_t data_bytes, Problems& problems) {
  uint64_t reached = 0;
  for (const Located& tensor : located) {
    if (tensor.begin != reached) {
      const std::string what = reached == 0               ? "the first offset"
                               : (tensor.begin > reached) ? "a hole before it"
                                                          : "an overlap with the one before";
      problems.add("tensor " + quoted(tensor.info.name) + ": " + what +
                   ": expected data_offsets to begin at " + std::to_string(reached) + ", got " +
                   std::to_string(tensor.begin));
      return;  // what follows would only repeat it
    }
    reached = tensor.end;
  }
  if (data_bytes < reached) {
    problems.add("the file is " + std::to_string(reached - data_bytes) +
                 " bytes shorter than its header says: it is truncated");
  } else if (data_bytes > reached) {
    problems.add("the file is " + std::to_string(data_bytes - reached) +
                 " bytes longer than its header says");
  }
}

// Length and header of a file as they stand before the data.
struct FileHeader {
  std::string text;
  uint64_t data_bytes = 0;
};

FileHeader make_header(const std::filesystem::path& path,
                       const std::vector<SafetensorsWriter::Entry>& entries,
                       const std::map<std::string, std::string>& metadata) {
  std::string header = "{";
  uint64_t offset = 0;
  try {
    if (!metadata.empty()) header += "\"__metadata__\":" + json(metadata).dump();
    std::set<std::string> names;
    for (const SafetensorsWriter::Entry& entry : entries) {
      const std::string subject = path.string() + ": cannot write tensor " + quoted(entry.name);
      if (entry.name == kMetadataKey || !names.insert(entry.name).second) {
        throw_runtime(subject + ": the name is taken");
      }
      const std::optional<uint64_t> bytes = checked_bytes(entry.shape, entry.dtype);
      uint64_t end = 0;
      if (!bytes || __builtin_add_overflow(offset, *bytes, &end)) {
        throw_runtime(subject + ": shape " + json_excerpt(entry.shape) + " is not possible");
      }
      // By hand, so that the tensors stand in the order of their data.
      if (header.size() > 1) header += ',';
      header += json(entry.name).dump() + ":{\"dtype\":\"" + std::string(dtype_name(entry.dtype)) +
                "\",\"shape\":" + json(entry.shape).dump() +
                ",\"data_offsets\":" + json{offset, end}.dump() + "}";
      offset = end;
    }
  } catch (const json::exception&) {
    throw_runtime(path.string() + ": cannot write: a name in the header is not valid UTF-8");
  }
  header += '}';
  // The data then starts at a multiple of 8, as in every file of the reference implementation.
  header.append((8 - header.size() % 8) % 8, ' ');
  if (header.size() > kMaxHeaderBytes) {
    throw_runtime(path.string() + ": cannot write: the header is too large for the format");
  }
  const uint64_t length = header.size();
  header.insert(0, reinterpret_cast<const char*>(&length), sizeof length);
  return {std::move(header), offset};
}

}  // namespace

int64_t TensorInfo::numel() const {
  int64_t product = 1;
  for (const int64_t extent : shape) product *= extent;
  return product;
}

uint64_t TensorInfo::nbytes() const { return static_cast<uint64_t>(numel()) * dtype_size(dtype); }

std::shared_ptr<std::byte> allocate_tensor_bytes(uint64_t bytes) {
  // The alignment that LibTorch's CPU allocator uses.
  constexpr std::align_val_t kAlignment{64};
  auto* data = static_cast<std::byte*>(::operator new(std::max<uint64_t>(bytes, 1), kAlignment));
  return {data, [](std::byte* pointer) { ::operator delete(pointer, kAlignment); }};
}

struct SafetensorsReader::Content {
  std::shared_ptr<const MappedFile> file;
  const std::byte* data = nullptr;
  std::vector<TensorInfo> tensors;
  std::vector<uint64_t> begins;  // as `tensors`
  std::unordered_map<std::string, size_t> index;
  std::map<std::string, std::string> metadata;
};

SafetensorsReader::SafetensorsReader(std::shared_ptr<const Content> content)
    : content_(std::move(content)) {}

SafetensorsReader SafetensorsReader::open(const std::filesystem::path& path) {
  auto content = std::make_shared<Content>();
  content->file = MappedFile::open(path);
  const MappedFile& file = *content->file;
  Problems problems(path.string());

  if (file.size() < kLengthBytes) {
    problems.add("not a safetensors file: expected at least 8 bytes, got " +
                 std::to_string(file.size()));
    problems.throw_if_any(kAgainHint);
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), kLengthBytes);
  const uint64_t rest = file.size() - kLengthBytes;
  if (header_bytes > kMaxHeaderBytes) {
    problems.add("not a safetensors file: expected a header of at most " +
                 std::to_string(kMaxHeaderBytes) + " bytes, got " + std::to_string(header_bytes));
    // What `git clone` without LFS leaves in place of the file.
    const bool pointer = file.text().starts_with("version https://git-lfs");
    problems.throw_if_any(pointer ? "this is a Git LFS pointer; fetch the file with `git lfs pull`"
                                  : kAgainHint);
  }
  if (header_bytes > rest) {
    problems.add("the file is truncated: expected a header of " + std::to_string(header_bytes) +
                 " bytes, got " + std::to_string(rest));
    problems.throw_if_any(kAgainHint);
  }
  const std::string_view header = file.text().substr(kLengthBytes, header_bytes);
  if (!header.starts_with('{')) {
    problems.add("not a safetensors file: expected the header to start with '{'");
    problems.throw_if_any(kAgainHint);
  }
  const json object =
      parse_json(header, path.string() + ": safetensors header", {.max_bytes = kMaxHeaderBytes});

  std::vector<Located> located;
  bool all_located = true;
  for (const auto& [name, entry] : object.items()) {
    if (name == kMetadataKey) {
      if (!entry.is_object()) {
        problems.add(std::string(kMetadataKey) + ": expected an object, got " +
                     json_excerpt(entry));
        continue;
      }
      for (const auto& [key, value] : entry.items()) {
        if (value.is_string()) {
          content->metadata.emplace(key, value.get<std::string>());
        } else {
          problems.add(std::string(kMetadataKey) + ": " + quoted(key) +
                       ": expected a string, got " + json_excerpt(value));
        }
      }
      continue;
    }
    if (auto tensor = parse_entry(name, entry, path, problems)) {
      located.push_back(std::move(*tensor));
    } else {
      all_located = false;
    }
  }
  // Empty tensors share their begin with the tensor after them.
  std::sort(located.begin(), located.end(), [](const Located& a, const Located& b) {
    return std::tie(a.begin, a.end, a.info.name) < std::tie(b.begin, b.end, b.info.name);
  });
  if (all_located) check_coverage(located, rest - header_bytes, problems);
  const bool known_dtypes = std::all_of(located.begin(), located.end(),
                                        [](const Located& one) { return one.is_known_dtype; });
  problems.throw_if_any(known_dtypes ? kAgainHint : kDtypeHint);

  content->data = file.data() + kLengthBytes + header_bytes;
  for (Located& tensor : located) {
    content->index.emplace(tensor.info.name, content->tensors.size());
    content->begins.push_back(tensor.begin);
    content->tensors.push_back(std::move(tensor.info));
  }
  return SafetensorsReader(std::move(content));
}

const std::vector<TensorInfo>& SafetensorsReader::tensors() const { return content_->tensors; }

const std::map<std::string, std::string>& SafetensorsReader::metadata() const {
  return content_->metadata;
}

bool SafetensorsReader::has(const std::string& name) const {
  return content_->index.contains(name);
}

void SafetensorsReader::release_pages() const { content_->file->release_pages(); }

TensorView SafetensorsReader::view(const std::string& name) const {
  const auto found = content_->index.find(name);
  if (found == content_->index.end()) {
    throw_bad_input(content_->file->path().string() + ": no tensor " + quoted(name));
  }
  const TensorInfo& info = content_->tensors[found->second];
  TensorView view;
  view.dtype = info.dtype;
  view.shape = info.shape;
  view.nbytes = info.nbytes();
  view.data = content_->data + content_->begins[found->second];
  view.owner = content_->file;
  if (reinterpret_cast<uintptr_t>(view.data) % dtype_size(view.dtype) != 0) {
    const auto copy = allocate_tensor_bytes(view.nbytes);
    if (view.nbytes > 0) std::memcpy(copy.get(), view.data, view.nbytes);
    view.data = copy.get();
    view.owner = copy;
  }
  return view;
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata,
                                     size_t written)
    : path_(path), entries_(std::move(entries)) {
  const std::string header = make_header(path_, entries_, metadata).text;
  const int flags = written > 0 ? O_RDWR : O_WRONLY | O_CREAT | O_EXCL;
  fd_ = ::open(path_.c_str(), flags | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    throw_runtime(path_.string() + ": cannot " + (written > 0 ? "open" : "create") + ": " +
                  std::strerror(errno));
  }
  try {
    if (written > 0) {
      take_up(header, written);
    } else {
      append(header.data(), header.size());
    }
  } catch (...) {
    ::close(fd_);  // the destructor does not run
    throw;
  }
}

void SafetensorsWriter::take_up(const std::string& header, size_t written) {
  uint64_t end = header.size();
  for (size_t i = 0; i < written; ++i) {
    end += *checked_bytes(entries_.at(i).shape, entries_[i].dtype);
  }
  std::string found(header.size(), '\0');
  struct stat info = {};
  const bool as_begun =
      ::pread(fd_, found.data(), found.size(), 0) == static_cast<ssize_t>(found.size()) &&
      found == header && ::fstat(fd_, &info) == 0 && static_cast<uint64_t>(info.st_size) >= end;
  if (!as_begun) {
    throw_runtime(path_.string() + ": is not the file that was begun here; start over");
  }
  if (::ftruncate(fd_, static_cast<off_t>(end)) != 0 || ::lseek(fd_, 0, SEEK_END) < 0) {
    throw_runtime(path_.string() + ": cannot write: " + std::strerror(errno));
  }
  next_ = written;
  end_ = end;
}

void SafetensorsWriter::append(const void* data, uint64_t bytes) {
  constexpr uint64_t kPage = uint64_t{2} << 20;
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const uint64_t room = kPage - end_ % kPage;
    uint64_t count = std::min(room, bytes);
    if (held_.empty() && bytes >= room) {
      count = room + (bytes - room) / kPage * kPage;
      detail::write_all(fd_, at, count, path_);
    } else {
      held_.insert(held_.end(), at, at + count);
      if (count == room) flush();
    }
    at += count;
    bytes -= count;
    end_ += count;
  }
}

void SafetensorsWriter::flush() {
  detail::write_all(fd_, held_.data(), held_.size(), path_);
  held_.clear();
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ >= 0) ::close(fd_);
}

void SafetensorsWriter::write(const std::string& name, const void* data, uint64_t bytes) {
  const size_t before = next_;
  write_part(name, data, bytes);
  if (next_ == before) {
    throw_runtime(path_.string() + ": tensor " + quoted(name) + ": got only " +
                  std::to_string(bytes) + " bytes");
  }
}

void SafetensorsWriter::write_part(const std::string& name, const void* data, uint64_t bytes) {
  if (fd_ < 0 || next_ >= entries_.size()) {
    throw_runtime(path_.string() + ": cannot write tensor " + quoted(name) + " after the last one");
  }
  const Entry& entry = entries_[next_];
  if (name != entry.name) {
    throw_runtime(path_.string() + ": expected tensor " + quoted(entry.name) + " next, got " +
                  quoted(name));
  }
  const uint64_t expected = *checked_bytes(entry.shape, entry.dtype);
  if (bytes > expected - part_) {
    throw_runtime(path_.string() + ": tensor " + quoted(name) + ": expected " +
                  std::to_string(expected) + " bytes, got " + std::to_string(part_ + bytes));
  }
  append(data, bytes);
  part_ += bytes;
  if (part_ == expected) {
    part_ = 0;
    ++next_;
  }
}

void SafetensorsWriter::sync() {
  flush();
  detail::sync_fd(fd_, path_);
}

uint64_t SafetensorsWriter::file_bytes(const std::vector<Entry>& entries,
                                       const std::map<std::string, std::string>& metadata) {
  const FileHeader header = make_header("", entries, metadata);
  return header.text.size() + header.data_bytes;
}

void SafetensorsWriter::finish() {
  if (fd_ < 0) throw_runtime(path_.string() + ": cannot finish the file twice");
  if (next_ != entries_.size()) {
    throw_runtime(path_.string() + ": expected " + std::to_string(entries_.size()) +
                  " tensors, got " + std::to_string(next_));
  }
  flush();
  detail::close_checked(std::exchange(fd_, -1), path_);
}

}  // namespace hla
