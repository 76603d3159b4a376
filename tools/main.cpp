// hla: parses the command line, runs one subcommand and turns errors into exit codes.
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <malloc.h>
#include <torch/version.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <iostream>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "commands.h"
#include "hla/core/cpu_features.h"
#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/join.h"
#include "hla/core/log.h"
#include "hla/core/nearest.h"
#include "hla/core/version.h"
#include "hla/model/device.h"
#include "hla/model/onednn_products.h"
#include "options.h"

namespace {

using hla::ExitCode;

std::string version_text() {
  std::string text = std::string("hla ") + hla::version() + " (commit " + hla::version_commit() +
                     ", " + hla::version_build_type() + ")\nlibtorch " + TORCH_VERSION + ", CUDA: ";
  if (!hla::has_cuda_library()) return text + "not in this LibTorch";
  const int count = hla::cuda_device_count();
  return text + "in this LibTorch, " + std::to_string(count) + " usable device" +
         (count == 1 ? "" : "s");
}

int report(ExitCode code, const std::string& message) {
  hla::log_error(message);
  return static_cast<int>(code);
}

// What a script makes of a variable that is not set must not count as if the option were not there.
void refuse_empty_values(const CLI::App& app) {
  for (const CLI::App* command : app.get_subcommands()) {
    for (const CLI::Option* option : command->get_options()) {
      const std::string name = option->get_name();
      if (name == "--prompt" || name == "--system") continue;
      if (option->get_items_expected_min() == 0) continue;  // may be given without
      const std::vector<std::string>& values = option->results();
      if (std::find(values.begin(), values.end(), "") != values.end()) {
        throw CLI::ValidationError(name, "expected a value, got an empty one");
      }
    }
  }
}

std::string did_you_mean(const std::string& name, const std::vector<std::string>& names) {
  const std::string nearest = hla::nearest_name(name, names);
  return nearest.empty() ? "" : "; did you mean " + nearest + "?";
}

// What CLI11 has no word of: which command there is not, or what an unknown option was to be.
void refuse_unknown_names(CLI::App& app, const std::vector<std::string>& arguments) {
  const std::vector<CLI::App*> given = app.get_subcommands();
  if (given.empty()) {
    std::vector<std::string> commands;
    for (const CLI::App* command : app.get_subcommands({})) commands.push_back(command->get_name());
    for (const std::string& argument : arguments) {
      if (argument.starts_with('-')) continue;
      const std::string meant = did_you_mean(argument, commands);
      hla::throw_usage("unknown command " + argument +
                       (meant.empty() ? "; there are: " + hla::join(commands, ", ") : meant));
    }
    return;
  }
  std::vector<std::string> options;
  for (const CLI::App* of : {given.front(), &app}) {
    for (const CLI::Option* option : of->get_options()) {
      for (const std::string& name : option->get_lnames()) options.push_back("--" + name);
    }
  }
  for (const std::string& argument : arguments) {
    const std::string name = argument.substr(0, argument.find('='));
    if (!name.starts_with("--") || name == "--") continue;
    if (std::find(options.begin(), options.end(), name) != options.end()) continue;
    const std::string meant = did_you_mean(name, options);
    if (!meant.empty()) hla::throw_usage("unknown option " + name + meant);
  }
}

int run(int argc, char** argv) {
  CLI::App app{"Converts Llama checkpoints to HLA, low-rank latent attention, and measures them."};
  app.name("hla");
  app.set_version_flag("--version", version_text);
  app.require_subcommand(1);
  app.fallthrough();
  bool verbose = false;
  bool quiet = false;
  CLI::Option* more = app.add_flag("-v,--verbose", verbose, "More messages on stderr");
  app.add_flag("-q,--quiet", quiet, "Only warnings and errors on stderr")->excludes(more);
  app.parse_complete_callback([&] {
    refuse_empty_values(app);
    hla::init_logging(verbose ? hla::LogLevel::kVerbose
                      : quiet ? hla::LogLevel::kQuiet
                              : hla::LogLevel::kNormal);
  });
  hla::tools::add_info(app);
  hla::tools::add_ppl(app);
  hla::tools::add_convert(app);
  hla::tools::add_finetune(app);
  hla::tools::add_transfer(app);
  hla::tools::add_generate(app);
  hla::tools::add_bench(app);
  hla::tools::add_tokenize(app);
  for (CLI::App* command : app.get_subcommands({})) hla::tools::take_decimal_integers(*command);
  app.footer(
      "Exit codes: 0 ok, 1 runtime, 2 usage, 3 bad input, 4 out of memory, 5 non-finite numbers,\n"
      "130 and 143 interrupted.\n\n"
      "Examples:\n"
      "  hla info models/SmolLM2-135M-Instruct\n"
      "  hla convert models/SmolLM2-135M-Instruct models/original-50 --target-ratio 0.5\n"
      "  hla ppl models/original-50 --windows 0,73,147");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0) refuse_unknown_names(app, {argv + 1, argv + argc});
    const int code = app.exit(error, std::cout, std::cerr);
    return code == 0 ? 0 : static_cast<int>(ExitCode::kUsage);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // A file that is opened in the place of a closed stderr would get what is logged. What stdout is
  // to get fails as before.
  for (const auto& [fd, mode] :
       {std::pair(STDIN_FILENO, O_WRONLY), {STDOUT_FILENO, O_RDONLY}, {STDERR_FILENO, O_WRONLY}}) {
    if (::fcntl(fd, F_GETFD) < 0 && ::open("/dev/null", mode) != fd) return 1;
  }
  hla::install_interrupt_handlers();
  // A forward pass frees and allocates large tensors all the time: kept in the heap, their pages
  // need not be given back and zeroed by the kernel again.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that glibc takes
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit then shows as a write error
  std::signal(SIGPIPE, SIG_IGN);
  std::optional<hla::OnednnProducts> products;
  int code = 0;
  try {
    if (hla::is_wide_amd()) products.emplace();
    code = run(argc, argv);
  } catch (const hla::Error& error) {
    code = report(error.code(), error.what());
  } catch (const c10::Error& error) {
    code = report(hla::exit_code_of(error), error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    code = report(ExitCode::kOutOfMemory, "out of memory");
  } catch (const std::exception& error) {
    code = report(ExitCode::kRuntime, error.what());
  }
  std::cout.flush();
  if (!std::cout && code == 0) code = report(ExitCode::kRuntime, "stdout: write failed");
  return code;
}
