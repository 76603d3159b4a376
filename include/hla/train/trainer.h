// Steps of AdamW on a model, whatever the rows come from.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "hla/model/llama.h"
#include "hla/train/finetune_config.h"
#include "hla/train/training_rows.h"

namespace torch::optim {
class AdamW;
}

namespace hla {

// The learning rate of a step, counted from 0, of `steps`, in parts of the highest.
double learning_rate_ratio(const FinetuneConfig::Schedule& schedule, int64_t step, int64_t steps);

// Whether "train.parameters" `which` tunes the parameter of that HF name.
bool is_tuned(const std::string& which, const std::string& name);

class Trainer {
 public:
  // Marks the parameters to be tuned; the others stay as they are. The model must outlive it.
  // Throws kBadInput where there is nothing to tune.
  Trainer(LlamaForCausalLM& model, const FinetuneConfig& config, int64_t steps);
  ~Trainer();

  struct Step {
    double loss = 0;           // mean over the labels, nats
    double gradient_norm = 0;  // of the mean loss, before it is shortened
    double learning_rate = 0;
    int64_t labels = 0;
  };
  // One step on the mean loss over all labels of the batches. Throws kNonFinite naming the step and
  // the first tensor with NaN or Inf in its gradient.
  Step step(const std::vector<TrainingRows::Batch>& batches);

  // What a later Trainer of the same model and config needs to go on after as many steps: weights
  // and moments, in a safetensors file that appears complete.
  void save(const std::filesystem::path& file) const;
  // Throws kBadInput for a file of other parameters.
  void load(const std::filesystem::path& file, int64_t steps);

  int64_t tuned_parameters() const;  // elements

 private:
  double gradient_norm() const;

  LlamaForCausalLM& model_;
  FinetuneConfig config_;
  int64_t steps_;
  int64_t done_ = 0;
  std::vector<std::pair<std::string, at::Tensor>> tuned_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;
};

}  // namespace hla
