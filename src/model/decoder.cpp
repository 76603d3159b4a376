#include "hla/model/decoder.h"

#include <ATen/ATen.h>

#include "hla/core/error.h"
#include "hla/core/memory.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

RopeTables positions_of(const RopeTables& tables, int64_t begin, int64_t end) {
  return {tables.cos.slice(0, begin, end), tables.sin.slice(0, begin, end)};
}

}  // namespace

std::string to_string(DecoderOptions::Attend attend) {
  switch (attend) {
    case DecoderOptions::Attend::kDecode:
      return "decode";
    case DecoderOptions::Attend::kRebuild:
      return "rebuild";
    default:
      return "cheapest";
  }
}

Decoder::Decoder(const LlamaForCausalLM& model, const DecoderOptions& options)
    : model_(model),
      options_(options),
      max_length_(options.max_length > 0 ? options.max_length
                                         : model.config().max_position_embeddings),
      cache_dtype_(options.cache_dtype.value_or(model.dtype())) {
  if (max_length_ > kLongestSequence) {
    throw_usage("[decoder] expected a sequence of at most " + std::to_string(kLongestSequence) +
                " tokens, got " + std::to_string(max_length_));
  }
  const ModelConfig& config = model.config();
  const RopeFrequencies frequencies =
      rope_frequencies(config.rope, config.head_dim, config.max_position_embeddings, max_length_);
  const int64_t positions =
      (max_length_ + kTileTokens - 1) / kTileTokens * kTileTokens + kLongestTurnedBlock;
  if (model.device().is_cpu()) {
    const auto elements = static_cast<uint64_t>(positions * config.frequencies());
    // cos and sin, plain and in tiles, and the angles while they are made.
    preflight_memory(6 * elements * c10::elementSize(model.dtype()),
                     "the positions of a sequence of " + std::to_string(max_length_) + " tokens");
  }
  rope_ = rope_tables(frequencies,
                      at::arange(positions, at::TensorOptions(at::kLong).device(model.device())),
                      model.dtype());
  if (uses_kernels()) tiled_rope_ = TiledRope(rope_, frequencies);
  const DecodeAttentionOptions attention = {
      .absorb_error = options.absorb_error,
      .amplification = options.amplification.value_or(
          default_amplification(model.dtype(), cache_dtype_, model.device()))};
  for (const auto& layer : model.layers()) {
    attention_.push_back(std::make_unique<DecodeAttention>(layer->self_attn(), config,
                                                           frequencies.inv_freq, attention));
  }
}

bool Decoder::uses_kernels() const {
  return model_.device().is_cpu() && model_.dtype() == at::kFloat &&
         (cache_dtype_ == at::kFloat || is_half(cache_dtype_));
}

SequenceCache Decoder::new_sequence() const {
  return SequenceCache(model_.config(), cache_dtype_, model_.device(),
                       uses_kernels() ? CacheLayout::kTiles : CacheLayout::kRows);
}

bool Decoder::decodes(int64_t layer, int64_t count, int64_t before) const {
  if (options_.attend != DecoderOptions::Attend::kCheapest) {
    return options_.attend == DecoderOptions::Attend::kDecode;
  }
  // Products per token that is read. Floats that are loaded or copied count too, by what they
  // take beside a product.
  constexpr double kLoad = 2;
  constexpr double kCopy = 8;
  const DecodeAttention& attention = this->attention(layer);
  const auto floats = static_cast<double>(attention.maps().floats);
  const auto queries = static_cast<double>(count);
  const double attending =
      2.0 * static_cast<double>(attention.maps().heads * attention.maps().head_dim);
  const double decoding = queries * (attention.decode_cost() + kLoad * floats);
  if (uses_kernels()) {
    return decoding <
           attention.rebuild_cost() + (before > 0 ? kCopy * floats : 0.0) + queries * attending;
  }
  // LibTorch's operations, a query at a time or for all of them at once: to start one takes as long
  // as so many products, by order of magnitude (5 µs at 10 T products/s; on the CPU 15 µs at 60 G,
  // as measured in bf16).
  const double start = model_.device().is_cpu() ? 1e6 : 5e7;
  const double made =
      model_.config().hla ? 2.0 * static_cast<double>(model_.config().kv_size()) : 0;
  const double rebuilding = attention.rebuild_cost() + kCopy * made + queries * attending;
  const auto length = static_cast<double>(before + count);
  return length * decoding + start * queries * static_cast<double>(attention.decode_operations()) <
         length * rebuilding + start * static_cast<double>(attention.rebuild_operations());
}

at::Tensor Decoder::contexts(int64_t layer, const std::vector<Reader>& readers,
                             const at::Tensor& q) const {
  const DecodeAttention& attention = this->attention(layer);
  const auto count = static_cast<int64_t>(readers.size());
  if (!uses_kernels()) {
    std::vector<at::Tensor> rows;
    const LayerCache* cache = nullptr;
    at::Tensor records;  // of the cache; a chunk's tokens read the same one
    for (const Reader& reader : readers) {
      if (reader.cache != cache) records = reader.cache->records().to(q.scalar_type());
      cache = reader.cache;
      rows.push_back(attention.context(q[reader.token], records.slice(0, 0, reader.length), rope_));
    }
    return at::stack(rows);
  }
  const at::Tensor queries = q.contiguous();
  at::Tensor result = at::empty({count, attention.maps().context_floats()}, q.options());
  std::vector<std::vector<const void*>> blocks;
  std::vector<DecodeItem> items;
  for (const Reader& reader : readers) {
    TORCH_CHECK(reader.cache->layout() == CacheLayout::kTiles,
                "[decoder] expected a sequence of this decoder, got one in rows");
    std::vector<const void*>& pointers = blocks.emplace_back();
    for (const at::Tensor& block : reader.cache->blocks())
      pointers.push_back(block.const_data_ptr());
  }
  for (size_t i = 0; i < readers.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    items.push_back({blocks[i].data(), readers[i].length,
                     queries.const_data_ptr<float>() + readers[i].token * queries.stride(0),
                     result.mutable_data_ptr<float>() + row * result.stride(0)});
  }
  attention.kernel().attend(tiled_rope_, items, cache_dtype_, kCacheBlock);
  return result;
}

std::vector<Decoder::KeysValues> Decoder::rebuild(int64_t layer,
                                                  const std::vector<const LayerCache*>& caches,
                                                  at::ScalarType dtype) const {
  // Without kernels, those of all sequences by one product, as far as memory is no concern.
  constexpr int64_t kTogether = 32768;  // tokens
  const bool together = !uses_kernels() && model_.config().hla;
  const DecodeAttention& attention = this->attention(layer);
  std::vector<KeysValues> result;
  for (size_t begin = 0; begin < caches.size();) {
    std::vector<at::Tensor> records, cos, sin;
    int64_t tokens = 0;
    size_t end = begin;
    do {
      const int64_t length = caches[end]->length();
      const RopeTables rope = positions_of(rope_, 0, length);
      records.push_back(caches[end]->records().to(dtype));
      cos.push_back(rope.cos);
      sin.push_back(rope.sin);
      tokens += length;
      ++end;
    } while (together && end < caches.size() && tokens + caches[end]->length() <= kTogether);
    const auto whole = [](const std::vector<at::Tensor>& parts) {
      return parts.size() == 1 ? parts[0] : at::cat(parts);
    };
    const auto [k, v] = attention.rebuild(whole(records), {whole(cos), whole(sin)});
    int64_t row = 0;
    for (; begin < end; ++begin) {
      const int64_t next = row + caches[begin]->length();
      result.push_back({k.slice(0, row, next), v.slice(0, row, next)});
      row = next;
    }
  }
  return result;
}

at::Tensor Decoder::attend(int64_t layer, const std::vector<Chunk>& chunks, const at::Tensor& q,
                           const DecodeAttention::Projected& projected,
                           const RopeTables& rope) const {
  const DecodeAttention& attention = this->attention(layer);
  struct Part {  // of a chunk
    const LayerCache* cache;
    int64_t begin, end;  // its tokens among all new ones
    int64_t before;      // those of its sequence that were there
    bool decodes;
  };
  std::vector<Part> parts;
  std::vector<const LayerCache*> caches;  // of those that rebuild behind others
  int64_t tokens = 0;
  for (const Chunk& chunk : chunks) {
    const LayerCache& cache = chunk.cache->layer(layer);
    const auto count = static_cast<int64_t>(chunk.ids.size());
    const int64_t before = cache.length() - count;
    parts.push_back({&cache, tokens, tokens + count, before, decodes(layer, count, before)});
    tokens += count;
    if (before > 0 && !parts.back().decodes) caches.push_back(&cache);
  }
  const std::vector<KeysValues> rebuilt = rebuild(layer, caches, q.scalar_type());
  size_t next_rebuilt = 0;
  std::vector<Reader> readers;
  std::vector<at::Tensor> gathered;  // by chunk; undefined: of the readers
  for (const auto& [cache, begin, end, before, decodes] : parts) {
    if (decodes) {
      for (int64_t i = begin; i < end; ++i) readers.push_back({cache, before + i - begin + 1, i});
      gathered.emplace_back();
      continue;
    }
    const auto [k, v] = before > 0 ? rebuilt[next_rebuilt++]
                                   : attention.rebuild({projected.plain.slice(0, begin, end),
                                                        projected.records.slice(0, begin, end)},
                                                       positions_of(rope, begin, end));
    gathered.push_back(
        Attention::context({q.slice(0, begin, end).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)})
            .squeeze(0));
  }
  if (readers.empty()) return gathered.size() == 1 ? gathered[0] : at::cat(gathered);
  const at::Tensor read = attention.gather(contexts(layer, readers, q));
  if (read.size(0) == tokens) return read;
  int64_t row = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!parts[i].decodes) continue;
    const int64_t count = parts[i].end - parts[i].begin;
    gathered[i] = read.slice(0, row, row + count);
    row += count;
  }
  return at::cat(gathered);
}

at::Tensor Decoder::read(const std::vector<Chunk>& chunks) const {
  std::vector<int64_t> ids;
  std::vector<int64_t> positions;
  if (chunks.empty()) throw_bad_input("[decoder] expected sequences to read, got none");
  for (const Chunk& chunk : chunks) {
    if (chunk.ids.empty()) throw_bad_input("[decoder] expected tokens of a sequence, got none");
    const int64_t begin = chunk.cache->length();
    const int64_t end = begin + static_cast<int64_t>(chunk.ids.size());
    if (end > max_length_) {
      throw_bad_input("[decoder] expected at most " + std::to_string(max_length_) +
                      " tokens in a sequence, got " + std::to_string(end));
    }
    ids.insert(ids.end(), chunk.ids.begin(), chunk.ids.end());
    for (int64_t position = begin; position < end; ++position) positions.push_back(position);
  }
  // Whatever works token by token takes the tokens of all sequences as one.
  const at::Tensor index = at::tensor(positions, at::kLong).to(model_.device());
  const RopeTables rope = {rope_.cos.index_select(0, index), rope_.sin.index_select(0, index)};
  at::Tensor hidden = model_.embed(at::tensor(ids, at::kLong).unsqueeze(0));  // (1, N, D)
  for (size_t l = 0; l < model_.layers().size(); ++l) {
    const auto number = static_cast<int64_t>(l);
    const DecoderLayer& layer = *model_.layers()[l];
    const at::Tensor x = layer.input_layernorm().forward(hidden);
    const DecodeAttention::Projected projected = attention_[l]->project(x.squeeze(0), rope);
    const at::Tensor q = layer.self_attn().queries(x, rope).squeeze(0);  // (N, H, d)
    int64_t begin = 0;
    for (const Chunk& chunk : chunks) {
      const int64_t end = begin + static_cast<int64_t>(chunk.ids.size());
      chunk.cache->layer(number).append(projected.records.slice(0, begin, end));
      begin = end;
    }
    const at::Tensor context = attend(number, chunks, q, projected, rope);
    hidden = layer.finish(hidden, layer.self_attn().output(context.unsqueeze(0)));
  }
  return model_.final_norm(hidden).squeeze(0);
}

at::Tensor Decoder::next_logits(const std::vector<Chunk>& chunks) const {
  const at::Tensor hidden = read(chunks);
  std::vector<int64_t> last;
  int64_t end = 0;
  for (const Chunk& chunk : chunks) {
    end += static_cast<int64_t>(chunk.ids.size());
    last.push_back(end - 1);
  }
  const at::Tensor index = at::tensor(last, at::kLong).to(hidden.device());
  return model_.logits(hidden.index_select(0, index)).to(at::kFloat);
}

}  // namespace hla
