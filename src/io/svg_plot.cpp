#include "hla/io/svg_plot.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "hla/core/error.h"
#include "hla/core/text_table.h"
#include "hla/io/atomic_file.h"

namespace hla {
namespace {

using detail::PlotTick;

// ---- text ----

// One character of a label: its bytes as XML wants them, and its width in ems.
struct Glyph {
  std::string xml;
  double width;
  bool space;
};

// An estimate on the wide side (DejaVu Sans), since the viewer's font is not known.
double glyph_width(char32_t c) {
  if (c < 0x80) {
    constexpr std::string_view kNarrow = "iljI.,:;'|!()[]{} ft/\\r-";
    constexpr std::string_view kWide = "mwMW@%";
    const char ascii = static_cast<char>(c);
    if (kNarrow.find(ascii) != std::string_view::npos) return 0.40;
    if (kWide.find(ascii) != std::string_view::npos) return 0.97;
    return ascii >= 'A' && ascii <= 'Z' ? 0.74 : 0.63;
  }
  if (c >= 0x300 && c < 0x370) return 0;  // combining marks
  return c >= 0x1100 && c != 0x2026 && !(c >= 0x1E00 && c < 0x2E80) ? 1.0 : 0.75;
}

// The code point at `i`, which moves past it; U+FFFD for what is not UTF-8.
char32_t next_character(std::string_view text, size_t& i) {
  constexpr char32_t kReplacement = 0xFFFD;
  const auto lead = static_cast<unsigned char>(text[i++]);
  if (lead < 0x80) return lead;
  const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
  if (lead < 0xC2 || lead > 0xF4) return kReplacement;
  char32_t c = lead & (0x3Fu >> more);
  for (int k = 0; k < more; ++k) {
    if (i >= text.size() || (static_cast<unsigned char>(text[i]) & 0xC0) != 0x80) {
      return kReplacement;
    }
    c = c << 6 | (static_cast<unsigned char>(text[i++]) & 0x3F);
  }
  constexpr std::array<char32_t, 4> kLeast = {0, 0x80, 0x800, 0x10000};
  const bool valid =
      c >= kLeast[static_cast<size_t>(more)] && c < 0x110000 && !(c >= 0xD800 && c < 0xE000);
  return valid ? c : kReplacement;
}

// XML 1.0 has no way to write most control characters, so that they become U+FFFD.
std::vector<Glyph> glyphs_of(std::string_view text) {
  std::vector<Glyph> glyphs;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_character(text, i);
    if (c == '\n' || c == '\t' || c == '\r' || c == ' ') {
      glyphs.push_back({" ", glyph_width(' '), true});
    } else if (c < 0x20 || c == 0x7F || c == 0xFFFD || c == 0xFFFE || c == 0xFFFF) {
      glyphs.push_back({"\uFFFD", 1.0, false});
    } else {
      std::string xml;
      switch (c) {
        case '&':
          xml = "&amp;";
          break;
        case '<':
          xml = "&lt;";
          break;
        case '>':
          xml = "&gt;";
          break;
        case '"':
          xml = "&quot;";
          break;
        case '\'':
          xml = "&#39;";
          break;
        default:
          xml = std::string(text.substr(begin, i - begin));
      }
      glyphs.push_back({std::move(xml), glyph_width(c), false});
    }
  }
  return glyphs;
}

using Line = std::vector<Glyph>;

double width_of(const Line& line, double size) {
  double ems = 0;
  for (const Glyph& glyph : line) ems += glyph.width;
  return ems * size;
}
double width_of(std::string_view text, double size) { return width_of(glyphs_of(text), size); }

std::string xml_of(const Line& line) {
  std::string xml;
  for (const Glyph& glyph : line) xml += glyph.xml;
  return xml;
}

// Cut at the end, with "…", to fit `room` pixels.
Line shortened(Line line, double size, double room) {
  if (width_of(line, size) <= room) return line;
  const Glyph dots = {"…", 1.0, false};
  while (!line.empty() && width_of(line, size) + size * dots.width > room) line.pop_back();
  while (!line.empty() && line.back().space) line.pop_back();
  line.push_back(dots);
  return line;
}

// Broken at spaces, inside of words where one is too long, into at most `max_lines`.
std::vector<Line> wrapped(std::string_view text, double size, double room, size_t max_lines) {
  std::vector<Line> lines;
  Line rest = glyphs_of(text);
  while (!rest.empty()) {
    if (lines.size() + 1 == max_lines || width_of(rest, size) <= room) {
      lines.push_back(shortened(std::move(rest), size, room));
      break;
    }
    size_t fits = 0;
    size_t space = 0;
    for (double used = 0; fits < rest.size(); ++fits) {
      if (rest[fits].space && fits > 0) space = fits;
      used += rest[fits].width * size;
      if (used > room && !rest[fits].space) break;
    }
    const size_t end = space > 0 ? space : std::max<size_t>(fits, 1);
    lines.emplace_back(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(end));
    rest.erase(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(end + (space > 0 ? 1 : 0)));
  }
  return lines;
}

// ---- numbers ----

// A coordinate: two decimals, no trailing zeros.
std::string px(double value) {
  std::string text = fixed(value, 2);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

std::string general(double value) {
  std::array<char, 64> buffer;
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                 std::chars_format::general, 6);
  return {buffer.data(), end.ptr};
}

// "-12345.60" -> "−12,345.60".
std::string with_separators(const std::string& text) {
  return text.starts_with('-') ? "−" + with_thousands(text.substr(1)) : with_thousands(text);
}

// floor(log10(value)) where a value just below a power of ten counts as that power.
int exponent_of(double value) { return static_cast<int>(std::floor(std::log10(value) + 1e-9)); }

constexpr double kThousandsLimit = 1e6;  // from here on SI suffixes
constexpr double kSiLimit = 1e15;        // from here on powers of ten

// Decimals that tell multiples of `step` apart.
int decimals_of(double step) { return std::max(0, -exponent_of(step)); }

// Labels of multiples of `step`, all in the same style.
std::vector<std::string> tick_labels(const std::vector<double>& values, double step) {
  double largest = 0;
  for (const double value : values) largest = std::max(largest, std::abs(value));
  std::vector<std::string> labels;
  const auto each = [&](double divisor, int decimals, const std::string& suffix) {
    for (const double value : values) {
      labels.push_back(value == 0 && !suffix.empty()
                           ? "0"
                           : with_separators(fixed(value / divisor, decimals)) + suffix);
    }
    return labels;
  };
  if (largest >= kSiLimit || largest < 1e-3) {
    const int exponent = largest > 0 ? exponent_of(largest) : 0;
    const int decimals = std::max(0, exponent - exponent_of(step));
    return each(std::pow(10.0, exponent), decimals, "e" + std::to_string(exponent));
  }
  constexpr std::array<std::pair<double, const char*>, 3> kUnits = {
      {{1e12, "T"}, {1e9, "G"}, {1e6, "M"}}};
  for (const auto& [unit, suffix] : kUnits) {
    if (largest >= unit && decimals_of(step / unit) <= 3) {
      return each(unit, decimals_of(step / unit), suffix);
    }
  }
  return each(1, decimals_of(step), "");
}

// A label of its own for 1, 2 or 5 times a power of ten, as logarithmic axes have them.
std::string log_label(double value) {
  const int exponent = exponent_of(value);
  if (value >= kSiLimit * (1 - 1e-9) || exponent < -4) {
    return fixed(value / std::pow(10.0, exponent), 0) + "e" + std::to_string(exponent);
  }
  constexpr std::array<std::pair<double, const char*>, 3> kUnits = {
      {{1e12, "T"}, {1e9, "G"}, {kThousandsLimit, "M"}}};
  for (const auto& [unit, suffix] : kUnits) {
    if (value >= unit * (1 - 1e-9)) return fixed(value / unit, 0) + suffix;
  }
  return with_separators(fixed(value, std::max(0, -exponent)));
}

}  // namespace

// ---- ticks ----

namespace detail {

std::vector<PlotTick> linear_ticks(double lo, double hi, int max_count, double least_step) {
  max_count = std::max(max_count, 2);
  int exponent = exponent_of((hi - lo) / max_count) - 1;
  for (;; ++exponent) {
    for (const int digit : {1, 2, 5}) {
      // Negative powers of ten are not exact, divisions by positive ones are rounded correctly.
      const double power = std::pow(10.0, std::abs(exponent));
      const auto at = [&](double i) {
        return exponent < 0 ? i * digit / power : i * digit * power;
      };
      const double step = at(1);
      const double first = std::ceil(lo / step - 1e-9);
      const double last = std::floor(hi / step + 1e-9);
      if (last - first + 1 > max_count || step < least_step) continue;
      std::vector<double> values;
      for (double i = first; i <= last; ++i) values.push_back(i == 0 ? 0 : at(i));
      const std::vector<std::string> labels = tick_labels(values, step);
      std::vector<PlotTick> ticks;
      for (size_t i = 0; i < values.size(); ++i) ticks.push_back({values[i], labels[i]});
      return ticks;
    }
  }
}

std::vector<PlotTick> log_ticks(double lo, double hi, int max_count) {
  max_count = std::max(max_count, 2);
  const int first = static_cast<int>(std::ceil(std::log10(lo) - 1e-9));
  const int last = static_cast<int>(std::floor(std::log10(hi) + 1e-9));
  const auto decades = [&](const std::vector<int>& digits, int stride) {
    std::vector<PlotTick> ticks;
    for (int exponent = first - 1; exponent <= last; ++exponent) {
      if (((exponent % stride) + stride) % stride != 0) continue;
      for (const int digit : digits) {
        const double value =
            exponent < 0 ? digit / std::pow(10.0, -exponent) : digit * std::pow(10.0, exponent);
        if (value >= lo * (1 - 1e-9) && value <= hi * (1 + 1e-9)) {
          ticks.push_back({value, log_label(value)});
        }
      }
    }
    return ticks;
  };
  const auto limit = static_cast<size_t>(max_count);
  std::vector<PlotTick> ticks = decades({1, 2, 5}, 1);
  if (ticks.size() < 3) return linear_ticks(lo, hi, max_count);
  for (const int stride : {1, 2, 3, 5, 10, 20, 50, 100, 200, 500}) {
    if (ticks.size() <= limit) break;
    std::vector<PlotTick> fewer = decades({1}, stride);
    // Within one or two decades their powers alone may be too few to read anything off.
    if (fewer.size() < 2) return linear_ticks(lo, hi, max_count);
    ticks = std::move(fewer);
  }
  return ticks;
}

}  // namespace detail

namespace {

// ---- geometry ----

struct Point {
  double x, y;
};

struct Box {
  double left, top, right, bottom;
  bool overlaps(const Box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
  bool contains(const Box& other) const {
    return left <= other.left && other.right <= right && top <= other.top && other.bottom <= bottom;
  }
  Point nearest(Point p) const {
    return {std::clamp(p.x, left, right), std::clamp(p.y, top, bottom)};
  }
};

struct Segment {
  Point a, b;
};

// Liang-Barsky.
bool crosses(const Segment& s, const Box& box) {
  double t0 = 0;
  double t1 = 1;
  const auto clip = [&](double p, double q) {  // p·t <= q
    if (p == 0) return q >= 0;
    const double t = q / p;
    if (p < 0) {
      t0 = std::max(t0, t);
    } else {
      t1 = std::min(t1, t);
    }
    return t0 <= t1;
  };
  const double dx = s.b.x - s.a.x;
  const double dy = s.b.y - s.a.y;
  return clip(-dx, s.a.x - box.left) && clip(dx, box.right - s.a.x) && clip(-dy, s.a.y - box.top) &&
         clip(dy, box.bottom - s.a.y);
}

// One axis: values to pixels.
struct Axis {
  bool log = false;
  double lo = 0, hi = 1;    // values
  double from = 0, to = 1;  // pixels of lo and hi
  std::vector<PlotTick> ticks;
  std::vector<double> minor;  // grid lines without a label
  double least_step = 0;

  double transformed(double value) const { return log ? std::log10(value) : value; }
  double position(double value) const {
    const double a = transformed(lo);
    return from + (transformed(value) - a) / (transformed(hi) - a) * (to - from);
  }
};

constexpr double kLargest = 1e270;  // so that no range overflows, with its margins

bool usable(double value, bool log) {
  return std::isfinite(value) && std::abs(value) <= kLargest && (!log || value >= 1 / kLargest);
}

// A range with some room around the values, never empty.
Axis make_axis(bool log, std::optional<std::pair<double, double>> range) {
  Axis axis;
  axis.log = log;
  if (!range) {
    axis.lo = log ? 1 : 0;
    axis.hi = log ? 10 : 1;
    return axis;
  }
  auto [lo, hi] = *range;
  if (log) {
    double a = std::log10(lo);
    double b = std::log10(hi);
    // Narrower ranges would need labels of more than a dozen digits.
    if (b - a < 1e-9) {
      a -= 0.3;
      b += 0.3;
    }
    const double room = 0.05 * (b - a);
    axis.lo = std::pow(10.0, a - room);
    axis.hi = std::pow(10.0, b + room);
    return axis;
  }
  const double largest = std::max(std::abs(lo), std::abs(hi));
  if (hi - lo <= std::max(1e-9 * largest, 1 / kLargest)) {
    const double room = largest > 1 / kLargest ? 0.1 * largest : 1;
    axis.lo = lo - room;
    axis.hi = hi + room;
    return axis;
  }
  const double room = 0.05 * (hi - lo);
  // Counts, bytes and losses have no negative values: their axes show none.
  axis.lo = lo >= 0 && lo < room ? 0 : lo - room;
  axis.hi = hi + room;
  return axis;
}

void set_ticks(Axis& axis, int max_count) {
  axis.ticks = axis.log ? detail::log_ticks(axis.lo, axis.hi, max_count)
                        : detail::linear_ticks(axis.lo, axis.hi, max_count, axis.least_step);
  axis.minor.clear();
  const double decades = axis.log ? std::log10(axis.hi / axis.lo) : 0;
  if (!axis.log || decades > 8) return;
  for (int exponent = exponent_of(axis.lo); exponent <= exponent_of(axis.hi); ++exponent) {
    for (int digit = 1; digit < 10; ++digit) {
      const double value = digit * std::pow(10.0, exponent);
      const bool labelled = std::any_of(
          axis.ticks.begin(), axis.ticks.end(),
          [&](const PlotTick& tick) { return std::abs(tick.value - value) < 1e-9 * value; });
      if (!labelled && value > axis.lo && value < axis.hi) axis.minor.push_back(value);
    }
  }
}

// ---- style ----

// Okabe and Ito's palette for all kinds of colour vision; its yellow, too light for a white ground,
// is a brown here.
constexpr std::array kColors = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                "#E69F00", "#56B4E9", "#000000", "#7A5C00"};
constexpr std::array kDashes = {"", "7 4", "2 3", "9 3 2 3"};
constexpr double kTitleSize = 17;
constexpr double kSubtitleSize = 12.5;
constexpr double kLabelSize = 13;
constexpr double kTickSize = 12;
constexpr double kLegendSize = 12;
constexpr double kPointLabelSize = 11;
constexpr double kLegendSample = 30;
constexpr double kMargin = 14;
constexpr double kLeastPlotHeight = 140;

struct Style {
  std::string color;
  std::string dash;
  size_t shape = 0;
};

Style style_of(const PlotSeries& series, size_t index) {
  // Without markers the dashes are what tells lines apart where colours do not.
  const size_t dash = series.markers ? index / kColors.size() : index;
  return {kColors[index % kColors.size()], kDashes[dash % kDashes.size()], index % kColors.size()};
}

std::string polygon(const std::vector<Point>& corners, const std::string& paint) {
  std::string d;
  for (const Point& corner : corners)
    d += (d.empty() ? "" : " ") + px(corner.x) + "," + px(corner.y);
  return "<polygon points=\"" + d + "\" " + paint + "/>";
}

std::string marker(const Style& style, Point p, double r) {
  const std::string fill = "fill=\"" + style.color + "\" stroke=\"#fff\" stroke-width=\"0.8\"";
  const auto at = [&](double x, double y) { return Point{p.x + x * r, p.y + y * r}; };
  switch (style.shape) {
    case 0:
      return "<circle cx=\"" + px(p.x) + "\" cy=\"" + px(p.y) + "\" r=\"" + px(r) + "\" " + fill +
             "/>";
    case 1:
      return polygon({at(-.9, -.9), at(.9, -.9), at(.9, .9), at(-.9, .9)}, fill);
    case 2:
      return polygon({at(0, -1.2), at(1.15, .85), at(-1.15, .85)}, fill);
    case 3:
      return polygon({at(0, -1.3), at(1.3, 0), at(0, 1.3), at(-1.3, 0)}, fill);
    case 4:
      return polygon({at(0, 1.2), at(1.15, -.85), at(-1.15, -.85)}, fill);
    case 5:  // plus
      return polygon(
          {at(-.4, -1.2), at(.4, -1.2), at(.4, -.4), at(1.2, -.4), at(1.2, .4), at(.4, .4),
           at(.4, 1.2), at(-.4, 1.2), at(-.4, .4), at(-1.2, .4), at(-1.2, -.4), at(-.4, -.4)},
          fill);
    case 6:  // cross
      return polygon(
          {at(-1.1, -.6), at(-.6, -1.1), at(0, -.5), at(.6, -1.1), at(1.1, -.6), at(.5, 0),
           at(1.1, .6), at(.6, 1.1), at(0, .5), at(-.6, 1.1), at(-1.1, .6), at(-.5, 0)},
          fill);
    default:  // pentagon
      return polygon({at(0, -1.2), at(1.14, -.37), at(.7, .97), at(-.7, .97), at(-1.14, -.37)},
                     fill);
  }
}

std::string text_at(double x, double y, double size, const std::string& attributes,
                    const std::string& xml) {
  return "<text x=\"" + px(x) + "\" y=\"" + px(y) + "\" font-size=\"" + px(size) + "\"" +
         (attributes.empty() ? "" : " ") + attributes + ">" + xml + "</text>\n";
}

std::string line_at(Point a, Point b, const std::string& attributes) {
  return "<line x1=\"" + px(a.x) + "\" y1=\"" + px(a.y) + "\" x2=\"" + px(b.x) + "\" y2=\"" +
         px(b.y) + "\" " + attributes + "/>\n";
}

// ---- the data on the canvas ----

struct DrawnPoint {
  Point at;
  double low, high;  // ends of the error bar, pixels
  bool has_bar;
  size_t index;  // in the series
};

struct DrawnSeries {
  std::vector<std::vector<DrawnPoint>> runs;  // unbroken
  std::vector<std::vector<Point>> lines;      // the runs as drawn
  double radius = 0;                          // of the markers; 0: none
  size_t points = 0;
};

// A run of far more points than pixels, reduced to what can be seen: the first, lowest, highest and
// last point of every column of pixels.
std::vector<Point> thinned(const std::vector<DrawnPoint>& run, double width) {
  std::vector<Point> line;
  line.reserve(run.size());
  for (const DrawnPoint& point : run) line.push_back(point.at);
  const auto before = [](const Point& a, const Point& b) { return a.x < b.x; };
  if (static_cast<double>(run.size()) <= 4 * width ||
      !std::is_sorted(line.begin(), line.end(), before)) {
    return line;
  }
  std::vector<Point> result;
  for (size_t begin = 0; begin < line.size();) {
    size_t end = begin;
    size_t low = begin;
    size_t high = begin;
    for (; end < line.size() && std::floor(line[end].x) == std::floor(line[begin].x); ++end) {
      if (line[end].y < line[low].y) low = end;
      if (line[end].y > line[high].y) high = end;
    }
    for (const size_t i : std::set<size_t>{begin, low, high, end - 1}) result.push_back(line[i]);
    begin = end;
  }
  return result;
}

void check(const PlotSpec& spec) {
  std::vector<std::string> problems;
  const auto size = [&](const char* what, int got) {
    constexpr int kLeast = 200;
    constexpr int kMost = 20000;
    if (got < kLeast || got > kMost) {
      problems.push_back(std::string(what) + ": expected " + std::to_string(kLeast) + " to " +
                         std::to_string(kMost) + " pixels, got " + std::to_string(got));
    }
  };
  size("width", spec.width);
  size("height", spec.height);
  for (size_t i = 0; i < spec.series.size(); ++i) {
    const PlotSeries& series = spec.series[i];
    const std::string name = "series " + std::to_string(i + 1) +
                             (series.label.empty() ? "" : " (" + series.label + ")") + ": ";
    const auto count = [&](const char* what, size_t got, bool optional) {
      if (got == series.x.size() || (optional && got == 0)) return;
      problems.push_back(name + what + ": expected " + std::to_string(series.x.size()) +
                         " values, one per x, got " + std::to_string(got));
    };
    count("y", series.y.size(), false);
    count("y_error", series.y_error.size(), true);
    count("point_labels", series.point_labels.size(), true);
    for (const double error : series.y_error) {
      if (error < 0) {
        problems.push_back(name + "y_error: expected lengths of at least 0, got " + general(error));
        break;
      }
    }
  }
  if (problems.empty()) return;
  std::string message = "[plot] " + problems.front();
  for (size_t i = 1; i < problems.size(); ++i) message += "\n  - " + problems[i];
  throw_usage(message);
}

class Chart {
 public:
  explicit Chart(const PlotSpec& spec) : spec_(spec), width_(spec.width), height_(spec.height) {}

  // The <svg> element, with its upper edge at `y` of one around it.
  std::string render(double y = 0) {
    find_ranges();
    lay_out();
    for (size_t i = 0; i < spec_.series.size(); ++i) place(spec_.series[i]);
    draw_frame();
    for (size_t i = 0; i < drawn_.size(); ++i) draw(i);
    draw_point_labels();
    draw_legend();
    const std::string w = px(width_);
    const std::string h = px(height_);
    std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\"" +
                      (y > 0 ? " y=\"" + px(y) + "\"" : "") + " width=\"" + w + "\" height=\"" + h +
                      "\" viewBox=\"0 0 " + w + " " + h +
                      "\" role=\"img\" font-family=\"'DejaVu Sans', Verdana, Helvetica, Arial, "
                      "sans-serif\" fill=\"#222\">\n";
    if (!spec_.title.empty()) svg += "<title>" + xml_of(glyphs_of(spec_.title)) + "</title>\n";
    svg += "<rect width=\"" + w + "\" height=\"" + h + "\" fill=\"#fff\"/>\n";
    return svg + head_ + body_ + "</svg>\n";
  }

  double width() const { return width_; }
  double height() const { return height_; }  // known after render()

 private:
  void find_ranges() {
    bool whole_x = true;
    bool whole_y = true;
    std::optional<std::pair<double, double>> x_range;
    std::optional<std::pair<double, double>> y_range;
    const auto include = [](std::optional<std::pair<double, double>>& range, double value) {
      if (!range) range = {value, value};
      range->first = std::min(range->first, value);
      range->second = std::max(range->second, value);
    };
    for (const PlotSeries& series : spec_.series) {
      for (size_t i = 0; i < series.x.size(); ++i) {
        if (!usable(series.x[i], spec_.x_log) || !usable(series.y[i], spec_.y_log)) {
          ++left_out_;
          continue;
        }
        include(x_range, series.x[i]);
        include(y_range, series.y[i]);
        whole_x = whole_x && series.x[i] == std::floor(series.x[i]);
        whole_y = whole_y && series.y[i] == std::floor(series.y[i]);
        if (series.y_error.empty()) continue;
        for (const double end :
             {series.y[i] - series.y_error[i], series.y[i] + series.y_error[i]}) {
          if (usable(end, spec_.y_log)) include(y_range, end);
        }
      }
    }
    empty_ = !x_range;
    x_ = make_axis(spec_.x_log, x_range);
    y_ = make_axis(spec_.y_log, y_range);
    // There is no step 1.5.
    if (whole_x && x_.hi - x_.lo >= 2) x_.least_step = 1;
    if (whole_y && y_.hi - y_.lo >= 2) y_.least_step = 1;
  }

  // Finds the room for everything around the plot, then the ticks that fit.
  void lay_out() {
    const double room = width_ - 2 * kMargin;
    double top = kMargin;
    const auto heading = [&](const std::string& text, double size, size_t lines,
                             const char* attributes, double boldness) {
      for (const Line& line : wrapped(text, size * boldness, room, lines)) {
        top += size * 1.25;
        head_ += text_at(kMargin, top - size * 0.25, size, attributes, xml_of(line));
      }
    };
    heading(spec_.title, kTitleSize, 3, "font-weight=\"bold\"", 1.15);
    heading(spec_.subtitle, kSubtitleSize, 3, "fill=\"#555\"", 1);
    if (top > kMargin) top += 6;
    if (spec_.series.size() > 1) top = lay_out_legend(top);
    top += 6;

    double bottom = kMargin + kTickSize * 1.5;
    if (!spec_.x_label.empty()) bottom += kLabelSize * 1.5;
    if (left_out_ > 0) bottom += kPointLabelSize * 1.5;
    height_ = std::max(height_, top + kLeastPlotHeight + bottom);
    y_.from = height_ - bottom;
    y_.to = top;
    set_ticks(y_, std::max(5, static_cast<int>((y_.from - y_.to) / 42)));
    double widest = 0;
    for (const PlotTick& tick : y_.ticks) {
      widest = std::max(widest, width_of(tick.label, kTickSize));
    }
    x_.from = kMargin + (spec_.y_label.empty() ? 0 : kLabelSize * 1.6) + widest + 7;
    x_.to = width_ - kMargin - 6;
    for (int count = std::max(2, static_cast<int>((x_.to - x_.from) / 60));; --count) {
      set_ticks(x_, count);
      if (count <= 2 || fits_x_ticks()) break;
    }
    if (!x_.ticks.empty()) {  // the last label may reach beyond its tick
      const PlotTick& last = x_.ticks.back();
      const double over =
          x_.position(last.value) + width_of(last.label, kTickSize) / 2 - (width_ - 4);
      if (over > 0) x_.to -= over;
    }
    plot_ = {x_.from, y_.to, x_.to, y_.from};
  }

  bool fits_x_ticks() const {
    double end = -std::numeric_limits<double>::infinity();
    for (const PlotTick& tick : x_.ticks) {
      const double half = width_of(tick.label, kTickSize) / 2;
      const double at = x_.position(tick.value);
      if (at - half < end + 12) return false;
      end = at + half;
    }
    return true;
  }

  std::string series_name(size_t i) const {
    const std::string& label = spec_.series[i].label;
    return label.empty() ? "series " + std::to_string(i + 1) : label;
  }

  double lay_out_legend(double top) {
    constexpr double kRow = kLegendSize * 1.6;
    constexpr double kGap = 22;
    constexpr double kStart = kLegendSample + 7;
    const double room = width_ - 2 * kMargin;
    std::vector<Line> labels;
    double widest = 0;
    double all = 0;
    for (size_t i = 0; i < spec_.series.size(); ++i) {
      labels.push_back(shortened(glyphs_of(series_name(i)), kLegendSize, room - kStart));
      const double needed = kStart + width_of(labels.back(), kLegendSize) + kGap;
      widest = std::max(widest, needed);
      all += needed;
    }
    // In columns, unless one row is enough or there is but one column.
    const double column = all - kGap <= room || 2 * widest - kGap > room ? 0 : widest;
    double x = kMargin;
    double y = top + kRow / 2;
    for (const Line& label : labels) {
      const double needed = kStart + width_of(label, kLegendSize);
      if (x > kMargin && x + needed > width_ - kMargin) {
        x = kMargin;
        y += kRow;
      }
      legend_.push_back({x, y});
      head_ += text_at(x + kStart, y + kLegendSize * 0.36, kLegendSize, "", xml_of(label));
      x += column > 0 ? column : needed + kGap;
    }
    return y + kRow / 2 + 2;
  }

  void place(const PlotSeries& series) {
    DrawnSeries drawn;
    bool broken = true;
    for (size_t i = 0; i < series.x.size(); ++i) {
      if (!usable(series.x[i], spec_.x_log) || !usable(series.y[i], spec_.y_log)) {
        broken = true;
        continue;
      }
      DrawnPoint point = {{x_.position(series.x[i]), y_.position(series.y[i])}, 0, 0, false, i};
      if (!series.y_error.empty() && std::isfinite(series.y_error[i]) && series.y_error[i] > 0) {
        const double low = series.y[i] - series.y_error[i];
        const double high = series.y[i] + series.y_error[i];
        // On a logarithmic axis a bar may reach below every value.
        point.low = usable(low, spec_.y_log) ? y_.position(low) : plot_.bottom;
        point.high = usable(high, spec_.y_log) ? y_.position(high) : plot_.top;
        point.has_bar = true;
      }
      if (broken) drawn.runs.emplace_back();
      broken = false;
      drawn.runs.back().push_back(point);
      ++drawn.points;
    }
    const double room = plot_.right - plot_.left;
    if (series.markers) drawn.radius = static_cast<double>(drawn.points) > room / 10 ? 2 : 4;
    if (series.line) {
      for (const auto& run : drawn.runs) drawn.lines.push_back(thinned(run, room));
    }
    drawn_.push_back(std::move(drawn));
  }

  void draw_frame() {
    const std::string grid = "stroke=\"#e3e3e3\"";
    const std::string light = "stroke=\"#f3f3f3\"";
    for (const double value : x_.minor) {
      head_ += line_at({x_.position(value), plot_.top}, {x_.position(value), plot_.bottom}, light);
    }
    for (const double value : y_.minor) {
      head_ += line_at({plot_.left, y_.position(value)}, {plot_.right, y_.position(value)}, light);
    }
    for (const PlotTick& tick : x_.ticks) {
      const double x = x_.position(tick.value);
      head_ += line_at({x, plot_.top}, {x, plot_.bottom + 4}, grid);
      head_ += text_at(x, plot_.bottom + 5 + kTickSize, kTickSize,
                       "text-anchor=\"middle\" fill=\"#444\"", xml_of(glyphs_of(tick.label)));
    }
    for (const PlotTick& tick : y_.ticks) {
      const double y = y_.position(tick.value);
      head_ += line_at({plot_.left - 4, y}, {plot_.right, y}, grid);
      head_ += text_at(plot_.left - 7, y + kTickSize * 0.36, kTickSize,
                       "text-anchor=\"end\" fill=\"#444\"", xml_of(glyphs_of(tick.label)));
    }
    head_ += "<path d=\"M" + px(plot_.left) + " " + px(plot_.top) + "V" + px(plot_.bottom) + "H" +
             px(plot_.right) + "\" fill=\"none\" stroke=\"#888\"/>\n";
    const double middle_x = (plot_.left + plot_.right) / 2;
    const double middle_y = (plot_.top + plot_.bottom) / 2;
    if (!spec_.x_label.empty()) {
      head_ += text_at(
          middle_x, plot_.bottom + 5 + kTickSize * 1.25 + kLabelSize * 1.2, kLabelSize,
          "text-anchor=\"middle\"",
          xml_of(shortened(glyphs_of(spec_.x_label), kLabelSize, plot_.right - plot_.left)));
    }
    if (!spec_.y_label.empty()) {
      const double x = kMargin + kLabelSize * 0.8;
      head_ += text_at(
          x, middle_y, kLabelSize,
          "text-anchor=\"middle\" transform=\"rotate(-90 " + px(x) + " " + px(middle_y) + ")\"",
          xml_of(shortened(glyphs_of(spec_.y_label), kLabelSize, plot_.bottom - plot_.top)));
    }
    if (empty_) {
      head_ += text_at(middle_x, middle_y, kLabelSize, "text-anchor=\"middle\" fill=\"#777\"",
                       "no points to show");
    }
    if (left_out_ > 0) {
      const bool log = spec_.x_log || spec_.y_log;
      head_ += text_at(
          width_ - kMargin, height_ - 8, kPointLabelSize, "text-anchor=\"end\" fill=\"#777\"",
          with_separators(std::to_string(left_out_)) + (left_out_ == 1 ? " point" : " points") +
              " left out: not finite" + (log ? ", or not positive on a log axis" : ""));
    }
  }

  void draw(size_t index) {
    const PlotSeries& series = spec_.series[index];
    const DrawnSeries& drawn = drawn_[index];
    const Style style = style_of(series, index);
    body_ += "<g>\n";
    for (const std::vector<Point>& line : drawn.lines) {
      if (line.size() == 1 && !series.markers) {  // a line of one point would not show
        body_ += "<circle cx=\"" + px(line[0].x) + "\" cy=\"" + px(line[0].y) +
                 "\" r=\"1.5\" fill=\"" + style.color + "\"/>\n";
        continue;
      }
      if (line.size() < 2) continue;
      body_ += "<polyline fill=\"none\" stroke=\"" + style.color +
               "\" stroke-width=\"1.8\" stroke-linejoin=\"round\"" +
               (style.dash.empty() ? "" : " stroke-dasharray=\"" + style.dash + "\"") +
               " points=\"";
      for (size_t i = 0; i < line.size(); ++i) {
        body_ += (i == 0 ? "" : " ") + px(line[i].x) + "," + px(line[i].y);
      }
      body_ += "\"/>\n";
    }
    for (const auto& run : drawn.runs) {
      for (const DrawnPoint& point : run) {
        if (!point.has_bar) continue;
        const auto& [x, y] = point.at;
        body_ += "<path d=\"M" + px(x) + " " + px(point.low) + "V" + px(point.high) + "M" +
                 px(x - 4) + " " + px(point.low) + "h8M" + px(x - 4) + " " + px(point.high) +
                 "h8\" fill=\"none\" stroke=\"" + style.color + "\" stroke-width=\"1.2\"/>\n";
      }
    }
    for (const auto& run : drawn.runs) {
      for (const DrawnPoint& point : run) {
        if (drawn.radius == 0) continue;
        const std::string shape = marker(style, point.at, drawn.radius);
        const std::string name =
            series.point_labels.empty() ? "" : series.point_labels[point.index];
        if (name.empty()) {
          body_ += shape + "\n";
        } else {
          body_ += "<g><title>" + xml_of(glyphs_of(name)) + ": " + general(series.x[point.index]) +
                   ", " + general(series.y[point.index]) + "</title>" + shape + "</g>\n";
        }
      }
    }
    body_ += "</g>\n";
  }

  // Each label goes to the best free place around its point, farther off with a thin line to it.
  void draw_point_labels() {
    std::vector<Box> taken;  // by markers and by the labels that are placed
    std::vector<Box> placed;
    std::vector<Segment> lines;
    bool any = false;
    for (size_t i = 0; i < drawn_.size(); ++i) {
      const auto& labels = spec_.series[i].point_labels;
      any = any || std::any_of(labels.begin(), labels.end(),
                               [](const std::string& label) { return !label.empty(); });
      const double r = std::max(drawn_[i].radius + 0.5, 1.5);
      for (const auto& run : drawn_[i].runs) {
        for (const DrawnPoint& point : run) {
          const auto& [x, y] = point.at;
          taken.push_back({x - r, y - r, x + r, y + r});
          if (point.has_bar) lines.push_back({{x, point.low}, {x, point.high}});
        }
      }
      for (const auto& line : drawn_[i].lines) {
        for (size_t k = 1; k < line.size(); ++k) lines.push_back({line[k - 1], line[k]});
      }
    }
    if (!any) return;
    std::string leaders;
    std::string texts;
    for (size_t i = 0; i < drawn_.size(); ++i) {
      if (spec_.series[i].point_labels.empty()) continue;
      for (const auto& run : drawn_[i].runs) {
        for (const DrawnPoint& point : run) {
          const std::string& name = spec_.series[i].point_labels[point.index];
          if (name.empty()) continue;
          const Line label =
              shortened(glyphs_of(name), kPointLabelSize, 0.6 * (plot_.right - plot_.left));
          const double w = width_of(label, kPointLabelSize);
          const std::optional<Box> box = free_place(point.at, w, taken, placed, lines);
          if (!box) continue;
          taken.push_back(*box);
          placed.push_back(*box);
          const Point end = box->nearest(point.at);
          if (std::hypot(end.x - point.at.x, end.y - point.at.y) > 13) {
            leaders += line_at(point.at, end, "stroke=\"#999\" stroke-width=\"0.8\"");
            lines.push_back({point.at, end});
          }
          texts += text_at(box->left, box->bottom - kPointLabelSize * 0.28, kPointLabelSize, "",
                           xml_of(label));
        }
      }
    }
    body_ += leaders;
    // The white rim keeps a label readable where a line runs behind it.
    if (!texts.empty()) {
      body_ +=
          "<g fill=\"#333\" stroke=\"#fff\" stroke-width=\"2.5\" stroke-linejoin=\"round\" "
          "paint-order=\"stroke\">\n" +
          texts + "</g>\n";
    }
  }

  std::optional<Box> free_place(Point p, double w, const std::vector<Box>& taken,
                                const std::vector<Box>& labels,
                                const std::vector<Segment>& lines) const {
    constexpr double h = kPointLabelSize * 1.2;
    constexpr int kDirections = 24;
    std::optional<Box> best;
    double best_cost = std::numeric_limits<double>::infinity();
    for (const double distance : {7., 12., 19., 28., 40., 55., 75., 100., 130.}) {
      for (int k = 0; k < kDirections; ++k) {
        // From the right counterclockwise; straight beside, above and below look best.
        const double angle = 2 * 3.14159265358979 * k / kDirections;
        const double ux = std::cos(angle);
        const double uy = -std::sin(angle);
        const double base = distance * 2 + (k % 6 == 0 ? k / 6.0 : 4 + k / 6.0);
        if (base >= best_cost) continue;
        // The middle of the box moves so that the box stays off the point.
        const auto away = [&](double u, double half) {
          return u * distance + std::clamp(1.8 * u, -1., 1.) * half;
        };
        const Point middle = {p.x + away(ux, w / 2), p.y + away(uy, h / 2)};
        const Box box = {middle.x - w / 2, middle.y - h / 2, middle.x + w / 2, middle.y + h / 2};
        if (!plot_.contains(box)) continue;
        const Box padded = {box.left - 1, box.top, box.right + 1, box.bottom};
        if (std::any_of(taken.begin(), taken.end(),
                        [&](const Box& other) { return other.overlaps(padded); })) {
          continue;
        }
        const Segment leader = {p, box.nearest(p)};
        if (distance > 12 && std::any_of(labels.begin(), labels.end(), [&](const Box& other) {
              return crosses(leader, other);
            })) {
          continue;
        }
        double cost = base;
        for (const Segment& line : lines) {
          if (cost >= best_cost) break;
          if (crosses(line, box)) cost += 30;
        }
        if (cost < best_cost) {
          best_cost = cost;
          best = box;
        }
      }
    }
    return best;
  }

  void draw_legend() {
    for (size_t i = 0; i < legend_.size(); ++i) {
      const PlotSeries& series = spec_.series[i];
      const Style style = style_of(series, i);
      const auto& [x, y] = legend_[i];
      if (series.line) {
        body_ +=
            line_at({x, y}, {x + kLegendSample, y},
                    "stroke=\"" + style.color + "\" stroke-width=\"1.8\"" +
                        (style.dash.empty() ? "" : " stroke-dasharray=\"" + style.dash + "\""));
      }
      if (series.markers) body_ += marker(style, {x + kLegendSample / 2, y}, 4) + "\n";
    }
  }

  const PlotSpec& spec_;
  double width_;
  double height_;
  Axis x_;
  Axis y_;
  Box plot_ = {};
  bool empty_ = false;
  size_t left_out_ = 0;
  std::vector<Point> legend_;  // left ends of the samples
  std::vector<DrawnSeries> drawn_;
  std::string head_;
  std::string body_;
};

constexpr const char* kXmlDeclaration = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

void write_svg(const std::filesystem::path& path, const std::string& svg, bool force) {
  AtomicFile file(path, force);
  file.write(svg);
  file.commit();
}

}  // namespace

std::string render_svg(const PlotSpec& spec) {
  check(spec);
  return kXmlDeclaration + Chart(spec).render();
}

std::string render_svg_panels(const std::vector<PlotSpec>& panels) {
  double width = 0;
  double height = 0;
  std::string body;
  for (const PlotSpec& spec : panels) {
    check(spec);
    Chart chart(spec);
    body += chart.render(height);
    width = std::max(width, chart.width());
    height += chart.height();
  }
  const std::string size = "width=\"" + px(width) + "\" height=\"" + px(height) + "\"";
  return std::string(kXmlDeclaration) + "<svg xmlns=\"http://www.w3.org/2000/svg\" " + size +
         ">\n" + body + "</svg>\n";
}

void write_svg_file(const std::filesystem::path& path, const PlotSpec& spec, bool force) {
  write_svg(path, render_svg(spec), force);
}

void write_svg_panels(const std::filesystem::path& path, const std::vector<PlotSpec>& panels,
                      bool force) {
  write_svg(path, render_svg_panels(panels), force);
}

}  // namespace hla
