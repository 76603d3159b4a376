#include "hla/factorize/convert.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "hla/core/data_dir.h"
#include "hla/core/error.h"
#include "hla/core/memory.h"
#include "hla/factorize/estimate.h"
#include "hla/model/device.h"
#include "options.h"

namespace hla::tools {
namespace {

struct ConvertArguments {
  std::string model;
  std::string out;
  std::string rope = "original";
  std::vector<std::string> calib;
  bool no_calib = false;
  bool refit_output = false;
  bool no_refit_output = false;
  std::string objective = to_string(FactorOptions{}.objective);
  std::string key_weighting = to_string(FactorOptions{}.key_weighting);
  std::string value_weighting = to_string(FactorOptions{}.value_weighting);
  std::string plan;
  std::string target_ppl_increase;
  std::string valid;
  std::string json;
  std::string plot;
  bool dry_run = false;
  bool verbose = false;
  ConvertOptions options;
  DeviceOptions device;
};

// "5%" or "0.05".
double parse_share(const char* option, const std::string& text) {
  const bool percent = text.ends_with('%');
  const std::string number = text.substr(0, text.size() - (percent ? 1 : 0));
  char* end = nullptr;
  const double value = std::strtod(number.c_str(), &end);
  if (number.empty() || *end != 0) {
    throw_usage(std::string("[") + option + "] expected a share like 5% or 0.05, got " + text);
  }
  if (!percent && value >= 1) {
    throw_usage(std::string("[") + option + "] expected a share like 5% or 0.05, got " + text +
                ", which is " + std::to_string(std::llround(100 * std::min(value, 1e9))) +
                " %; did you mean " + text + "%?");
  }
  return percent ? value / 100 : value;
}

// A longer table is left to the report, unless --verbose asks for it.
constexpr size_t kShownLayers = 40;

void print(const ConvertArguments& arguments, const ConvertReport& report) {
  const int64_t base = report.base.base_cache_bytes_per_token(report.element_size);
  const int64_t made = report.hla.cache_bytes_per_token(report.element_size);
  const auto layers = static_cast<double>(report.layers.size());
  double key_error = 0;
  double value_error = 0;
  double attention_error = 0;
  for (const LayerReport& layer : report.layers) {
    key_error += layer.key_error / layers;
    value_error += layer.value_error / layers;
    attention_error += layer.attention_output_error.value_or(0) / layers;
  }
  if (arguments.verbose || report.layers.size() <= kShownLayers) {
    std::printf("%s\n", report.layer_table().c_str());
  }
  std::printf("converted      %s -> %s\n", arguments.model.c_str(), arguments.out.c_str());
  std::printf("rope           %s\n", arguments.rope.c_str());
  std::printf("calibration    %s, %lld tokens\n", report.calib_text().c_str(),
              static_cast<long long>(report.calib_tokens));
  std::printf("cache          %lld bytes per token, base %lld (%.1f %%)\n",
              static_cast<long long>(made), static_cast<long long>(base),
              100.0 * static_cast<double>(made) / static_cast<double>(base));
  std::printf("parameters     %lld, base %lld\n", static_cast<long long>(report.hla_parameters),
              static_cast<long long>(report.base_parameters));
  std::printf("mean error     keys %.1f %%, values %.1f %%", 100 * key_error, 100 * value_error);
  if (report.calib_tokens > 0) std::printf(", attention output %.1f %%", 100 * attention_error);
  std::printf(" (by layer: %s/hla_report.json)\n", arguments.out.c_str());
  if (report.budget) {
    const BudgetReport& budget = *report.budget;
    std::printf(
        "held out       %lld tokens, perplexity of the base %.3f, at most %+.2f %% asked for; at",
        static_cast<long long>(budget.held_out_tokens), budget.base_perplexity,
        100 * arguments.options.target_ppl_increase.value_or(0));
    const auto all =
        static_cast<double>(report.base.base_cache_floats() * report.base.num_hidden_layers);
    for (const BudgetReport::Trial& trial : budget.trials) {
      std::printf("%s %.1f %% of the cache %+.2f %%", &trial == budget.trials.data() ? "" : ",",
                  100 * static_cast<double>(trial.floats) / all,
                  100 * (trial.perplexity / budget.base_perplexity - 1));
    }
    std::printf("\n");
  }
  if (report.base_perplexity) {
    std::printf("perplexity     %.3f, base %.3f, on %lld tokens of calibration\n",
                report.layers.back().calibration_perplexity.value_or(0), *report.base_perplexity,
                static_cast<long long>(report.perplexity_tokens));
  }
  std::printf("memory         %s at the peak\n", format_bytes(report.peak_rss_bytes).c_str());
  std::printf("time           %.1f s\n", report.seconds);
}

void run_dry(const ConvertArguments& arguments, const Checkpoint& checkpoint) {
  const ConversionEstimate estimate =
      estimate_conversion(checkpoint, arguments.out, arguments.options);
  if (arguments.json != "-") std::fputs(estimate.to_text().c_str(), stdout);
  if (!arguments.json.empty()) {
    write_json_result(arguments.json, estimate.to_json(), arguments.options.force);
  }
}

// Options that were given and that others leave without a meaning.
void refuse_without_effect(const ConvertArguments& arguments, const CLI::App& command) {
  const auto refuse = [&](const char* reason, const std::vector<std::string>& options) {
    for (const std::string& option : options) {
      if (command.count(option) > 0) throw_usage("[" + option + "] has no effect with " + reason);
    }
  };
  const std::vector<std::string> of_weighting = {"--key-weighting", "--value-weighting",
                                                 "--value-weight"};
  if (arguments.dry_run) refuse("--dry-run", {"--restart"});
  const bool loss = arguments.objective == to_string(Objective::kLoss);
  if (!loss) refuse("--objective attention", {"--low-memory"});
  if (arguments.no_calib) {
    if (loss) refuse("--no-calib", {"--objective"});
    refuse("--no-calib", {"--calib-tokens", "--calib-length", "--low-memory", "--no-refit-output"});
  }
  if (arguments.rope == to_string(HlaRope::kPaper)) {
    refuse("--rope paper", of_weighting);
    if (loss) refuse("--rope paper", {"--objective"});
    refuse("--rope paper", {"--calib", "--calib-tokens", "--calib-length", "--low-memory"});
    if (!arguments.plan.empty()) refuse("--plan, which has it", {"--rotary-fraction"});
  } else {
    refuse("another --rope than paper", {"--rotary-fraction"});
  }
}

// Of the cache, to be shared out over the layers.
constexpr double kDefaultRatio = 0.5;

bool has_size(const ConvertOptions& options) {
  return options.kv_ratio || options.k_rank || options.v_rank || options.fast_floats ||
         options.plan || options.target_ratio || options.target_bytes ||
         options.target_ppl_increase;
}

void run_convert(ConvertArguments& arguments) {
  ConvertOptions& options = arguments.options;
  const auto rope = hla_rope_from_string(arguments.rope);
  if (!rope) throw_usage("[--rope] expected original, latent or paper, got " + arguments.rope);
  options.rope = *rope;
  const auto objective = objective_from_string(arguments.objective);
  const auto key_weighting = key_weighting_from_string(arguments.key_weighting);
  const auto value_weighting = value_weighting_from_string(arguments.value_weighting);
  if (!objective)
    throw_usage("[--objective] expected loss or attention, got " + arguments.objective);
  if (!key_weighting)
    throw_usage("[--key-weighting] expected plain, input, query or fisher, got " +
                arguments.key_weighting);
  if (!value_weighting)
    throw_usage("[--value-weighting] expected plain, input, output or averaged, got " +
                arguments.value_weighting);
  if (!(options.factors.value_weight >= 1e-6 && options.factors.value_weight <= 1e6)) {
    throw_usage("[--value-weight] expected a number from 1e-6 to 1e6, got " +
                std::to_string(options.factors.value_weight));
  }
  options.factors.objective = *objective;
  options.factors.key_weighting = *key_weighting;
  options.factors.value_weighting = *value_weighting;
  if (arguments.no_calib && !arguments.calib.empty()) {
    throw_usage("--calib and --no-calib exclude each other");
  }
  if (!arguments.no_calib && options.rope != HlaRope::kPaper) {
    options.calib.assign(arguments.calib.begin(), arguments.calib.end());
    if (options.calib.empty()) {
      options.calib = {data_file("wikitext-2/wiki.valid.txt"),
                       data_file("calibration/wikipedia.txt"),
                       data_file("calibration/smollm2_samples.txt")};
    }
  }
  if (arguments.refit_output || arguments.no_refit_output) {
    options.refit_output = arguments.refit_output;
  }
  if (arguments.refit_output && !options.calibrated()) {
    throw_usage("--refit-output needs calibration");
  }
  if (!arguments.target_ppl_increase.empty()) {
    options.target_ppl_increase =
        parse_share("--target-ppl-increase", arguments.target_ppl_increase);
  }
  if (!arguments.valid.empty()) options.valid = arguments.valid;
  if (!arguments.plan.empty()) options.plan = arguments.plan;
  if (!has_size(options) && options.objective() == Objective::kLoss) {
    options.target_ratio = kDefaultRatio;
  }
  std::vector<std::string> inputs = {arguments.model};
  for (const std::filesystem::path& input : options.inputs()) inputs.push_back(input.string());
  check_output_targets({{"--json", arguments.json}, {"--plot", arguments.plot}}, options.force,
                       inputs, arguments.out);
  if (arguments.dry_run && !arguments.plot.empty()) {
    throw_usage("--plot and --dry-run exclude each other: nothing is converted");
  }
  if (options.report_perplexity && !options.calibrated()) {
    throw_usage("--report-perplexity needs calibration");
  }
  const LoadOptions load = resolve(arguments.device);
  options.device = load.device;
  options.dtype = load.dtype;
  const Checkpoint checkpoint = Checkpoint::open(arguments.model);
  if (arguments.dry_run) return run_dry(arguments, checkpoint);
  const ConvertReport report = convert(checkpoint, arguments.out, options);
  if (arguments.json != "-") print(arguments, report);
  if (!arguments.json.empty()) {
    write_json_result(arguments.json, report.to_json(options, /*measured=*/true), options.force);
  }
  if (!arguments.plot.empty()) write_svg_panels(arguments.plot, report.to_plot(), options.force);
}

}  // namespace

void add_convert(CLI::App& app) {
  auto arguments = std::make_shared<ConvertArguments>();
  ConvertOptions& options = arguments->options;
  CLI::App* command = app.add_subcommand("convert", "Converts a Llama checkpoint to HLA");
  command
      ->add_option("MODEL", arguments->model,
                   "Model folder, HF id in the local cache, or "
                   "llama2.c file")
      ->required();
  command->add_option("OUT", arguments->out, "Folder to make")->required();
  command
      ->add_option(
          "--rope", arguments->rope,
          "original: one unrotated latent, the best perplexity; latent: fast frequencies as "
          "rotated latents of their own; paper: the method of sodabreak/MHA2HLA, from the weights "
          "alone")
      ->capture_default_str();
  command->add_option(
      "--kv-ratio", options.kv_ratio,
      "Cached floats relative to the base, K and V on one basis (paper: on one each), the same for "
      "every layer (default with --no-calib, --objective attention or paper: 0.5)");
  command->add_option("--target-ratio", options.target_ratio,
                      "The same, but shared out over the layers by the loss that their ranks cost, "
                      "where the objective is loss (then the default: 0.5)");
  command
      ->add_option("--target-bytes-per-token", options.target_bytes,
                   "The same for at most so many cached bytes per token of all layers")
      ->check(at_least(1));
  command->add_option("--target-ppl-increase", arguments->target_ppl_increase,
                      "The least cache with which the perplexity of held-out text rises by no more "
                      "than this, like 5%");
  command->add_option("--valid", arguments->valid,
                      "That held-out text; default: the last tenth of every calibration text, then "
                      "not used for calibration");
  command->add_option("--k-rank", options.k_rank,
                      "Cached floats of the keys on a basis of their own; values stay whole "
                      "without --v-rank");
  command->add_option("--v-rank", options.v_rank,
                      "Cached floats of the values on a basis of their own; keys stay whole "
                      "without --k-rank");
  command->add_option("--q-rank", options.q_rank,
                      "Factorise the queries, too, to this rank (paper: by default to half)");
  command->add_option("--fast-frequencies", options.fast_frequencies,
                      "With a ratio or a target: this many fast frequencies get a latent of their "
                      "own (default: none; of latent, those that turn by at least 0.3 per token)");
  command->add_option("--fast-floats", options.fast_floats,
                      "The size of that latent, with --kv-ratio or its default");
  command
      ->add_option("--rotary-fraction", options.rotary_fraction,
                   "paper: share of the latent pairs that turn")
      ->capture_default_str();
  command
      ->add_option("--calib", arguments->calib,
                   "Calibration text (plain, .jsonl or .parquet with a field \"text\", a folder "
                   "of them, or a dataset like wikitext-2:train); may be given several times, for "
                   "equal shares; default: the WikiText-2 validation split, Wikipedia, and text "
                   "sampled from SmolLM2")
      ->allow_extra_args(false)  // MODEL and OUT may come after it
      ->take_all();
  command->add_option("--calib-tokens", options.calib_tokens, "Tokens of all texts together")
      ->check(at_least(1))
      ->capture_default_str();
  command
      ->add_option("--calib-length", options.calib_length,
                   "Tokens per calibration sequence; default: 1024, or the model's positions where "
                   "those are fewer")
      ->check(CLI::Range(2, 1 << 20));
  command->add_flag("--no-calib", arguments->no_calib, "Use the weights alone");
  CLI::Option* objective =
      command
          ->add_option("--objective", arguments->objective,
                       "What the factors keep small: loss (needs calibration text) or attention, "
                       "which the three options below shape and imply")
          ->capture_default_str();
  const std::vector<CLI::Option*> of_attention = {
      command
          ->add_option("--key-weighting", arguments->key_weighting, "plain, input, query or fisher")
          ->capture_default_str(),
      command
          ->add_option("--value-weighting", arguments->value_weighting,
                       "plain, input, output or averaged")
          ->capture_default_str(),
      command
          ->add_option("--value-weight", options.factors.value_weight,
                       "Weight of the values against the keys in a joint basis, 1e-6 to 1e6")
          ->capture_default_str()};
  CLI::Option* refit =
      command->add_flag("--refit-output", arguments->refit_output,
                        "Fit W_o to what is left of keys and values (default with --objective "
                        "loss)");
  command->add_flag("--no-refit-output", arguments->no_refit_output, "Keep W_o")->excludes(refit);
  command->add_option(
      "--plan", arguments->plan,
      "Sizes of every layer, as --dry-run --json writes them, instead of the above");
  command->add_flag("--dry-run", arguments->dry_run,
                    "Only say what would be made: plan, cache, disk, memory and time; before ranks "
                    "are measured, where they are");
  add_report_option(*command, "--json", arguments->json,
                    "Write the report to FILE as JSON; - for stdout");
  command->add_option("--plot", arguments->plot,
                      "Write errors and ranks by layer, of latent also by frequency, to FILE as "
                      "SVG");
  command->add_flag("--report-perplexity", options.report_perplexity,
                    "Also report the perplexity of 4 calibration sequences after each layer; every "
                    "layer costs a forward of all that follow it");
  add_max_shard_size_option(*command, options.max_shard_bytes);
  command->add_flag("--low-memory", options.low_memory,
                    "Read the loss a layer at a time, as is done anyway where memory is short: a "
                    "forward more, and more disk while it runs");
  command->add_flag("--restart", options.restart,
                    "Start over where an unfinished conversion to OUT lies, instead of going on");
  command->add_flag("--force", options.force, "Replace an existing OUT (or --json or --plot file)");
  add_device_options(*command, arguments->device, "the checkpoint's own");
  command->footer(
      "--dtype is the type of the written weights (auto: the checkpoint's own); the factorisation\n"
      "itself is always done in fp64.\n\n"
      "A conversion that was killed or interrupted goes on with the first unfinished layer when "
      "the\n"
      "same command is given again; until it is complete it lies in .OUT.hla-partial. Another\n"
      "conversion to the same OUT begins anew.\n\n"
      "Examples:\n"
      "  hla convert models/SmolLM2-135M-Instruct models/original-50 --target-ratio 0.5\n"
      "  hla convert models/SmolLM2-135M-Instruct models/latent-50 --rope latent --target-ratio "
      "0.5\n"
      "  hla convert models/SmolLM2-135M-Instruct models/uniform --kv-ratio 0.5\n"
      "  hla convert models/SmolLM2-135M-Instruct models/close --target-ppl-increase 5%\n"
      "  hla convert models/SmolLM2-135M-Instruct models/out --dry-run\n"
      "  hla convert org/name out --k-rank 96 --v-rank 128 --calib my.txt --calib-tokens 32768");
  command->callback([arguments, objective, of_attention, command, &app] {
    for (const CLI::Option* option : of_attention) {
      if (option->count() == 0) continue;
      if (objective->count() > 0 && arguments->objective != to_string(Objective::kAttention)) {
        throw_usage("[" + option->get_name() + "] only with --objective attention");
      }
      arguments->objective = to_string(Objective::kAttention);
    }
    refuse_without_effect(*arguments, *command);
    arguments->verbose = app.count("--verbose") > 0;
    run_convert(*arguments);
  });
}

}  // namespace hla::tools
