#include "hla/eval/bench.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <exception>
#include <filesystem>
#include <thread>

#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/log.h"
#include "hla/core/memory.h"
#include "hla/core/progress.h"
#include "hla/core/stopwatch.h"
#include "hla/core/text_table.h"
#include "hla/core/version.h"
#include "hla/model/device.h"
#include "hla/model/llama.h"

namespace hla {
namespace {

// Caches are filled by prompts of so many tokens, which bounds the activations.
constexpr int64_t kFillTokens = 512;

// Steps of decoding before it is another model's turn: some 0.1 to 1 s, short beside what
// neighbours on the machine come and go by, long beside what a change of process costs.
constexpr int64_t kTurnSteps = 8;
// Between turns. An OpenMP thread without work spins for some milliseconds before it sleeps, and
// would do so on a core that the next model wants.
constexpr auto kPause = std::chrono::milliseconds(10);

struct Command {
  enum Kind : int64_t { kOpen, kDepth, kPrompt, kDecode, kBandwidth } kind;
  int64_t tokens, depth, batch;
  int64_t done = 0;  // of the tokens, by the turns before
};

// Tokens of a command that are done after its turn; a prompt has one.
int64_t end_of_turn(const Command& command) {
  if (command.kind != Command::kDecode) return command.tokens;
  return std::min(command.done + kTurnSteps, command.tokens);
}

struct Reply {
  int64_t error = 0;  // exit code; then `text_size` bytes follow
  uint64_t text_size = 0;
  double seconds = 0;  // kBandwidth: bytes/s
  uint64_t weight_bytes = 0, cache_bytes = 0, cached_bytes = 0, rss_bytes = 0, peak_rss_bytes = 0;
  double decode_products = 0, rebuild_products = 0;  // AttendCosts
  int64_t rebuilds_from = 0, prompt_rebuilds_from = 0;
  uint64_t needed_bytes = 0;  // kOpen: of the CPU's memory, for all caches
  int64_t threads = 0;
  char device[64] = {};
};

bool read_all(int file, void* data, size_t size) {
  auto* to = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t count = ::read(file, to, size);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    to += count;
    size -= static_cast<size_t>(count);
  }
  return true;
}

bool write_all(int file, const void* data, size_t size) {
  const auto* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t count = ::send(file, from, size, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    from += count;
    size -= static_cast<size_t>(count);
  }
  return true;
}

// Bytes per second that all threads together read from memory: sums over more than any cache
// holds.
constexpr int64_t kBandwidthRows = 12288;
constexpr int64_t kBandwidthColumns = 8192;
constexpr uint64_t kBandwidthBytes = kBandwidthRows * kBandwidthColumns * sizeof(float);

double read_bandwidth(const at::Device& device) {
  const c10::InferenceMode no_gradients;
  static const at::Tensor data = at::ones({kBandwidthRows, kBandwidthColumns}, device);
  static const at::Tensor ones = at::ones({1, kBandwidthColumns}, device);
  const auto read = [&] {
    at::Tensor sums = device.is_cpu() ? few_rows_linear(ones, data, {}) : data.sum(1);
    synchronize(device);
    return sums;
  };
  if (!device.is_cpu()) read();  // a GPU's first run also loads what it runs
  const auto start = Clock::now();
  const at::Tensor sums = read();
  const double seconds = seconds_since(start);
  // They are looked at, so that they are made.
  if (sums.sum().item<double>() != static_cast<double>(data.numel())) {
    throw_runtime("[bench] memory gave back other numbers than were written");
  }
  return static_cast<double>(data.numel()) * 4 / seconds;
}

// What runs in a model's process.
class Worker {
 public:
  Worker(const std::string& path, const BenchOptions& options)
      : options_(options),
        checkpoint_(Checkpoint::open(path)),
        model_(load_model(checkpoint_, options.load())) {
    const int64_t longest = longest_sequence();
    if (longest > model_->config().max_position_embeddings) {
      log_info(path + " was made for " + std::to_string(model_->config().max_position_embeddings) +
               " tokens (max_position_embeddings); times do not depend on that");
    }
    // Of an embedding that is not the output matrix, too, a step reads a row only.
    const ModelConfig& config = model_->config();
    int64_t elements = model_->parameter_count();
    if (!config.tie_word_embeddings) elements -= config.vocab_size * config.hidden_size;
    weight_bytes_ = static_cast<uint64_t>(elements) * c10::elementSize(model_->dtype());
  }

  Reply run(const Command& command) {
    Reply reply;
    reply.threads = at::get_num_threads();
    const std::string device = model_->device().str() + ", " + dtype_label(model_->dtype());
    device.copy(reply.device, sizeof reply.device - 1);
    switch (command.kind) {
      case Command::kBandwidth:
        return reply;
      case Command::kOpen:
        reply.needed_bytes = cache_bytes();
        return reply;
      case Command::kDepth:
        if (!decoder_) open_decoder();
        fill(command.depth);
        release_free_memory();  // as `hla generate` does after a prompt
        // Whatever a first run has to do is done before anything is timed.
        // A GPU loads what it runs, and takes memory, for each number of rows.
        if (command.tokens > 0) {
          read_prompt(is_on_gpu() ? command.tokens : std::min(command.tokens, kFillTokens));
        }
        truncate(command.depth);
        reserve(1, 1);
        decode(1, 1);
        truncate(command.depth);
        add_costs(reply, command.depth);
        return reply;
      case Command::kPrompt:
        hold(1);
        reply.seconds = read_prompt(command.tokens);
        break;
      case Command::kDecode:
        if (command.done == 0) {
          hold(command.batch);
          if (is_on_gpu()) {
            decode(1, command.batch);
            truncate(command.depth);
          }
          reserve(command.tokens, command.batch);  // for all turns
        }
        reply.seconds = decode(end_of_turn(command) - command.done, command.batch);
        break;
    }
    const int64_t batch = command.kind == Command::kDecode ? command.batch : 1;
    for (int64_t i = 0; i < batch; ++i) {
      reply.cache_bytes += caches_[static_cast<size_t>(i)].bytes();
    }
    reply.cached_bytes =
        static_cast<uint64_t>(batch * command.depth *
                              model_->config().cache_bytes_per_token(
                                  static_cast<int64_t>(c10::elementSize(decoder_->cache_dtype()))));
    reply.weight_bytes = weight_bytes_;
    reply.rss_bytes = memory_bytes(model_->device());
    reply.peak_rss_bytes = peak_memory_bytes(model_->device());
    if (end_of_turn(command) == command.tokens) truncate(command.depth);
    return reply;
  }

 private:
  bool is_on_gpu() const { return !model_->device().is_cpu(); }

  int64_t longest_sequence() const {
    return *std::max_element(options_.depths.begin(), options_.depths.end()) +
           std::max({options_.prompt_tokens, options_.generated_tokens, int64_t{1}});
  }

  // Of the CPU's memory, at the most.
  uint64_t cache_bytes() const {
    if (is_on_gpu()) return 0;
    const int64_t batch = *std::max_element(options_.batches.begin(), options_.batches.end());
    const at::ScalarType dtype = options_.decoder.cache_dtype.value_or(model_->dtype());
    const uint64_t one = sequence_cache_bytes(model_->config(), dtype, longest_sequence());
    uint64_t all = 0;
    constexpr uint64_t kMost = uint64_t{1} << 56;  // more than there is, but sums are numbers
    const bool is_more = __builtin_mul_overflow(one, static_cast<uint64_t>(batch), &all);
    return is_more ? kMost : std::min(all, kMost);
  }

  void open_decoder() {
    // What the model makes of positions that it was not trained on does not matter here, nor what
    // dynamic RoPE and longrope make of so long a sequence.
    DecoderOptions options = options_.decoder;
    options.max_length = longest_sequence();
    decoder_.emplace(*model_, options);
  }

  // Ids without meaning, the same for all models.
  int32_t next_id() {
    state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<int32_t>((state_ >> 33) %
                                static_cast<uint64_t>(model_->config().vocab_size));
  }
  std::vector<int32_t> ids(int64_t count) {
    std::vector<int32_t> result;
    for (int64_t i = 0; i < count; ++i) result.push_back(next_id());
    return result;
  }

  void fill(int64_t depth) {
    caches_.resize(std::min<size_t>(caches_.size(), 1), decoder_->new_sequence());
    if (caches_.empty() || caches_[0].length() > depth) {
      caches_.assign(1, decoder_->new_sequence());
    }
    while (caches_[0].length() < depth) {
      throw_if_interrupted();
      decoder_->read({{&caches_[0], ids(std::min(kFillTokens, depth - caches_[0].length()))}});
    }
  }

  void add_costs(Reply& reply, int64_t depth) const {
    const int64_t layers = model_->config().num_hidden_layers;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const DecodeAttention& attention = decoder_->attention(layer);
      reply.decode_products += attention.decode_cost() / static_cast<double>(layers);
      reply.rebuild_products += attention.rebuild_cost() / static_cast<double>(layers);
    }
    const auto rebuilds_from = [&](int64_t before) -> int64_t {
      constexpr int64_t kMost = 1024;
      for (int64_t count = 1; count <= kMost; ++count) {
        int64_t rebuild = 0;
        for (int64_t layer = 0; layer < layers; ++layer) {
          rebuild += decoder_->decodes(layer, count, before) ? 0 : 1;
        }
        if (2 * rebuild > layers) return count;
      }
      return 0;
    };
    reply.rebuilds_from = rebuilds_from(std::max<int64_t>(depth, 1));
    reply.prompt_rebuilds_from = rebuilds_from(0);
  }

  // So many sequences are in memory, and nothing of the tests before.
  void hold(int64_t batch) {
    const auto wanted = static_cast<size_t>(batch);
    caches_.resize(std::min(caches_.size(), wanted), decoder_->new_sequence());
    while (caches_.size() < wanted) {
      throw_if_interrupted();
      caches_.push_back(caches_[0].clone());
    }
    release_free_memory();
    synchronize(model_->device());  // copies are not to be timed
    reset_peak_memory(model_->device());
  }

  // Room in the first sequences' caches, so that none need be made while a test is timed.
  void reserve(int64_t tokens, int64_t batch) {
    for (int64_t i = 0; i < batch; ++i) {
      SequenceCache& cache = caches_[static_cast<size_t>(i)];
      cache.reserve(cache.length() + tokens);
    }
    synchronize(model_->device());
  }

  // For a GPU, too. What a broken model takes is nobody's measure.
  void wait_for(const at::Tensor& logits) const {
    if (std::isfinite(logits.sum(at::kFloat).item<float>())) return;
    throw Error(ExitCode::kNonFinite, checkpoint_.path().string() + ": logits: NaN or Inf");
  }

  double read_prompt(int64_t tokens) {
    const std::vector<int32_t> prompt = ids(tokens);
    reserve(tokens, 1);
    const auto start = Clock::now();
    wait_for(decoder_->next_logits({{&caches_[0], prompt}}));
    return seconds_since(start);
  }

  double decode(int64_t steps, int64_t batch) {
    const auto start = Clock::now();
    for (int64_t step = 0; step < steps; ++step) {
      std::vector<Decoder::Chunk> chunks;
      for (int64_t i = 0; i < batch; ++i) {
        chunks.push_back({&caches_[static_cast<size_t>(i)], ids(1)});
      }
      wait_for(decoder_->next_logits(chunks));
      throw_if_interrupted();
    }
    return seconds_since(start);
  }

  void truncate(int64_t depth) {
    for (SequenceCache& cache : caches_) cache.truncate(std::min(depth, cache.length()));
  }

  const BenchOptions& options_;
  Checkpoint checkpoint_;
  std::shared_ptr<LlamaForCausalLM> model_;
  std::optional<Decoder> decoder_;
  std::vector<SequenceCache> caches_;
  uint64_t weight_bytes_ = 0;
  uint64_t state_ = 1;
};

// Answers commands until the other end is closed.
void serve(int file, const std::string& path, const BenchOptions& options) {
  const auto fail = [&](ExitCode code, const std::string& text) {
    Reply reply;
    reply.error = static_cast<int64_t>(code);
    reply.text_size = text.size();
    write_all(file, &reply, sizeof reply);
    write_all(file, text.data(), text.size());
  };
  try {
    const c10::InferenceMode no_gradients;
    std::optional<Worker> worker;
    Command command = {};
    while (read_all(file, &command, sizeof command)) {
      Reply reply;
      if (command.kind == Command::kBandwidth) {
        reply.seconds = read_bandwidth(options.load().device);  // and sets the number of threads
      } else {
        if (!worker) worker.emplace(path, options);
        reply = worker->run(command);
      }
      if (!write_all(file, &reply, sizeof reply)) return;
    }
  } catch (const Error& error) {
    fail(error.code(), error.what());
  } catch (const c10::Error& error) {
    fail(exit_code_of(error), path + ": " + error.what_without_backtrace());
  } catch (const std::bad_alloc&) {
    fail(ExitCode::kOutOfMemory, path + ": out of memory");
  } catch (const std::exception& error) {
    fail(ExitCode::kRuntime, path + ": " + error.what());
  }
}

// A model's process, seen from outside.
class Process {
 public:
  Process(std::string path, const BenchOptions& options, const std::vector<Process>& others)
      : path_(std::move(path)) {
    int files[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, files) != 0) {
      throw_runtime(std::string("[bench] socketpair: ") + std::strerror(errno));
    }
    id_ = fork();
    if (id_ < 0) throw_runtime(std::string("[bench] fork: ") + std::strerror(errno));
    if (id_ == 0) {
      ::close(files[0]);
      for (const Process& other : others) ::close(other.file_);
      serve(files[1], path_, options);
      _exit(0);  // what the parent has buffered is the parent's to write
    }
    ::close(files[1]);
    file_ = files[0];
  }
  Process(Process&& other) noexcept
      : path_(std::move(other.path_)),
        id_(std::exchange(other.id_, 0)),
        file_(std::exchange(other.file_, -1)) {}
  Process& operator=(Process&&) = delete;
  ~Process() {
    if (id_ <= 0) return;
    ::close(file_);
    // It has nothing to put in order, and may be far from the end of what it does.
    if (std::uncaught_exceptions() > 0) ::kill(id_, SIGKILL);
    while (::waitpid(id_, nullptr, 0) < 0 && errno == EINTR) {
    }
  }

  Reply run(const Command& command) const {
    Reply reply;
    if (!write_all(file_, &command, sizeof command)) {
      throw_if_interrupted();
      throw_ended();
    }
    // A signal to this process alone does not end the other's work.
    pollfd answer = {file_, POLLIN, 0};
    constexpr int kPoll = 100;  // milliseconds
    while (::poll(&answer, 1, kPoll) <= 0) throw_if_interrupted();
    if (!read_all(file_, &reply, sizeof reply)) {
      throw_if_interrupted();
      throw_ended();
    }
    if (reply.error == 0) return reply;
    std::string text(reply.text_size, ' ');
    read_all(file_, text.data(), text.size());
    throw_if_interrupted();
    throw Error(static_cast<ExitCode>(reply.error), text);
  }

 private:
  [[noreturn]] void throw_ended() const {
    siginfo_t how = {};
    const bool known = ::waitid(P_PID, static_cast<id_t>(id_), &how, WEXITED | WNOWAIT) == 0;
    const std::string text = "[bench] the process of " + path_ + " ended unexpectedly";
    if (known && how.si_code == CLD_KILLED && how.si_status == SIGKILL) {
      throw Error(ExitCode::kOutOfMemory,
                  text + ": killed, as a system does that is out of memory");
    }
    throw_runtime(text);
  }

  std::string path_;
  pid_t id_ = 0;
  int file_ = -1;
};

// Names of the models' folders; paths where two have the same one, numbered where they are one.
std::vector<std::string> names_of(const std::vector<std::string>& models) {
  std::vector<std::string> names;
  for (const std::string& model : models) {
    const std::filesystem::path path(model);
    const auto folder = path.has_filename() ? path.filename() : path.parent_path().filename();
    names.push_back(folder.empty() ? model : folder.string());
  }
  const std::vector<std::string> short_names = names;
  for (size_t i = 0; i < models.size(); ++i) {
    const auto same = std::count(short_names.begin(), short_names.end(), short_names[i]);
    if (same > 1) names[i] = models[i];
  }
  for (size_t i = 0; i < models.size(); ++i) {
    const auto before =
        std::count(models.begin(), models.begin() + static_cast<long>(i), models[i]);
    if (before > 0) names[i] += " (" + std::to_string(before + 1) + ")";
  }
  return names;
}

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

void check(const BenchOptions& options) {
  const auto all_at_least = [](const std::vector<int64_t>& values, int64_t least) {
    return !values.empty() &&
           std::all_of(values.begin(), values.end(), [&](int64_t x) { return x >= least; });
  };
  if (options.models.empty()) throw_usage("[bench] expected a model");
  std::vector<int64_t> lengths = options.depths;
  lengths.insert(lengths.end(), {options.prompt_tokens, options.generated_tokens});
  for (const int64_t length : lengths) {
    if (length <= kLongestSequence) continue;
    throw_usage("[bench] expected at most " + std::to_string(kLongestSequence) +
                " tokens of a sequence, got " + std::to_string(length));
  }
  if (!all_at_least(options.depths, 0)) throw_usage("[bench] expected depths of at least 0");
  if (!all_at_least(options.batches, 1)) throw_usage("[bench] expected batches of at least 1");
  if (options.repetitions < 1) throw_usage("[bench] expected at least 1 repetition");
  if (options.prompt_tokens < 0 || options.generated_tokens < 0 ||
      options.prompt_tokens + options.generated_tokens == 0) {
    throw_usage("[bench] expected tokens to read or to generate");
  }
}

std::string test_name(const BenchRow& row) {
  return (row.decodes ? "tg" : "pp") + std::to_string(row.tokens);
}

}  // namespace

double BenchRow::tokens_per_second(size_t repetition) const {
  return static_cast<double>(tokens * batch) / seconds[repetition];
}

double BenchRow::mean() const {
  double sum = 0;
  for (size_t i = 0; i < seconds.size(); ++i) sum += tokens_per_second(i);
  return sum / static_cast<double>(seconds.size());
}

double BenchRow::deviation() const {
  if (seconds.size() < 2) return 0;
  const double mean = this->mean();
  double sum = 0;
  for (size_t i = 0; i < seconds.size(); ++i) {
    sum += (tokens_per_second(i) - mean) * (tokens_per_second(i) - mean);
  }
  return std::sqrt(sum / static_cast<double>(seconds.size() - 1));
}

double BenchReport::bandwidth() const { return median(bandwidths); }

const BenchRow& BenchReport::base_of(const BenchRow& row) const {
  // Rows of a test stand together, the first model's first.
  const auto index = static_cast<int64_t>(&row - rows.data());
  return rows[static_cast<size_t>(index - index % models)];
}

double BenchReport::speedup(const BenchRow& row) const {
  const BenchRow& base = base_of(row);
  std::vector<double> ratios;
  for (size_t i = 0; i < row.turns.size(); ++i) ratios.push_back(base.turns[i] / row.turns[i]);
  return median(ratios);
}

double BenchReport::bound(const BenchRow& row) const {
  const BenchRow& base = base_of(row);
  return static_cast<double>(base.weight_bytes + base.cached_bytes) /
         static_cast<double>(row.weight_bytes + row.cached_bytes);
}

std::string BenchReport::to_markdown() const {
  std::string text =
      "| model | test | depth | batch | tokens/s | to the first | bound | share | "
      "GB/s | cache | memory | peak |\n"
      "|---|---|---|---|---|---|---|---|---|---|---|---|\n";
  for (const BenchRow& row : rows) {
    const double bound = this->bound(row);
    const double speedup = this->speedup(row);
    text += "| " + row.model + " | " + test_name(row) + " | " + std::to_string(row.depth) + " | " +
            std::to_string(row.batch) + " | " + fixed(row.mean(), 2) + " ± " +
            fixed(row.deviation(), 2) + " | " + fixed(speedup, 3) + " | " +
            (row.decodes ? fixed(bound, 3) : "") + " | " +
            (row.decodes && bound > 1.02 ? fixed((speedup - 1) / (bound - 1), 2) : "") + " | " +
            (row.decodes ? fixed(static_cast<double>(row.weight_bytes + row.cached_bytes) *
                                     row.mean() / static_cast<double>(row.batch) * 1e-9,
                                 1)
                         : "") +
            " | " + format_bytes(row.cache_bytes) + " | " + format_bytes(row.rss_bytes) + " | " +
            format_bytes(row.peak_rss_bytes) + " |\n";
  }
  char line[256];
  std::snprintf(
      line, sizeof line,
      "\n%s, %d threads; memory is read at %.1f GB/s (%.1f to %.1f in %zu runs); hla %s (%s)\n",
      device.c_str(), threads, bandwidth() * 1e-9,
      *std::min_element(bandwidths.begin(), bandwidths.end()) * 1e-9,
      *std::max_element(bandwidths.begin(), bandwidths.end()) * 1e-9, bandwidths.size(), version(),
      version_commit());
  text += line;
  if (failure) text += "\nPARTIAL: ended before it was through; larger depths are missing\n";
  const auto from = [](int64_t tokens) {
    return tokens > 0 ? "from " + std::to_string(tokens) + " tokens on" : std::string("never");
  };
  for (const AttendCosts& cost : costs) {
    text += "\n" + cost.model + ": decoding takes " +
            with_thousands(fixed(cost.decode_products, 0)) +
            " products per cached token and layer, rebuilding keys and values " +
            with_thousands(fixed(cost.rebuild_products, 0)) + ", once for all new tokens: done " +
            from(cost.rebuilds_from) + ", and by a prompt with nothing before it " +
            from(cost.prompt_rebuilds_from) + "\n";
  }
  return text;
}

std::string BenchReport::to_csv() const {
  std::string text =
      "model,test,depth,batch,repetition,seconds,tokens_per_second,weight_bytes,cached_bytes,"
      "cache_bytes,rss_bytes,peak_rss_bytes\n";
  for (const BenchRow& row : rows) {
    for (size_t i = 0; i < row.seconds.size(); ++i) {
      text += csv_field(row.model) + "," + test_name(row) + "," + std::to_string(row.depth) + "," +
              std::to_string(row.batch) + "," + std::to_string(i + 1) + "," +
              fixed(row.seconds[i], 6) + "," + fixed(row.tokens_per_second(i), 3) + "," +
              std::to_string(row.weight_bytes) + "," + std::to_string(row.cached_bytes) + "," +
              std::to_string(row.cache_bytes) + "," + std::to_string(row.rss_bytes) + "," +
              std::to_string(row.peak_rss_bytes) + "\n";
    }
  }
  return text;
}

nlohmann::json BenchReport::to_json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const BenchRow& row : rows) {
    list.push_back({{"model", row.model},
                    {"test", test_name(row)},
                    {"depth", row.depth},
                    {"batch", row.batch},
                    {"seconds", row.seconds},
                    {"turns", row.turns},
                    {"tokens_per_second", row.mean()},
                    {"tokens_per_second_deviation", row.deviation()},
                    {"speedup", speedup(row)},
                    {"bound", bound(row)},
                    {"weight_bytes", row.weight_bytes},
                    {"cached_bytes", row.cached_bytes},
                    {"cache_bytes", row.cache_bytes},
                    {"rss_bytes", row.rss_bytes},
                    {"peak_rss_bytes", row.peak_rss_bytes}});
  }
  nlohmann::json attending = nlohmann::json::array();
  for (const AttendCosts& cost : costs) {
    attending.push_back({{"model", cost.model},
                         {"decode_products", cost.decode_products},
                         {"rebuild_products", cost.rebuild_products},
                         {"rebuilds_from", cost.rebuilds_from},
                         {"prompt_rebuilds_from", cost.prompt_rebuilds_from}});
  }
  return {{"hla_version", version()},
          {"hla_commit", version_commit()},
          {"partial", failure != nullptr},
          {"device", device},
          {"threads", threads},
          {"models", paths},
          {"cache_dtype", cache_dtype},
          {"attend", attend},
          {"absorb_error", absorb_error},
          {"amplification", amplification ? nlohmann::json(*amplification) : nlohmann::json()},
          {"bandwidth", bandwidth()},
          {"bandwidths", bandwidths},
          {"results", std::move(list)},
          {"attending", std::move(attending)}};
}

PlotSpec BenchReport::to_plot() const {
  PlotSpec plot;
  plot.title = "Decoding";
  plot.subtitle = device + ", " + std::to_string(threads) + " threads";
  plot.x_label = "tokens in the cache";
  plot.y_label = "tokens/s";
  for (size_t i = 0; i < rows.size(); ++i) {
    const BenchRow& row = rows[i];
    if (!row.decodes) continue;
    const std::string label =
        row.model + (row.batch == 1 ? "" : ", batch " + std::to_string(row.batch));
    auto found = std::find_if(plot.series.begin(), plot.series.end(),
                              [&](const PlotSeries& series) { return series.label == label; });
    if (found == plot.series.end()) {
      plot.series.push_back({.label = label});
      found = plot.series.end() - 1;
    }
    found->x.push_back(static_cast<double>(row.depth));
    found->y.push_back(row.mean());
    found->y_error.push_back(row.deviation());
  }
  return plot;
}

BenchReport bench(const BenchOptions& options) {
  check(options);
  std::vector<Process> processes;
  processes.reserve(options.models.size() + 1);
  for (const std::string& model : options.models) processes.emplace_back(model, options, processes);
  // One more, without a model, so that what it measures with does not count as a model's memory.
  processes.emplace_back("the memory test", options, processes);
  const Process& meter = processes.back();

  std::vector<int64_t> depths = options.depths;
  std::sort(depths.begin(), depths.end());
  depths.erase(std::unique(depths.begin(), depths.end()), depths.end());
  struct Test {
    Command command;
    size_t first_row;
  };
  BenchReport report;
  report.models = static_cast<int64_t>(options.models.size());
  report.paths = options.models;
  const DecoderOptions& decoder = options.decoder;
  report.cache_dtype = decoder.cache_dtype ? dtype_label(*decoder.cache_dtype) : "auto";
  report.attend = to_string(decoder.attend);
  report.absorb_error = decoder.absorb_error;
  report.amplification = decoder.amplification;
  for (const std::string& name : names_of(options.models)) report.costs.push_back({.model = name});
  const size_t tests_a_depth = (options.prompt_tokens > 0 ? 1 : 0) +
                               (options.generated_tokens > 0 ? options.batches.size() : 0);
  Progress progress(
      "benchmark",
      static_cast<int64_t>(depths.size() * options.models.size() *
                           (1 + tests_a_depth * static_cast<size_t>(options.repetitions))));
  // All of them are in memory at once.
  uint64_t needed = 0;
  for (size_t m = 0; m < options.models.size(); ++m) {
    throw_if_interrupted();
    needed += processes[m].run({Command::kOpen, 0, 0, 0}).needed_bytes;
  }
  if (needed > 0) {
    preflight_memory(needed + kBandwidthBytes, "the caches of all models and the memory test");
  }
  const auto measure = [&](int64_t depth) {
    std::vector<Test> tests;
    const auto add = [&](Command::Kind kind, int64_t tokens, int64_t batch) {
      tests.push_back({{kind, tokens, depth, batch}, report.rows.size()});
      for (const AttendCosts& cost : report.costs) {
        BenchRow row;
        row.model = cost.model;
        row.decodes = kind == Command::kDecode;
        row.tokens = tokens;
        row.depth = depth;
        row.batch = batch;
        report.rows.push_back(std::move(row));
      }
    };
    if (options.prompt_tokens > 0) add(Command::kPrompt, options.prompt_tokens, 1);
    for (const int64_t batch : options.batches) {
      if (options.generated_tokens > 0) add(Command::kDecode, options.generated_tokens, batch);
    }
    for (size_t m = 0; m < options.models.size(); ++m) {
      throw_if_interrupted();
      const Reply reply = processes[m].run({Command::kDepth, options.prompt_tokens, depth, 1});
      report.threads = static_cast<int>(reply.threads);
      report.device = reply.device;
      report.costs[m].decode_products = reply.decode_products;
      report.costs[m].rebuild_products = reply.rebuild_products;
      report.costs[m].rebuilds_from = reply.rebuilds_from;
      report.costs[m].prompt_rebuilds_from = reply.prompt_rebuilds_from;
      progress.advance(1, "filling to " + std::to_string(depth));
    }
    for (int64_t repetition = 0; repetition < options.repetitions; ++repetition) {
      report.bandwidths.push_back(meter.run({Command::kBandwidth, 0, 0, 0}).seconds);
      for (const Test& test : tests) {
        for (Command turn = test.command; turn.done < turn.tokens; turn.done = end_of_turn(turn)) {
          for (size_t m = 0; m < options.models.size(); ++m) {
            throw_if_interrupted();
            std::this_thread::sleep_for(kPause);
            const Reply reply = processes[m].run(turn);
            BenchRow& row = report.rows[test.first_row + m];
            row.turns.push_back(reply.seconds);
            if (turn.done == 0) row.seconds.push_back(0);
            row.seconds.back() += reply.seconds;
            row.weight_bytes = reply.weight_bytes;
            row.cache_bytes = reply.cache_bytes;
            row.cached_bytes = reply.cached_bytes;
            row.rss_bytes = reply.rss_bytes;
            row.peak_rss_bytes = reply.peak_rss_bytes;
          }
        }
        const BenchRow& row = report.rows[test.first_row];
        progress.advance(report.models, test_name(row) + ", batch " + std::to_string(row.batch));
      }
    }
  };
  for (const int64_t depth : depths) {
    BenchReport before = report;
    try {
      measure(depth);
    } catch (...) {
      if (before.rows.empty()) throw;
      report = std::move(before);
      report.failure = std::current_exception();
      break;
    }
  }
  return report;
}

}  // namespace hla
