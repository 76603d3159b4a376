#include "hla/model/decoder.h"

#include <ATen/ATen.h>

#include "hla/core/error.h"

namespace hla {
namespace {

RopeTables positions_of(const RopeTables& tables, int64_t begin, int64_t end) {
  return {tables.cos.slice(0, begin, end), tables.sin.slice(0, begin, end)};
}

// Attention of q (T, H, d), the last T tokens that `cache` holds, with all keys and values rebuilt
// -> (T, H·d).
at::Tensor rebuilt_context(const Attention& attention, const at::Tensor& q, const LayerCache& cache,
                           const RopeTables& tables) {
  const auto [k, v] = attention.rebuild(cache.records().to(q.scalar_type()).unsqueeze(0),
                                        positions_of(tables, 0, cache.length()));
  return Attention::context({q.unsqueeze(0), k, v}).squeeze(0);
}

}  // namespace

Decoder::Decoder(const LlamaForCausalLM& model, const DecoderOptions& options)
    : model_(model),
      max_length_(options.max_length > 0 ? options.max_length
                                         : model.config().max_position_embeddings),
      rope_(model.rope(max_length_)) {}

SequenceCache Decoder::new_sequence() const {
  return SequenceCache(model_.config(), model_.dtype(), model_.device());
}

at::Tensor Decoder::read(const std::vector<Chunk>& chunks) const {
  std::vector<int64_t> ids;
  std::vector<int64_t> positions;
  std::vector<int64_t> ends;  // of chunks, in tokens
  for (const Chunk& chunk : chunks) {
    const int64_t begin = chunk.cache->length();
    const int64_t end = begin + static_cast<int64_t>(chunk.ids.size());
    if (end > max_length_) {
      throw_bad_input("[decoder] expected at most " + std::to_string(max_length_) +
                      " tokens in a sequence, got " + std::to_string(end));
    }
    ids.insert(ids.end(), chunk.ids.begin(), chunk.ids.end());
    for (int64_t position = begin; position < end; ++position) positions.push_back(position);
    ends.push_back(static_cast<int64_t>(ids.size()));
  }
  // Whatever works token by token takes the tokens of all sequences as one.
  const at::Tensor index = at::tensor(positions, at::kLong).to(model_.device());
  const RopeTables rope = {rope_.cos.index_select(0, index), rope_.sin.index_select(0, index)};
  at::Tensor hidden = model_.embed(at::tensor(ids, at::kLong).unsqueeze(0));  // (1, N, D)
  for (size_t l = 0; l < model_.layers().size(); ++l) {
    const DecoderLayer& layer = *model_.layers()[l];
    const Attention& attention = layer.self_attn();
    const at::Tensor x = layer.input_layernorm().forward(hidden);
    const at::Tensor records = attention.records(x, rope).squeeze(0);  // (N, n)
    const at::Tensor q = attention.queries(x, rope).squeeze(0);        // (N, H, d)
    std::vector<at::Tensor> contexts;
    int64_t begin = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      LayerCache& cache = chunks[i].cache->layer(static_cast<int64_t>(l));
      cache.append(records.slice(0, begin, ends[i]));
      contexts.push_back(rebuilt_context(attention, q.slice(0, begin, ends[i]), cache, rope_));
      begin = ends[i];
    }
    const at::Tensor context = contexts.size() == 1 ? contexts[0] : at::cat(contexts);
    hidden = layer.finish(hidden, attention.output(context.unsqueeze(0)));
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
