// What is known of a run by step: a file of JSON lines, and what is made of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "hla/io/svg_plot.h"

namespace hla {

class Metrics {
 public:
  // Goes on behind the first `bytes` of the file, or, where it has fewer, its whole lines. Throws
  // kRuntime for failed I/O, as the others do.
  Metrics(std::filesystem::path file, uint64_t bytes);

  void add(const nlohmann::json& line);  // an object
  int64_t bytes();                       // so far, which are on disk then
  // Everything so far, in order.
  std::vector<nlohmann::json> lines();

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

// A column for every key that any line has, in alphabetical order behind "step". Cells of null,
// which numbers that are not finite are, are empty.
std::string metrics_csv(const std::vector<nlohmann::json>& lines);

// Training and evaluation loss against the step. Of many steps, means of as many neighbours.
PlotSpec loss_plot(const std::vector<nlohmann::json>& lines, const std::string& title);
// The error of the steps on attention; no series where there were none.
PlotSpec attention_plot(const std::vector<nlohmann::json>& lines, const std::string& title);

}  // namespace hla
