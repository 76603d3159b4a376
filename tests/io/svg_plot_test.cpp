// Charts: the ticks, what is refused and left out, and that the document is XML whatever the texts.
#include "hla/io/svg_plot.h"

#include <cmath>
#include <limits>
#include <set>

#include "test_util.h"

namespace hla {
namespace {

using detail::linear_ticks;
using detail::log_ticks;
using detail::PlotTick;
using testing::error_of;
using testing::read_file;
using testing::TempDir;

std::vector<std::string> labels_of(const std::vector<PlotTick>& ticks) {
  std::vector<std::string> labels;
  for (const PlotTick& tick : ticks) labels.push_back(tick.label);
  return labels;
}
using Labels = std::vector<std::string>;

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t i = text.find(part); i != std::string::npos; i = text.find(part, i + 1)) ++found;
  return found;
}

// Every tag that is opened is closed in order, and no text holds what must be escaped.
void expect_balanced(const std::string& svg) {
  std::vector<std::string> open;
  for (size_t i = svg.find('<'); i != std::string::npos; i = svg.find('<', i + 1)) {
    const size_t end = svg.find('>', i);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = svg.substr(i + 1, end - i - 1);
    if (tag.starts_with('?')) continue;
    if (tag.starts_with('/')) {
      ASSERT_FALSE(open.empty());
      EXPECT_EQ(tag.substr(1), open.back());
      open.pop_back();
    } else if (!tag.ends_with('/')) {
      open.push_back(tag.substr(0, tag.find(' ')));
    }
  }
  EXPECT_TRUE(open.empty());
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
}

PlotSpec simple() {
  PlotSpec spec;
  spec.title = "title";
  spec.series = {{.label = "a", .x = {1, 2, 3}, .y = {4, 5, 6}}};
  return spec;
}

TEST(LinearTicksTest, RoundSteps) {
  EXPECT_EQ(labels_of(linear_ticks(0, 10, 6)), (Labels{"0", "2", "4", "6", "8", "10"}));
  EXPECT_EQ(labels_of(linear_ticks(-0.26, 0.26, 6)), (Labels{"−0.2", "−0.1", "0.0", "0.1", "0.2"}));
  EXPECT_EQ(labels_of(linear_ticks(0, 23040, 6)),
            (Labels{"0", "5,000", "10,000", "15,000", "20,000"}));
  EXPECT_EQ(labels_of(linear_ticks(21.6299, 21.6342, 6)),
            (Labels{"21.630", "21.631", "21.632", "21.633", "21.634"}));
  EXPECT_EQ(labels_of(linear_ticks(0, 3e9, 4)), (Labels{"0", "1G", "2G", "3G"}));
  EXPECT_EQ(labels_of(linear_ticks(0, 1.6e6, 5)), (Labels{"0", "0.5M", "1.0M", "1.5M"}));
  EXPECT_EQ(labels_of(linear_ticks(0, 6e-5, 4)), (Labels{"0", "2e-5", "4e-5", "6e-5"}));
  EXPECT_EQ(labels_of(linear_ticks(1, 4, 9, /*least_step=*/1)), (Labels{"1", "2", "3", "4"}));
}

TEST(LinearTicksTest, LabelsDifferAndLieWithin) {
  const std::vector<std::pair<double, double>> ranges = {
      {-1e300, 1e300},  {1e9, 1e9 + 3}, {1, 1 + 1e-8},     {-7e-12, 3e-13}, {1e-290, 3e-290},
      {123456, 123457}, {-5e6, 12},     {999999, 1000001}, {0, 1}};
  for (const auto& [lo, hi] : ranges) {
    for (const int most : {5, 8, 13}) {
      const std::vector<PlotTick> ticks = linear_ticks(lo, hi, most);
      EXPECT_GE(ticks.size(), 2u) << lo << " " << hi;
      EXPECT_LE(ticks.size(), static_cast<size_t>(most)) << lo << " " << hi;
      const Labels labels = labels_of(ticks);
      EXPECT_EQ(std::set<std::string>(labels.begin(), labels.end()).size(), labels.size())
          << lo << " " << hi << " " << labels.front();
      const double slack = 1e-8 * (hi - lo);
      for (const PlotTick& tick : ticks) {
        EXPECT_GE(tick.value, lo - slack);
        EXPECT_LE(tick.value, hi + slack);
      }
    }
  }
}

TEST(LogTicksTest, DecadesOrTheirParts) {
  EXPECT_EQ(labels_of(log_ticks(0.01, 1000, 8)),
            (Labels{"0.01", "0.1", "1", "10", "100", "1,000"}));
  EXPECT_EQ(labels_of(log_ticks(100, 9000, 8)),
            (Labels{"100", "200", "500", "1,000", "2,000", "5,000"}));
  EXPECT_EQ(labels_of(log_ticks(1e-12, 1e12, 9)),
            (Labels{"1e-12", "1e-9", "1e-6", "0.001", "1", "1,000", "1M", "1G", "1T"}));
  // Within a decade as on a linear axis.
  EXPECT_EQ(labels_of(log_ticks(21, 48, 6)), (Labels{"25", "30", "35", "40", "45"}));
}

TEST(SvgPlotTest, DrawsEachPointOnce) {
  PlotSpec spec = simple();
  const std::string one = render_svg(spec);
  expect_balanced(one);
  EXPECT_EQ(count(one, "<circle"), 3u);
  EXPECT_EQ(count(one, "<polyline"), 1u);
  EXPECT_NE(one.find("viewBox=\"0 0 800 500\""), std::string::npos);
  EXPECT_EQ(one.find(">a<"), std::string::npos);  // no legend for one series
  EXPECT_EQ(one, render_svg(spec));
  spec.series.push_back({.label = "b", .x = {1, 2}, .y = {4, 9}, .y_error = {0.5, 1}});
  const std::string two = render_svg(spec);
  expect_balanced(two);
  EXPECT_NE(two.find(">a<"), std::string::npos);
  EXPECT_NE(two.find(">b<"), std::string::npos);
}

TEST(SvgPlotTest, TextsAreEscaped) {
  PlotSpec spec = simple();
  const std::string nasty = "<b> & \"q\" 'r' \x01 \xFF\xC3 \xED\xA0\x80 é 日\n2";
  const std::string escaped =
      "&lt;b&gt; &amp; &quot;q&quot; &#39;r&#39; \uFFFD \uFFFD\uFFFD \uFFFD é 日 2";
  spec.title = spec.subtitle = spec.x_label = spec.y_label = nasty;
  spec.series[0].label = nasty;
  spec.series[0].point_labels = {nasty, "", ""};
  spec.series.push_back(spec.series[0]);
  const std::string svg = render_svg(spec);
  expect_balanced(svg);
  // Document title, heading, subtitle, two axes, two legends, two labels and two tooltips.
  EXPECT_EQ(count(svg, escaped), 11u) << svg;
  EXPECT_EQ(svg.find("<b>"), std::string::npos);
}

TEST(SvgPlotTest, PointsThatCannotBeDrawnAreLeftOut) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInf = std::numeric_limits<double>::infinity();
  PlotSpec spec = simple();
  spec.series[0] = {
      .x = {1, 2, 3, kInf, 5, 6}, .y = {1, 2, kNan, 4, 5, -6}, .y_error = {kNan, kInf, 1, 1, 1, 1}};
  const std::string svg = render_svg(spec);
  expect_balanced(svg);
  EXPECT_EQ(count(svg, "<circle"), 4u);
  EXPECT_EQ(count(svg, "<polyline"), 2u);  // broken at the gap
  EXPECT_NE(svg.find("2 points left out"), std::string::npos);
  spec.y_log = true;
  const std::string log = render_svg(spec);
  expect_balanced(log);
  EXPECT_EQ(count(log, "<circle"), 3u);
  EXPECT_NE(log.find("3 points left out"), std::string::npos);
  EXPECT_EQ(render_svg(simple()).find("left out"), std::string::npos);
}

TEST(SvgPlotTest, DegenerateData) {
  for (const bool log : {false, true}) {
    for (const std::vector<double>& values : {std::vector<double>{},
                                              {5},
                                              {0},
                                              {-3, -3},
                                              {7, 7, 7},
                                              {1e-320, 2e-320},
                                              {-1e308, 1e308},
                                              {1e270, 1e-270},
                                              {1, std::nextafter(1.0, 2.0)}}) {
      PlotSpec spec;
      spec.x_log = spec.y_log = log;
      spec.series = {{.x = values, .y = values}, {.x = values, .y = values, .markers = false}};
      expect_balanced(render_svg(spec));
    }
  }
  const std::string empty = render_svg({});
  expect_balanced(empty);
  EXPECT_NE(empty.find("no points"), std::string::npos);
}

// Boxes as the program estimates them cannot be seen from outside; coordinates of the texts can.
TEST(SvgPlotTest, LabelsOfOnePlaceDoNotShareIt) {
  PlotSpec spec = simple();
  spec.series[0] = {.x = {1, 1, 1, 2}, .y = {1, 1, 1, 2}, .point_labels = {"l1", "l2", "l3", "l4"}};
  const std::string svg = render_svg(spec);
  std::set<std::string> places;
  for (const char* label : {">l1<", ">l2<", ">l3<", ">l4<"}) {
    const size_t end = svg.find(label, svg.find("paint-order"));
    ASSERT_NE(end, std::string::npos) << label;
    const size_t begin = svg.rfind("<text", end);
    places.insert(svg.substr(begin, svg.find("font-size", begin) - begin));
  }
  EXPECT_EQ(places.size(), 4u);
}

TEST(SvgPlotTest, LongCurvesAreThinned) {
  PlotSpec spec = simple();
  // The second is as high as the peak, so that the axis is without it.
  spec.series = {{.markers = false}, {.x = {0, 1}, .y = {100, 100}}};
  PlotSeries& series = spec.series[0];
  for (int i = 0; i < 100000; ++i) {
    series.x.push_back(i);
    series.y.push_back(i == 54321 ? 100 : std::sin(i));
  }
  const std::string svg = render_svg(spec);
  EXPECT_LT(svg.size(), 100'000u);
  series.y[54321] = 0;
  EXPECT_NE(svg, render_svg(spec));  // the lonely peak was kept
}

TEST(SvgPlotTest, RefusesWhatDoesNotFit) {
  PlotSpec spec = simple();
  spec.width = 3;
  spec.series[0].y.pop_back();
  spec.series[0].y_error = {1};
  spec.series[0].point_labels = {"a", "b"};
  const Error error = error_of([&] { render_svg(spec); });
  EXPECT_EQ(error.code(), ExitCode::kUsage);
  for (const char* part : {"width", "series 1 (a): y: expected 3", "y_error", "point_labels"}) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
  spec = simple();
  spec.series[0].y_error = {1, -1, 1};
  EXPECT_EQ(error_of([&] { render_svg(spec); }).code(), ExitCode::kUsage);
}

TEST(SvgPlotTest, PanelsStandOneBelowTheOther) {
  PlotSpec second = simple();
  second.width = simple().width + 50;
  second.title = "The second";
  const std::string svg = render_svg_panels({simple(), second});
  expect_balanced(svg);
  EXPECT_EQ(count(svg, "<?xml"), 1u);
  EXPECT_EQ(count(svg, "<svg"), 3u);
  EXPECT_EQ(count(svg, " y=\"" + std::to_string(simple().height) + "\" width"), 1u);
  EXPECT_EQ(count(svg, "width=\"" + std::to_string(second.width) + "\" height=\"" +
                           std::to_string(2 * simple().height) + "\">"),
            1u);
  EXPECT_NE(svg.find("The second"), std::string::npos);
}

TEST(SvgPlotTest, FilesAreReplacedOnlyByForce) {
  const TempDir folder;
  write_svg_file(folder / "p.svg", simple(), false);
  EXPECT_EQ(read_file(folder / "p.svg"), render_svg(simple()));
  EXPECT_EQ(error_of([&] { write_svg_file(folder / "p.svg", simple(), false); }).code(),
            ExitCode::kUsage);
  write_svg_file(folder / "p.svg", simple(), true);
}

}  // namespace
}  // namespace hla
