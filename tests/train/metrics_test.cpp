#include "hla/train/metrics.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "test_util.h"

namespace hla {
namespace {

using testing::read_file;
using testing::TempDir;

TEST(MetricsTest, GoesOnBehindWhatIsKept) {
  const TempDir folder;
  const auto path = folder / "metrics.jsonl";
  uint64_t kept = 0;
  {
    Metrics metrics(path, 0);
    metrics.add({{"step", 1}, {"loss", 3.5}});
    kept = static_cast<uint64_t>(metrics.bytes());
    metrics.add({{"step", 2}, {"loss", 9.0}});
  }
  Metrics metrics(path, kept);
  metrics.add({{"step", 2}, {"loss", 3.0}});
  EXPECT_EQ(read_file(path), "{\"loss\":3.5,\"step\":1}\n{\"loss\":3.0,\"step\":2}\n");
  ASSERT_EQ(metrics.lines().size(), 2u);
  EXPECT_EQ(metrics.lines()[1]["loss"], 3.0);
}

// As after a power cut.
TEST(MetricsTest, GoesOnBehindWholeLinesOfWhatIsLeft) {
  const TempDir folder;
  const auto path = folder / "metrics.jsonl";
  testing::write_file(path, "{\"step\":1}\n{\"st");
  Metrics metrics(path, 22);
  metrics.add({{"step", 3}});
  EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":3}\n");
  EXPECT_EQ(metrics.lines().size(), 2u);
  std::filesystem::remove(path);
  EXPECT_TRUE(Metrics(path, 22).lines().empty());
}

TEST(MetricsTest, TableHasAColumnForEveryKey) {
  EXPECT_EQ(metrics_csv({{{"step", 0}, {"eval_loss", 2.5}}, {{"step", 1}, {"loss", 2.0}}}),
            "step,eval_loss,loss\n0,2.5,\n1,,2.0\n");
  // What is not finite.
  const std::vector<nlohmann::json> lines = {{{"step", 1}, {"loss", nullptr}},
                                             {{"step", 2}, {"loss", 3.0}}};
  EXPECT_EQ(metrics_csv(lines), "step,loss\n1,\n2,3.0\n");
  EXPECT_EQ(loss_plot(lines, "run").series[0].y, std::vector<double>{3.0});
}

TEST(MetricsTest, PlotHasMeansOfManySteps) {
  std::vector<nlohmann::json> lines = {{{"step", 0}, {"eval_loss", 5.0}}};
  for (int step = 1; step <= 1000; ++step) {
    lines.push_back({{"step", step}, {"loss", step % 2 == 0 ? 1.0 : 3.0}});
  }
  lines.push_back({{"step", 1000}, {"eval_loss", 2.0}});
  const PlotSpec plot = loss_plot(lines, "run");
  ASSERT_EQ(plot.series.size(), 2u);
  EXPECT_EQ(plot.series[0].label, "training, means of 5 steps");
  ASSERT_EQ(plot.series[0].x.size(), 200u);
  EXPECT_DOUBLE_EQ(plot.series[0].x[0], 3);
  EXPECT_DOUBLE_EQ(plot.series[0].y[0], (3 + 1 + 3 + 1 + 3) / 5.0);
  EXPECT_EQ(plot.series[1].x, (std::vector<double>{0, 1000}));
  EXPECT_NE(render_svg(plot).find("nats per token"), std::string::npos);
  EXPECT_TRUE(attention_plot(lines, "run").series.empty());
  lines.push_back({{"step", 1001}, {"attention_error", 0.25}});
  EXPECT_EQ(attention_plot(lines, "run").series.at(0).y, std::vector<double>{0.25});
}

}  // namespace
}  // namespace hla
