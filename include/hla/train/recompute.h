// Layers whose activations are made again on the way back instead of being kept.
#pragma once

#include <ATen/core/Tensor.h>

#include "hla/model/rope.h"

namespace hla {

class DecoderLayer;

// layer.forward(), (B, T, D) -> (B, T, D), of which autograd keeps the input alone: on the way back
// the layer runs a second time. First derivatives only. The layer must live until then.
// Source: Chen et al. 2016, arXiv:1604.06174; torch.utils.checkpoint with use_reentrant=True.
at::Tensor recomputed_forward(const DecoderLayer& layer, const at::Tensor& hidden,
                              const RopeTables& rope);

}  // namespace hla
