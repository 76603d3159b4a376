// Line and scatter charts as SVG: perplexity against cache bytes, tokens/s against depth, losses.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace hla {

// All texts are UTF-8; they are escaped, and shortened with "…" where they do not fit.
struct PlotSeries {
  std::string label = {};                      // for the legend; empty: "series N"
  std::vector<double> x = {}, y = {};          // as many of each
  std::vector<double> y_error = {};            // ± half-lengths of vertical bars; empty: none
  std::vector<std::string> point_labels = {};  // one per point, "" for none; empty: none
  bool line = true;                            // joins neighbours; a point left out breaks the line
  bool markers = true;
};

struct PlotSpec {
  std::string title, subtitle, x_label, y_label;
  bool x_log = false, y_log = false;
  std::vector<PlotSeries> series;
  int width = 800, height = 500;  // pixels; the image gets taller where a long legend needs it
};

// The chart as one SVG document, the same bytes for the same spec. Points that are not finite (or
// beyond 1e270), or not positive on a logarithmic axis, are left out, and a note says how many. A
// point label that finds no free place is left out too; it shows when the mouse rests on the point.
// Throws kUsage for series whose sizes do not match, negative y_error, or an unusable width or
// height.
std::string render_svg(const PlotSpec& spec);

// Charts one below the other, in one document.
std::string render_svg_panels(const std::vector<PlotSpec>& panels);

// Either into a file through an AtomicFile: kUsage where it exists and `force` is not set.
void write_svg_file(const std::filesystem::path& path, const PlotSpec& spec, bool force);
void write_svg_panels(const std::filesystem::path& path, const std::vector<PlotSpec>& panels,
                      bool force);

namespace detail {

struct PlotTick {
  double value;
  std::string label;
};

// Ticks within [lo, hi], lo < hi, at multiples of 1, 2 or 5 times a power of ten: the finest that
// gives at most `max_count` (at least 2) and is not below `least_step`. Labels are distinct.
std::vector<PlotTick> linear_ticks(double lo, double hi, int max_count, double least_step = 0);

// The same for 0 < lo < hi on a logarithmic axis: powers of ten (every n-th where there are many),
// else 1, 2 and 5 times them, else, within less than a decade, linear_ticks.
std::vector<PlotTick> log_ticks(double lo, double hi, int max_count);

}  // namespace detail
}  // namespace hla
