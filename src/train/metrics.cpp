#include "hla/train/metrics.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/join.h"
#include "hla/core/log.h"
#include "hla/io/atomic_file.h"

namespace hla {
namespace {

constexpr size_t kMostPoints = 200;  // of a curve

// Numbers that are not finite are null in JSON.
bool has_value(const nlohmann::json& line, const std::string& key) {
  return line.contains(key) && !line[key].is_null();
}

// By step, the numbers of a key in the lines that have it.
PlotSeries series_of(const std::vector<nlohmann::json>& lines, const char* key, std::string label) {
  PlotSeries series;
  series.label = std::move(label);
  for (const nlohmann::json& line : lines) {
    if (!has_value(line, key)) continue;
    series.x.push_back(line["step"]);
    series.y.push_back(line[key]);
  }
  return series;
}

PlotSeries means(const PlotSeries& all) {
  const std::vector<double>& x = all.x;
  const std::vector<double>& y = all.y;
  PlotSeries series;
  const size_t together = (x.size() + kMostPoints - 1) / kMostPoints;
  series.label = all.label;
  if (together > 1) series.label += ", means of " + std::to_string(together) + " steps";
  series.markers = false;
  for (size_t begin = 0; begin < x.size(); begin += together) {
    const size_t end = std::min(begin + together, x.size());
    double sum_x = 0;
    double sum_y = 0;
    for (size_t i = begin; i < end; ++i) {
      sum_x += x[i];
      sum_y += y[i];
    }
    const auto count = static_cast<double>(end - begin);
    series.x.push_back(sum_x / count);
    series.y.push_back(sum_y / count);
  }
  return series;
}

// Of a key of the steps; without a series where no line has it.
PlotSpec training_plot(const std::vector<nlohmann::json>& lines, const char* key, std::string title,
                       std::string subtitle, std::string y_label) {
  PlotSpec plot;
  plot.title = std::move(title);
  plot.subtitle = std::move(subtitle);
  plot.x_label = "step";
  plot.y_label = std::move(y_label);
  const PlotSeries training = series_of(lines, key, "training");
  if (!training.x.empty()) plot.series.push_back(means(training));
  return plot;
}

// Bytes up to the end of the last line that has one.
uint64_t whole_lines(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  return text.rfind('\n') + 1;  // npos + 1 is 0
}

uint64_t size_of(const std::filesystem::path& path) {
  std::error_code error;
  const uint64_t size = std::filesystem::file_size(path, error);
  if (error) throw_runtime(path.string() + ": cannot be read: " + error.message());
  return size;
}

}  // namespace

Metrics::Metrics(std::filesystem::path file, uint64_t bytes) : path_(std::move(file)) {
  // Cut, not written anew: what is kept is on disk at every moment.
  file_.open(path_, std::ios::app | std::ios::binary);
  if (!file_) throw_runtime(path_.string() + ": cannot be written");
  uint64_t kept = bytes;  // without lines of steps that are now done again
  if (size_of(path_) < bytes) {
    kept = whole_lines(path_);
    log_warning(path_.string() + ": is shorter than it was; some steps have no metrics");
  }
  std::error_code error;
  std::filesystem::resize_file(path_, kept, error);
  if (error) throw_runtime(path_.string() + ": cannot be cut: " + error.message());
}

void Metrics::add(const nlohmann::json& line) {
  file_ << line.dump() << "\n" << std::flush;
  if (!file_) throw_runtime(path_.string() + ": write failed");
}

int64_t Metrics::bytes() {
  detail::sync_file(path_);
  return static_cast<int64_t>(size_of(path_));
}

std::vector<nlohmann::json> Metrics::lines() {
  std::vector<nlohmann::json> result;
  std::ifstream file(path_);
  for (std::string line; std::getline(file, line);) result.push_back(nlohmann::json::parse(line));
  return result;
}

std::string metrics_csv(const std::vector<nlohmann::json>& lines) {
  std::set<std::string> keys;
  for (const nlohmann::json& line : lines) {
    for (const auto& [key, value] : line.items()) keys.insert(key);
  }
  keys.erase("step");
  std::vector<std::string> columns = {"step"};
  columns.insert(columns.end(), keys.begin(), keys.end());
  std::string csv = join(columns, ",") + "\n";
  for (const nlohmann::json& line : lines) {
    std::vector<std::string> cells;
    for (const std::string& column : columns) {
      cells.push_back(has_value(line, column) ? line[column].dump() : "");
    }
    csv += join(cells, ",") + "\n";
  }
  return csv;
}

PlotSpec loss_plot(const std::vector<nlohmann::json>& lines, const std::string& title) {
  PlotSpec plot = training_plot(lines, "loss", "Loss", title, "nats per token");
  plot.series.push_back(series_of(lines, "eval_loss", "evaluation"));
  return plot;
}

PlotSpec attention_plot(const std::vector<nlohmann::json>& lines, const std::string& title) {
  return training_plot(lines, "attention_error", "Steps on attention", title,
                       "error of the layers' attention");
}

}  // namespace hla
