#include "hla/io/checkpoint.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/join.h"
#include "hla/io/folder.h"
#include "hla/io/hub_cache.h"
#include "hla/io/json_file.h"
#include "hla/io/mapped_file.h"

namespace hla {

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// What opening a checkpoint finds out.
struct Opened {
  fs::path path;
  std::string kind;
  json config;
  std::vector<TensorInfo> tensors;
  std::unordered_map<std::string, std::function<TensorView()>> views;
  std::vector<std::function<void()>> release_pages;  // of every file
  std::optional<fs::path> tokenizer;
  std::vector<fs::path> side_files;
};

constexpr const char* kConfigName = "config.json";
constexpr const char* kWeightsName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";

constexpr std::array kSideFiles = {"tokenizer.json",
                                   "tokenizer.model",
                                   "tokenizer_config.json",
                                   "special_tokens_map.json",
                                   "added_tokens.json",
                                   "vocab.json",
                                   "merges.txt",
                                   "tokenizer_goldens.json",
                                   "generation_config.json",
                                   "chat_template.jinja"};

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

// Names of the regular files of a folder that end with `ending`, sorted.
std::vector<std::string> files_ending(const fs::path& folder, const std::string& ending) {
  std::error_code error;
  std::vector<std::string> names = names_in(folder, error);
  std::erase_if(names, [&](const std::string& name) {
    return !name.ends_with(ending) || !is_file(folder / name);
  });
  return names;
}

// Buffers of old transformers versions; the rotation is computed from the config.
bool is_legacy_buffer(const std::string& name) { return name.ends_with(".rotary_emb.inv_freq"); }

// ---- HF folder ----

// Shard name -> reader of those that could be opened.
using Shards = std::map<std::string, SafetensorsReader>;

void open_shard(const fs::path& folder, const std::string& name, Shards& shards,
                Problems& problems) {
  try {
    shards.emplace(name, SafetensorsReader::open(folder / name));
  } catch (const Error& error) {
    if (error.code() != ExitCode::kBadInput) throw;
    problems.add(error.what());
  }
}

// Opens the shards that the index lists and compares the two.
Shards open_indexed(const fs::path& folder, Problems& problems) {
  Shards shards;
  json index;
  try {
    index = read_json_file(folder / kIndexName);
  } catch (const Error& error) {
    problems.add(error.what());
    return shards;
  }
  const std::string subject = std::string(kIndexName) + ": ";
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    problems.add(subject + "expected an object with an object \"weight_map\", got " +
                 json_excerpt(index));
    return shards;
  }
  if (has_key(index, "metadata")) {
    const json& metadata = index["metadata"];
    // The value itself is not compared: published files often count tied weights twice.
    if (!metadata.is_object()) {
      problems.add(subject + "metadata: expected an object, got " + json_excerpt(metadata));
    } else if (has_key(metadata, "total_size") && !metadata["total_size"].is_number()) {
      problems.add(subject + "metadata: total_size: expected a number, got " +
                   json_excerpt(metadata["total_size"]));
    }
  }

  std::map<std::string, std::string> shard_of;  // tensor -> shard
  std::set<std::string> names;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    const std::string prefix = subject + "weight_map: " + json_excerpt(tensor) + ": ";
    if (!shard.is_string()) {
      problems.add(prefix + "expected a file name, got " + json_excerpt(shard));
      continue;
    }
    const auto& name = shard.get_ref<const std::string&>();
    // The index must not make us read files outside its folder.
    if (name.empty() || name.find('/') != std::string::npos ||
        name.find("..") != std::string::npos || name.find('\0') != std::string::npos) {
      problems.add(prefix + "expected the name of a file in the same folder, got " +
                   json_excerpt(shard));
      continue;
    }
    shard_of.emplace(tensor, name);
    names.insert(name);
  }
  if (index["weight_map"].empty()) problems.add(subject + "weight_map lists no tensors");

  for (const std::string& name : names) {
    if (is_file(folder / name)) {
      open_shard(folder, name, shards, problems);
    } else {
      problems.add("the file " + name + ", which " + kIndexName + " lists, is missing");
    }
  }
  for (const auto& [tensor, name] : shard_of) {
    const auto shard = shards.find(name);
    if (shard == shards.end() || shard->second.has(tensor) || is_legacy_buffer(tensor)) continue;
    std::string elsewhere;
    for (const auto& [other, reader] : shards) {
      if (reader.has(tensor)) elsewhere = "; it is in " + other;
    }
    problems.add("tensor " + json_excerpt(tensor) + ": " + kIndexName + " places it in " + name +
                 ", which does not hold it" + elsewhere);
  }
  for (const auto& [name, reader] : shards) {
    for (const TensorInfo& info : reader.tensors()) {
      const auto listed = shard_of.find(info.name);
      if (is_legacy_buffer(info.name)) continue;
      if (listed == shard_of.end()) {
        problems.add("tensor " + json_excerpt(info.name) + ": in " + name + " but not in " +
                     kIndexName);
      } else if (listed->second != name) {
        problems.add("tensor " + json_excerpt(info.name) + ": in " + name + ", but " + kIndexName +
                     " places it in " + listed->second);
      }
    }
  }
  return shards;
}

// Says why a folder without safetensors files cannot be read.
void report_no_weights(const fs::path& folder, Problems& problems) {
  std::vector<std::string> pickled;
  for (const char* ending : {".bin", ".pt", ".pth", ".bin.index.json"}) {
    for (const std::string& name : files_ending(folder, ending)) pickled.push_back(name);
  }
  const std::vector<std::string> gguf = files_ending(folder, ".gguf");
  if (!is_file(folder / kConfigName) && !pickled.empty() &&
      std::none_of(pickled.begin(), pickled.end(),
                   [](const std::string& name) { return name.starts_with("pytorch_model"); })) {
    problems.add("no *.safetensors file, only " + join_some(pickled) +
                 "; for a llama2.c checkpoint give the path of the *.bin file itself");
  } else if (!pickled.empty()) {
    problems.add("the weights are only there as PyTorch pickles (" + join_some(pickled) +
                 "), which are not read; convert them with transformers: "
                 "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., "
                 "safe_serialization=True)");
  } else if (!gguf.empty()) {
    problems.add("GGUF files (" + join_some(gguf) + ") are not read; get the original safetensors");
  } else {
    problems.add(std::string("no ") + kWeightsName + ", " + kIndexName +
                 " or other *.safetensors file");
  }
}

Shards open_weights(const fs::path& folder, Problems& problems) {
  Shards shards;
  if (is_file(folder / kWeightsName)) {
    open_shard(folder, kWeightsName, shards, problems);
    return shards;
  }
  if (is_file(folder / kIndexName)) return open_indexed(folder, problems);
  const std::vector<std::string> names = files_ending(folder, ".safetensors");
  if (names.size() == 1) {
    open_shard(folder, names.front(), shards, problems);
  } else if (names.size() > 1) {
    problems.add("expected " + std::string(kIndexName) + " or a single *.safetensors file, got " +
                 std::to_string(names.size()) + " files without an index: " + join_some(names));
  } else {
    report_no_weights(folder, problems);
  }
  return shards;
}

void rename_tensor(Opened& opened, TensorInfo& info, const std::string& name) {
  opened.views.emplace(name, std::move(opened.views.at(info.name)));
  opened.views.erase(info.name);
  info.name = name;
}

// Names as LlamaForCausalLM has them, where the weights were saved in another way that says the
// same: of the model without its head (LlamaModel, no "model." before the names), or a tied matrix
// under the head's name alone (safetensors' save_model).
void give_usual_names(Opened& opened) {
  constexpr std::string_view kModel = "model.";
  constexpr const char* kEmbedding = "model.embed_tokens.weight";
  constexpr const char* kHead = "lm_head.weight";
  const auto starts = [&](std::string_view prefix) {
    return std::any_of(opened.tensors.begin(), opened.tensors.end(),
                       [&](const TensorInfo& info) { return info.name.starts_with(prefix); });
  };
  if (starts("layers.") && !starts(kModel)) {
    for (TensorInfo& info : opened.tensors) {
      if (info.name != kHead) rename_tensor(opened, info, std::string(kModel) + info.name);
    }
  }
  const json& config = opened.config;
  const bool tied = config.contains("tie_word_embeddings") && config["tie_word_embeddings"] == true;
  if (!tied || opened.views.contains(kEmbedding) || !opened.views.contains(kHead)) return;
  for (TensorInfo& info : opened.tensors) {
    if (info.name == kHead) rename_tensor(opened, info, kEmbedding);
  }
}

Opened open_folder(const fs::path& folder) {
  Opened opened;
  opened.path = folder;
  opened.kind = "HF folder";
  std::error_code unread;
  names_in(folder, unread);
  if (unread) throw_bad_input(folder.string() + ": cannot read: " + unread.message());
  Problems problems(folder.string());
  if (!is_file(folder / kConfigName)) {
    problems.add(std::string("no ") + kConfigName);
  } else {
    try {
      opened.config = read_json_file(folder / kConfigName);
      if (!opened.config.is_object()) {
        problems.add(std::string(kConfigName) + ": expected a JSON object, got " +
                     json_excerpt(opened.config));
      }
    } catch (const Error& error) {
      problems.add(error.what());
    }
  }
  const Shards shards = open_weights(folder, problems);
  problems.throw_if_any();

  for (const auto& [name, reader] : shards) {
    opened.release_pages.push_back([reader = reader] { reader.release_pages(); });
    for (const TensorInfo& info : reader.tensors()) {
      if (is_legacy_buffer(info.name)) continue;
      opened.views.emplace(info.name,
                           [reader = reader, tensor = info.name] { return reader.view(tensor); });
      opened.tensors.push_back(info);
    }
  }
  give_usual_names(opened);
  for (const char* name : kSideFiles) {
    if (is_file(folder / name)) opened.side_files.push_back(folder / name);
  }
  // What has to travel with weights that are made of these.
  std::error_code error;
  for (const std::string& name : names_in(folder, error)) {
    const bool licence = name.starts_with("LICENSE") || name.starts_with("LICENCE") ||
                         name.starts_with("NOTICE") || name.starts_with("USE_POLICY");
    if (licence && is_file(folder / name)) opened.side_files.push_back(folder / name);
  }
  if (is_file(folder / "tokenizer.json") || is_file(folder / "tokenizer.model")) {
    opened.tokenizer = folder;
  }
  return opened;
}

// ---- llama2.c ----

constexpr uint64_t kLlama2cHeaderBytes = 7 * sizeof(int32_t);

struct Llama2cHeader {
  int64_t dim, hidden, layers, heads, kv_heads, vocab, seq;
  bool shared_classifier;
  int64_t head_size() const { return dim / heads; }
  int64_t kv_dim() const { return kv_heads * head_size(); }
};

// One run of floats: `count` tensors of the same shape, one per layer.
struct Segment {
  std::string prefix;  // HF name around the layer number
  std::string suffix;
  int64_t count;
  std::vector<int64_t> shape;
  int64_t rotary_heads;  // > 0: rows to put into the half-split order, that many heads
  bool skip;             // not a weight
};

std::vector<Segment> llama2c_layout(const Llama2cHeader& h) {
  const std::string layer = "model.layers.";
  std::vector<Segment> layout = {
      {"model.embed_tokens.weight", "", 1, {h.vocab, h.dim}, 0, false},
      {layer, ".input_layernorm.weight", h.layers, {h.dim}, 0, false},
      {layer, ".self_attn.q_proj.weight", h.layers, {h.dim, h.dim}, h.heads, false},
      {layer, ".self_attn.k_proj.weight", h.layers, {h.kv_dim(), h.dim}, h.kv_heads, false},
      {layer, ".self_attn.v_proj.weight", h.layers, {h.kv_dim(), h.dim}, 0, false},
      {layer, ".self_attn.o_proj.weight", h.layers, {h.dim, h.dim}, 0, false},
      {layer, ".post_attention_layernorm.weight", h.layers, {h.dim}, 0, false},
      {layer, ".mlp.gate_proj.weight", h.layers, {h.hidden, h.dim}, 0, false},
      {layer, ".mlp.down_proj.weight", h.layers, {h.dim, h.hidden}, 0, false},
      {layer, ".mlp.up_proj.weight", h.layers, {h.hidden, h.dim}, 0, false},
      {"model.norm.weight", "", 1, {h.dim}, 0, false},
      {"freq_cos", "", 1, {h.seq, h.head_size() / 2}, 0, true},
      {"freq_sin", "", 1, {h.seq, h.head_size() / 2}, 0, true},
  };
  if (!h.shared_classifier) {
    layout.push_back({"lm_head.weight", "", 1, {h.vocab, h.dim}, 0, false});
  }
  return layout;
}

// Reads the header and checks it against the size of the file.
Llama2cHeader read_llama2c_header(const MappedFile& file) {
  Problems problems(file.path().string());
  const std::string_view text = file.text();
  if (text.starts_with("PK\x03\x04") || text.starts_with("\x80\x02")) {
    problems.add("a PyTorch pickle, which is not read; give a folder with safetensors files");
  } else if (text.starts_with("24ka")) {  // 0x616b3432, little endian
    problems.add("a llama2.c file of version 1 or 2; export it with `--version 0`");
  } else if (file.size() < kLlama2cHeaderBytes) {
    problems.add("not a llama2.c file: expected a header of 28 bytes, got " +
                 std::to_string(file.size()) + " bytes");
  }
  problems.throw_if_any();

  std::array<int32_t, 7> raw;
  std::memcpy(raw.data(), file.data(), kLlama2cHeaderBytes);
  constexpr std::array kNames = {"dim",      "hidden dim", "layers",         "heads",
                                 "kv heads", "vocab",      "sequence length"};
  for (size_t i = 0; i < raw.size(); ++i) {
    // A negative vocabulary size marks a classifier of its own.
    const bool ok = std::string_view(kNames[i]) == "vocab" ? raw[i] != 0 : raw[i] > 0;
    if (!ok) {
      problems.add(std::string(kNames[i]) + ": expected a positive number, got " +
                   std::to_string(raw[i]));
    }
  }
  constexpr const char* kHint = "is this a llama2.c checkpoint of version 0?";
  problems.throw_if_any(kHint);
  Llama2cHeader header = {raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[5] > 0};
  if (header.vocab < 0) header.vocab = -header.vocab;

  const auto numbers = [](int64_t a, int64_t b) {
    return std::to_string(a) + " and " + std::to_string(b);
  };
  if (header.dim % header.heads != 0) {
    problems.add("dim and heads: expected a multiple, got " + numbers(header.dim, header.heads));
  } else if (header.head_size() % 2 != 0) {
    problems.add("head size: expected an even number, got " + std::to_string(header.head_size()));
  }
  if (header.heads % header.kv_heads != 0) {
    problems.add("heads and kv heads: expected a multiple, got " +
                 numbers(header.heads, header.kv_heads));
  }
  problems.throw_if_any(kHint);

  uint64_t expected = kLlama2cHeaderBytes;
  bool overflow = false;
  for (const Segment& segment : llama2c_layout(header)) {
    uint64_t bytes = sizeof(float);
    overflow |= __builtin_mul_overflow(bytes, static_cast<uint64_t>(segment.count), &bytes);
    for (const int64_t extent : segment.shape) {
      overflow |= __builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes);
    }
    overflow |= __builtin_add_overflow(expected, bytes, &expected);
  }
  if (overflow) {
    problems.add("the sizes in the header overflow");
  } else if (expected > file.size()) {
    problems.add("the file is " + std::to_string(expected - file.size()) +
                 " bytes shorter than its header says: expected " + std::to_string(expected) +
                 " bytes, got " + std::to_string(file.size()));
  } else if (expected < file.size()) {
    problems.add("the file is " + std::to_string(file.size() - expected) +
                 " bytes longer than its header says: expected " + std::to_string(expected) +
                 " bytes, got " + std::to_string(file.size()));
  }
  problems.throw_if_any(kHint);
  return header;
}

// Rows (2i, 2i+1) of each head rotate together in a llama2.c file, rows (i, i + d/2) in HF order.
std::shared_ptr<std::byte> half_split_rows(const std::byte* source, int64_t rows, int64_t columns,
                                           int64_t heads) {
  const auto row_bytes = static_cast<size_t>(columns) * sizeof(float);
  const int64_t head_size = rows / heads;
  const int64_t half = head_size / 2;
  auto result = allocate_tensor_bytes(static_cast<uint64_t>(rows) * row_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row / head_size * head_size;
    const int64_t within = row % head_size;
    const int64_t from = first + (within < half ? 2 * within : 2 * (within - half) + 1);
    std::memcpy(result.get() + static_cast<size_t>(row) * row_bytes,
                source + static_cast<size_t>(from) * row_bytes, row_bytes);
  }
  return result;
}

std::optional<fs::path> find_llama2c_tokenizer(const fs::path& checkpoint, int64_t vocab) {
  const fs::path folder = checkpoint.has_parent_path() ? checkpoint.parent_path() : fs::path(".");
  // llama2.c's own is for 32,000 ids, and lies where its other models do.
  for (const std::string& name :
       {"tok" + std::to_string(vocab) + ".model", std::string("tokenizer.model")}) {
    if (is_file(folder / name)) return folder / name;
  }
  const std::vector<std::string> models = files_ending(folder, ".model");
  if (models.size() == 1) return folder / models.front();
  return std::nullopt;
}

json llama2c_config(const Llama2cHeader& h) {
  return {{"architectures", json::array({"LlamaForCausalLM"})},
          {"model_type", "llama"},
          {"hidden_act", "silu"},
          {"hidden_size", h.dim},
          {"intermediate_size", h.hidden},
          {"num_hidden_layers", h.layers},
          {"num_attention_heads", h.heads},
          {"num_key_value_heads", h.kv_heads},
          {"head_dim", h.head_size()},
          {"vocab_size", h.vocab},
          {"max_position_embeddings", h.seq},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", 10000.0},
          {"attention_bias", false},
          {"mlp_bias", false},
          {"tie_word_embeddings", h.shared_classifier},
          {"bos_token_id", 1},
          {"eos_token_id", 2},
          {"torch_dtype", "float32"}};
}

Opened open_llama2c(const fs::path& path) {
  const auto file = MappedFile::open(path);
  const Llama2cHeader header = read_llama2c_header(*file);
  Opened opened;
  opened.path = path;
  opened.kind = "llama2.c";
  opened.config = llama2c_config(header);
  opened.release_pages.push_back([file] { file->release_pages(); });
  const std::byte* at = file->data() + kLlama2cHeaderBytes;
  for (const Segment& segment : llama2c_layout(header)) {
    for (int64_t i = 0; i < segment.count; ++i) {
      const bool per_layer = !segment.suffix.empty();
      TensorInfo info;
      info.name = segment.prefix + (per_layer ? std::to_string(i) + segment.suffix : "");
      info.dtype = DType::kF32;
      info.shape = segment.shape;
      info.file = path;
      const std::byte* data = at;
      at += info.nbytes();
      if (segment.skip) continue;
      opened.views.emplace(info.name, [file, data, info, heads = segment.rotary_heads] {
        TensorView view{info.dtype, info.shape, data, info.nbytes(), file};
        if (heads > 0) {
          const auto rows = half_split_rows(data, info.shape[0], info.shape[1], heads);
          view.data = rows.get();
          view.owner = rows;
        }
        return view;
      });
      opened.tensors.push_back(std::move(info));
    }
  }
  opened.tokenizer = find_llama2c_tokenizer(path, header.vocab);
  if (opened.tokenizer) {
    opened.side_files.push_back(*opened.tokenizer);
    // NAME_goldens.json beside NAME.model, see tokenizer_goldens_path.
    const fs::path goldens =
        opened.tokenizer->parent_path() / (opened.tokenizer->stem().string() + "_goldens.json");
    if (is_file(goldens)) opened.side_files.push_back(goldens);
  }
  return opened;
}

Opened open_file(const fs::path& path) {
  const std::string name = path.filename().string();
  const bool safetensors =
      name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
  if (safetensors || name == kConfigName) {
    throw_bad_input(path.string() + ": a single file of a model; give the folder it is in");
  }
  if (name.ends_with(".gguf")) {
    throw_bad_input(path.string() + ": GGUF files are not read; get the model as safetensors");
  }
  return open_llama2c(path);
}

}  // namespace

struct Checkpoint::Content : Opened {};

Checkpoint::Checkpoint(std::shared_ptr<const Content> content) : content_(std::move(content)) {}

Checkpoint Checkpoint::open(const std::string& path_or_id) {
  const fs::path path = resolve_model_path(path_or_id);
  std::error_code error;
  Opened opened = fs::is_directory(path, error) ? open_folder(path) : open_file(path);
  return Checkpoint(std::make_shared<const Content>(Content{std::move(opened)}));
}

const fs::path& Checkpoint::path() const { return content_->path; }
const std::string& Checkpoint::kind() const { return content_->kind; }
const json& Checkpoint::config() const { return content_->config; }
const std::vector<TensorInfo>& Checkpoint::tensors() const { return content_->tensors; }
bool Checkpoint::has(const std::string& name) const { return content_->views.contains(name); }

TensorView Checkpoint::tensor(const std::string& name) const {
  const auto found = content_->views.find(name);
  if (found == content_->views.end()) {
    throw_bad_input(content_->path.string() + ": no tensor " + json_excerpt(name));
  }
  return found->second();
}

void Checkpoint::release_pages() const {
  for (const auto& release : content_->release_pages) release();
}

std::optional<fs::path> Checkpoint::tokenizer_path() const { return content_->tokenizer; }
std::vector<fs::path> Checkpoint::side_files() const { return content_->side_files; }

uint64_t Checkpoint::weight_bytes() const {
  uint64_t total = 0;
  for (const TensorInfo& info : content_->tensors) total += info.nbytes();
  return total;
}

}  // namespace hla
