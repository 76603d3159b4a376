#include "hla/factorize/conversion_report.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "test_util.h"

namespace hla {
namespace {

using ::testing::DoubleEq;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

ConvertReport report() {
  ConvertReport report;
  report.hla.hla = HlaConfig{HlaRope::kLatent, 1.0, {}};
  for (int64_t i = 0; i < 3; ++i) {
    LayerReport layer;
    layer.config.fast_frequencies = 2;
    layer.config.k_ranks = {4, i};
    layer.config.kv_rank = 10;
    layer.key_error = 0.1;
    layer.value_error = 0.2 + 0.01 * static_cast<double>(i);
    layer.attention_output_error = 0.05;
    layer.calibration_perplexity = 20 + i;
    layer.seconds = 1.5;
    report.layers.push_back(layer);
  }
  return report;
}

TEST(ConversionReportTest, LayerIsTheSameAfterJson) {
  LayerReport layer = report().layers[2];
  layer.value_error = 0.1 + 0.2;  // needs all 17 digits
  EXPECT_EQ(to_json(layer_report_from_json(nlohmann::json::parse(to_json(layer).dump()))),
            to_json(layer));
  LayerReport real;
  real.config.k_rank = 7;
  EXPECT_EQ(layer_report_from_json(to_json(real)).config.k_rank, 7);
  EXPECT_FALSE(layer_report_from_json(to_json(real)).attention_output_error);
}

TEST(ConversionReportTest, TableHasALinePerLayer) {
  const std::string table = report().layer_table();
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 4) << table;
  EXPECT_THAT(table, HasSubstr("4 2"));      // ranks by frequency
  EXPECT_THAT(table, HasSubstr("22.00 %"));  // values of layer 2
  EXPECT_THAT(table, HasSubstr("21.000"));   // perplexity after layer 1
  EXPECT_THAT(table, Not(HasSubstr("q rank")));
}

TEST(ConversionReportTest, PlotsErrorsAndRanks) {
  const std::vector<PlotSpec> latent = report().to_plot();
  ASSERT_EQ(latent.size(), 3u);            // the layers' ranks differ
  ASSERT_EQ(latent[0].series.size(), 3u);  // no queries: they are whole
  EXPECT_THAT(latent[0].series[1].y, ElementsAre(DoubleEq(20), DoubleEq(21), DoubleEq(22)));
  EXPECT_THAT(latent[0].series[2].y, ElementsAre(5, 5, 5));
  ASSERT_EQ(latent[1].series.size(), 3u);
  EXPECT_THAT(latent[1].series[0].y, ElementsAre(4, 2));  // most, of two frequencies
  EXPECT_THAT(latent[1].series[1].y, ElementsAre(4, 1));
  EXPECT_THAT(latent[1].series[2].y, ElementsAre(4, 0));
  EXPECT_EQ(latent[2].title, "Rank by layer");
  ConvertReport alike = report();
  for (LayerReport& layer : alike.layers) layer.config.k_ranks = {4, 1};
  EXPECT_EQ(alike.to_plot().size(), 2u);
  ConvertReport original = report();
  original.hla.hla->rope = HlaRope::kOriginal;
  const PlotSpec ranks = original.to_plot()[1];
  EXPECT_EQ(ranks.series.back().label, "kv latent");
  EXPECT_THAT(ranks.series.back().y, ElementsAre(10, 10, 10));
  EXPECT_THAT(render_svg_panels(original.to_plot()), HasSubstr("Error by layer"));
}

}  // namespace
}  // namespace hla
