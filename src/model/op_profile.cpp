#include "hla/model/op_profile.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "hla/core/error.h"
#include "hla/core/stopwatch.h"

namespace hla {
namespace {

std::string kind_of(const std::string& name) {
  static const std::map<std::string, std::string> kinds = {
      {"aten::mm", "matrix products"},
      {"aten::addmm", "matrix products"},
      {"aten::bmm", "matrix products"},
      {"aten::_scaled_dot_product_flash_attention_for_cpu", "attention"},
      {"aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"},
      {"aten::_scaled_dot_product_attention_math", "attention"},
      {"hla::attention", "attention"},
      {"hla::attention_backward", "attention"},
      {"hla::log_sum_exp", "log-sum-exp"},
      {"hla::divergence", "log-sum-exp"},
      {"hla::rms_norm", "norms"},
      {"hla::rms_norm_backward", "norms"},
      {"hla::rope", "rope"},
      {"hla::silu_mul", "activation"},
      {"hla::silu_mul_backward", "activation"},
      {"hla::sampled_loss_gradient", "log-sum-exp"},
      {"aten::add_", "residual sums"},
      {"aten::copy_", "copies"},
      {"aten::cat", "copies"},
      {"aten::_local_scalar_dense", "other"},
  };
  const auto found = kinds.find(name);
  return found == kinds.end() ? "other" : found->second;
}

// 2·M·N·K of the operands of a matrix product, or 0.
double product_flops(const at::RecordFunction& function) {
  const std::string name = function.name();
  const size_t first = name == "aten::addmm" ? 1 : 0;
  const auto inputs = function.inputs();
  if (kind_of(name) != "matrix products" || inputs.size() < first + 2) return 0;
  if (!inputs[first].isTensor() || !inputs[first + 1].isTensor()) return 0;
  const at::Tensor& a = inputs[first].toTensor();
  return 2.0 * static_cast<double>(a.numel()) *
         static_cast<double>(inputs[first + 1].toTensor().size(-1));
}

}  // namespace

struct OpProfile::State {
  struct Frame : at::ObserverContext {
    Clock::time_point start;
    double inner = 0;  // seconds of the operations inside
    double flops = 0;
    Frame* outer = nullptr;
  };

  // RecordFunction's callbacks carry no state.
  static thread_local State* active;

  static std::unique_ptr<at::ObserverContext> on_start(const at::RecordFunction& function) {
    auto frame = std::make_unique<Frame>();
    frame->flops = product_flops(function);
    frame->outer = active->top;
    active->top = frame.get();
    frame->start = Clock::now();
    return frame;
  }

  static void on_end(const at::RecordFunction& function, at::ObserverContext* context) {
    auto* frame = static_cast<Frame*>(context);
    const double whole = seconds_since(frame->start);
    active->top = frame->outer;
    if (frame->outer != nullptr) frame->outer->inner += whole;
    const std::string kind = kind_of(function.name());
    Entry& entry = active->entries[kind];
    entry.kind = kind;
    ++entry.calls;
    entry.seconds += whole - frame->inner;
    entry.flops += frame->flops;
  }

  Frame* top = nullptr;
  std::map<std::string, Entry> entries;
  at::CallbackHandle handle = 0;
};

thread_local OpProfile::State* OpProfile::State::active = nullptr;

OpProfile::OpProfile() : state_(std::make_unique<State>()) {
  if (State::active != nullptr) throw_runtime("OpProfile: one at a time in a thread");
  State::active = state_.get();
  state_->handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback(&State::on_start, &State::on_end)
                                     .needsInputs(true)
                                     .scopes({at::RecordScope::FUNCTION}));
}

OpProfile::~OpProfile() {
  at::removeCallback(state_->handle);
  State::active = nullptr;
}

std::vector<OpProfile::Entry> OpProfile::entries() const {
  std::vector<Entry> result;
  for (const auto& [kind, entry] : state_->entries) result.push_back(entry);
  std::sort(result.begin(), result.end(),
            [](const Entry& a, const Entry& b) { return a.seconds > b.seconds; });
  return result;
}

double measure_gemm_peak(int repeats) {
  const c10::InferenceMode no_gradients;
  constexpr int64_t kSize = 2048;
  const at::Tensor a = at::rand({kSize, kSize}, at::kFloat);
  const at::Tensor b = at::rand({kSize, kSize}, at::kFloat);
  at::Tensor c = at::empty({kSize, kSize}, at::kFloat);
  double best = 0;
  for (int i = 0; i <= repeats; ++i) {
    const auto start = Clock::now();
    at::mm_out(c, a, b);
    const double rate = 2.0 * kSize * kSize * kSize / seconds_since(start);
    if (i > 0) best = std::max(best, rate);  // the first warms up
  }
  return best;
}

}  // namespace hla
