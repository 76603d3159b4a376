// Steps of AdamW on a model, whatever the rows come from.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "hla/train/distillation.h"
#include "hla/train/finetune_config.h"
#include "hla/train/loss_scale.h"
#include "hla/train/low_rank.h"
#include "hla/train/training_rows.h"

namespace hla {

class LlamaForCausalLM;

// The learning rate of a step, counted from 0, of `steps`, in parts of the highest.
double learning_rate_ratio(const FinetuneConfig::Schedule& schedule, int64_t step, int64_t steps);

// Whether "train.parameters" `which` tunes the parameter of that HF name.
bool is_tuned(const std::string& which, const std::string& name);

// Whether "train.lora_rank" gives the parameter of that HF name and so many dimensions an update of
// low rank, where it is not tuned itself: the matrices of the layers.
bool is_lora_target(const std::string& name, int64_t dimensions);

// Throws kBadInput where train.parameters names nothing that the model has, kUsage where
// train.lora_rank has nothing to work on.
void check_tuned(const LlamaForCausalLM& model, const FinetuneConfig& config);

// Steps of distillation to the teacher's attention come first, then those on the loss; each kind
// has its own schedule and moments.
struct TrainerSteps {
  int64_t attention = 0;
  int64_t loss = 0;

  int64_t total() const { return attention + loss; }
};

class Trainer {
 public:
  // Marks the parameters to be tuned; the others stay as they are. Model and teacher must outlive
  // it. `dtype` is what the model is to compute in, if not in its own; where that is half
  // precision, AdamW works on fp32 weights of the trainer's own, of which the model gets the
  // rounded ones, and in fp16 the loss is scaled (LossScale). So a model is best loaded as it is
  // stored, or in fp32: from rounded weights no small step leads to others, as each is in the
  // middle of those that round to it. Throws as check_tuned() and check_teacher() do.
  Trainer(LlamaForCausalLM& model, const FinetuneConfig& config, TrainerSteps steps,
          const LlamaForCausalLM* teacher = nullptr,
          std::optional<at::ScalarType> dtype = std::nullopt);

  struct Step {
    double loss = 0;           // mean over the labels, nats
    double kl = 0;             // likewise, of KL(teacher‖model), where distill.kl is above 0
    double hidden = 0;         // hidden_loss(), or match_attention() in a step on attention
    double gradient_norm = 0;  // of the mean loss, before it is shortened
    double learning_rate = 0;
    double loss_scale = 1;
    bool on_attention = false;  // `loss` is not measured then
    bool skipped = false;       // the scale was too large: nothing was changed
    int64_t labels = 0;
  };
  // One step on the mean loss over all labels of the batches. Throws kNonFinite naming the step and
  // the first layer with NaN or Inf, or the first tensor with one in its gradient.
  Step step(const std::vector<TrainingRows::Batch>& batches);

  // What a later Trainer of the same model and config needs to go on after as many steps: fp32
  // weights, moments and loss scale, in a safetensors file that appears complete.
  void save(const std::filesystem::path& file) const;
  // Throws kBadInput for a file of other parameters.
  void load(const std::filesystem::path& file, int64_t steps);

  // The weights that are tuned, by HF name, as AdamW has them; those of LoRA are made when they are
  // asked for.
  std::map<std::string, std::function<at::Tensor()>> tuned_weights() const;

  int64_t tuned_parameters() const;  // elements; of updates of low rank those of their factors
  uint64_t bytes() const;  // of tuned weights, gradients and moments, when steps have been done
  uint64_t checkpoint_bytes() const;  // of what save() writes, but for small things
  int64_t skipped_steps() const { return skipped_; }

 private:
  // A parameter of AdamW's. `weight` is the model's, `master` what is tuned: the same tensor in
  // fp32, else its fp32 twin.
  struct Tuned {
    std::string name;
    at::Tensor weight;
    at::Tensor master;
  };
  struct LowRank {
    std::string name;
    at::Tensor weight;  // the model's
    LowRankUpdate update;
  };

  void add_parameters(at::ScalarType dtype);
  void update(double learning_rate);
  // Adds the gradients of a batch to those of the masters, `losses` on the mean over the labels.
  void add_loss(const TrainingRows::Batch& batch, double labels, Step& losses);
  void add_attention(const TrainingRows::Batch& batch, double labels, Step& losses);
  std::string this_step() const;  // for messages
  std::string first_broken(const std::vector<TrainingRows::Batch>& batches) const;
  double learning_rate() const;  // of the next step
  void collect_gradients();
  void write_weights();
  // The name of a master whose gradient is not finite, else its norm.
  std::pair<std::string, double> gradient_norm() const;

  LlamaForCausalLM& model_;
  FinetuneConfig config_;
  TrainerSteps steps_;
  const LlamaForCausalLM* teacher_;
  int64_t done_ = 0;
  int64_t skipped_ = 0;
  LossScale scale_;
  OutputCurvature curvature_;  // of the teacher; collected in the first steps on attention
  std::vector<Tuned> tuned_;
  std::vector<LowRank> low_rank_;
  std::vector<std::pair<std::string, at::Tensor>> masters_;  // all that AdamW works on, by name
  // Of AdamW.
  struct Moments {
    at::Tensor mean, square;
    int64_t steps = 0;
  };
  std::map<std::string, Moments> moments_;  // of the masters that had a gradient
};

}  // namespace hla
