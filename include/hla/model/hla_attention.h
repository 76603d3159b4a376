// Latent attention: keys and values come from short latents, which are all that need be cached.
//
// Notation of docs/design.md: d head size, m = d/2 frequencies, K kv heads, c = fast_frequencies.
// Keys of the fast frequencies f < c come from the k latent, those of the slow ones f >= c and the
// values from the kv latent:
//
//   k_down (k_floats, D)                       x -> k latent
//   k_up   original (K·2c, k_rank)             k latent -> fast keys, by head [first half, second]
//          latent   (2, K, R) real, imaginary  complex matrix per frequency, R = Σ k_ranks
//          paper    (K·d, k_rank)              after the rotation of the latent
//   kv_down (kv_rank, D)                       x -> kv latent
//   kv_up  (K·2(m-c) + K·d, kv_rank)           kv latent -> slow keys by head, then values by head
//   q_proj, or q_down (q_rank, D) and q_up (H·d, q_rank)
//
// Biases of the base model's k and v are kept exactly, in k_up.bias and kv_up.bias. A model may
// have those, or o_proj.bias, without attention_bias: see HlaConfig.
#pragma once

#include <memory>
#include <string>

#include "hla/model/attention.h"

namespace hla {

// k_up of rope `latent`: a complex matrix (K × r_f) per fast frequency, packed along R.
class ComplexUp : public torch::nn::Module {
 public:
  ComplexUp(ParameterSource& source, const std::string& prefix, int64_t kv_heads,
            const std::vector<int64_t>& ranks, bool bias);
  // The real matrix (K·2c, 2R) that maps [re z; im z] to fast keys by head [first half, second].
  // Differentiable in the weight.
  at::Tensor real_matrix() const;
  // Frequency number of each complex latent: (R) int64.
  // Where the weight is now: Module::to() moves parameters alone.
  at::Tensor frequency_index() const { return frequency_index_.to(weight.device()); }

  at::Tensor weight;  // (2, K, R)
  at::Tensor bias;    // (K·2c), or undefined

 private:
  int64_t fast_frequencies_;
  at::Tensor frequency_index_;
};

class HlaAttention : public Attention {
 public:
  HlaAttention(ParameterSource& source, const std::string& prefix, const ModelConfig& config,
               int64_t layer);

  // For a sequence that is read as a whole: nothing is cached, so down and up matrices are
  // multiplied in whichever order is cheaper.
  Qkv project(const at::Tensor& x, const RopeTables& rope) const override;

  // The k latent, rotated for `latent` and `paper`, then the kv latent, never rotated.
  int64_t record_floats() const override { return layer_.cache_floats(); }
  at::Tensor records(const at::Tensor& x, const RopeTables& rope) const override;
  at::Tensor queries(const at::Tensor& x, const RopeTables& rope) const override;
  std::pair<at::Tensor, at::Tensor> rebuild(const at::Tensor& records,
                                            const RopeTables& rope) const override;

  // The linear maps between hidden states, latents, keys and values, undefined where there is none.
  struct Maps {
    int64_t fast_frequencies = 0;  // c
    at::Tensor k_down;             // (k_floats, D)
    // Frequencies by which pairs (2i, 2i+1) of the k latent are rotated before it is cached; empty:
    // not at all, and `fast` gives keys that are rotated afterwards.
    std::vector<int64_t> k_rotation;
    at::Tensor fast;       // (K, 2, c, k_floats)
    at::Tensor fast_bias;  // (K, 2, c)
    at::Tensor kv_down;    // (r, D)
    at::Tensor slow;       // (K, 2, m - c, r)
    at::Tensor slow_bias;
    at::Tensor values;  // (K, d, r)
    at::Tensor values_bias;
  };
  Maps maps() const;
  HlaRope rope_kind() const { return rope_kind_; }

  // Multiplies latents by powers of two, so that a row of a down matrix is about as long as its
  // column of the up matrix; what the layer computes stays the same to the bit. Conversions leave
  // short rows and columns 300 times longer, so that a step of an optimizer which moves all entries
  // alike (AdamW) would change what their product is far more than it changes a plain matrix.
  void balance();

 private:
  at::Tensor rotated_k_latent(const at::Tensor& x, const RopeTables& rope) const;
  at::Tensor fast_keys(const at::Tensor& k_latent, const RopeTables& rope) const;
  at::Tensor rotate_fast_keys(const at::Tensor& up, const RopeTables& rope) const;
  std::pair<at::Tensor, at::Tensor> assemble(at::Tensor fast, const at::Tensor& up,
                                             const at::Tensor& like, const RopeTables& rope) const;
  at::Tensor paper_rotate(const at::Tensor& latent, const at::Tensor& rotation,
                          const RopeTables& rope) const;

  HlaRope rope_kind_;
  double rotary_fraction_;
  HlaLayerConfig layer_;
  std::shared_ptr<Linear> q_proj_, q_down_, q_up_;
  std::shared_ptr<Linear> k_down_, k_up_;
  std::shared_ptr<ComplexUp> k_up_complex_;
  std::shared_ptr<Linear> kv_down_, kv_up_;
  // Of `paper`: the frequency of each pair of a latent that turns.
  at::Tensor q_rotation_, k_rotation_;
};

// Number of rotated pairs and the frequency of pair i for the `paper` rotation of a latent of
// `rank` floats over `heads` heads: pairs cycle through the first rank/(2·heads) frequencies of
// the head's own ladder (d/4 of them at the default rank d/2 a head).
struct PaperPairs {
  int64_t rotated = 0;
  std::vector<int64_t> frequency;  // of the rotated pairs
};
PaperPairs paper_pairs(int64_t rank, int64_t heads, int64_t head_dim, double rotary_fraction);

}  // namespace hla
