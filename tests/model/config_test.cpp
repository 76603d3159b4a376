#include "hla/model/config.h"

#include "test_util.h"

namespace hla {
namespace {

using nlohmann::json;
using testing::error_of;

json good() {
  return {{"model_type", "llama"},  {"hidden_size", 32},        {"intermediate_size", 40},
          {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"vocab_size", 96}};
}

std::string message_of(const json& config) {
  const Error error = error_of([&] { parse_model_config(config, "config.json"); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  return error.what();
}

TEST(ModelConfigTest, DefaultsAreThoseOfTransformers) {
  const ModelConfig config = parse_model_config(good(), "config.json");
  EXPECT_EQ(config.num_key_value_heads, 4);
  EXPECT_EQ(config.head_dim, 8);
  EXPECT_EQ(config.max_position_embeddings, 2048);
  EXPECT_DOUBLE_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_DOUBLE_EQ(config.rope.theta, 10000.0);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_FALSE(config.attention_bias);
  EXPECT_EQ(config.hidden_act, Activation::kSilu);
  EXPECT_EQ(config.cache_bytes_per_token(4), 2 * 2 * 4 * 8 * 4);
}

TEST(ModelConfigTest, ReadsBothRopeStyles) {
  json old_style = good();
  old_style["rope_theta"] = 5e5;
  old_style["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  json new_style = good();
  new_style["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 5e5}};
  for (const json& text : {old_style, new_style}) {
    const ModelConfig config = parse_model_config(text, "config.json");
    EXPECT_EQ(config.rope.type, RopeType::kLinear);
    EXPECT_DOUBLE_EQ(config.rope.factor, 2.0);
    EXPECT_DOUBLE_EQ(config.rope.theta, 5e5);
  }
}

// Where transformers reads them, too.
TEST(ModelConfigTest, ReadsRopeKeysWhereverTheyStand) {
  json config = good();
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 500.0}};
  EXPECT_DOUBLE_EQ(parse_model_config(config, "config.json").rope.theta, 500.0);
  config["rope_scaling"] = {{"type", "default"}, {"rope_theta", 500.0}};
  EXPECT_DOUBLE_EQ(parse_model_config(config, "config.json").rope.theta, 500.0);
  // Both styles that say the same.
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 500.0}};
  EXPECT_DOUBLE_EQ(parse_model_config(config, "config.json").rope.theta, 500.0);

  config = good();
  config["original_max_position_embeddings"] = 64;
  config["rope_parameters"] = {{"rope_type", "yarn"}, {"factor", nullptr}, {"rope_theta", 1e4}};
  const RopeConfig rope = parse_model_config(config, "config.json").rope;
  EXPECT_EQ(rope.original_max_position_embeddings, 64);
  EXPECT_DOUBLE_EQ(rope.factor, 2048.0 / 64);
  config["rope_parameters"]["rope_type"] = "linear";
  EXPECT_NE(message_of(config).find("factor: missing"), std::string::npos);
}

TEST(ModelConfigTest, ReadsLongrope) {
  json config = good();
  config["max_position_embeddings"] = 256;
  json& rope = config["rope_parameters"];
  rope = {{"rope_type", "longrope"},
          {"rope_theta", 1e4},
          {"short_factor", {1, 1.5, 2, 3}},
          {"long_factor", {1.0, 4.0, 9.0, 16.0}},
          {"original_max_position_embeddings", 64}};
  const auto read = [&] { return parse_model_config(config, "config.json").rope; };
  EXPECT_EQ(read().short_factor, (std::vector<double>{1, 1.5, 2, 3}));
  EXPECT_EQ(read().long_factor, (std::vector<double>{1, 4, 9, 16}));
  EXPECT_DOUBLE_EQ(read().factor, 4.0);  // of the positions
  EXPECT_FALSE(read().attention_factor);
  rope["original_max_position_embeddings"] = 512;
  EXPECT_DOUBLE_EQ(read().factor, 1.0);
  rope.erase("original_max_position_embeddings");
  EXPECT_EQ(read().original_max_position_embeddings, 256);
  rope["factor"] = 2.0;
  rope["attention_factor"] = 1.5;
  EXPECT_DOUBLE_EQ(read().factor, 2.0);
  EXPECT_DOUBLE_EQ(read().attention_factor.value(), 1.5);

  rope["original_max_position_embeddings"] = 1;
  EXPECT_NO_THROW(read());
  rope.erase("attention_factor");  // its default divides by the positions' logarithm
  EXPECT_NE(message_of(config).find("above 1"), std::string::npos);
  rope["original_max_position_embeddings"] = 64;
  for (const json& factors :
       {json(), json(2.0), json::array(), json::array({1, 2, 3}), json::array({1, 2, 3, 4, 5}),
        json::array({1, 2, 3, 0}), json::array({1, 2, 3, "4"})}) {
    for (const char* key : {"short_factor", "long_factor"}) {
      json changed = config;
      changed["rope_parameters"][key] = factors;
      EXPECT_NE(message_of(changed).find("expected " + std::string(key) + " of 4"),
                std::string::npos)
          << factors;
    }
  }
}

TEST(ModelConfigTest, CollectsEveryProblem) {
  json config = good();
  config.erase("vocab_size");
  config["hidden_size"] = -1;
  config["rms_norm_eps"] = "small";
  config["hidden_act"] = "mish";
  const std::string message = message_of(config);
  for (const char* part : {"vocab_size: missing", "hidden_size", "rms_norm_eps", "mish"}) {
    EXPECT_NE(message.find(part), std::string::npos) << part << " in " << message;
  }
}

TEST(ModelConfigTest, RefusesContradictions) {
  json config = good();
  config["num_key_value_heads"] = 3;
  EXPECT_NE(message_of(config).find("not a multiple of num_key_value_heads"), std::string::npos);
  config = good();
  config["hidden_size"] = 30;
  EXPECT_NE(message_of(config).find("head_dim is absent"), std::string::npos);
  config = good();
  config["head_dim"] = 7;
  EXPECT_NE(message_of(config).find("even number"), std::string::npos);
  config = good();
  config["num_attention_heads"] = 1 << 20;
  config["num_key_value_heads"] = 1 << 20;
  config["head_dim"] = 1 << 20;
  EXPECT_NE(message_of(config).find("at most 2^28"), std::string::npos);
  config = good();
  config["vocab_size"] = int64_t{1} << 31;  // two such are more bytes than there are numbers for
  EXPECT_NE(message_of(config).find("vocab_size"), std::string::npos);
  config = good();
  config["rope_theta"] = 1e4;
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 1e5}};
  EXPECT_NE(message_of(config).find("contradicts"), std::string::npos);
  config = good();
  config["rope_theta"] = 1e4;
  config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 2.0}, {"rope_theta", 500.0}};
  EXPECT_NE(message_of(config).find("in rope_scaling"), std::string::npos);
  config = good();
  config["rope_scaling"] = {{"type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 64}};
  config["rope_parameters"] = config["rope_scaling"];
  EXPECT_NO_THROW(parse_model_config(config, "config.json"));
  config["rope_parameters"]["high_freq_factor"] = 2.0;
  EXPECT_NE(message_of(config).find("contradicts rope_parameters"), std::string::npos);
  config.erase("rope_parameters");
  config["original_max_position_embeddings"] = 128;
  EXPECT_NE(message_of(config).find("128 contradicts 64"), std::string::npos);
  config = good();
  config["rope_scaling"] = {{"rope_type", "su"}, {"factor", 2}};
  EXPECT_NE(message_of(config).find("got su"), std::string::npos);
}

TEST(ModelConfigTest, RefusesOtherArchitecturesByName) {
  json config = good();
  for (const char* type : {"mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "mixtral",
                           "deepseek_v3", "llama4", "gpt_neox", "mamba"}) {
    config["model_type"] = type;
    EXPECT_NE(message_of(config).find("got \"" + std::string(type) + "\""), std::string::npos);
  }
  EXPECT_NE(message_of(json::object()).find("model_type"), std::string::npos);
  EXPECT_NE(message_of(json::array()).find("expected an object"), std::string::npos);
}

TEST(ModelConfigTest, RefusesUnsupportedFeaturesByName) {
  const std::vector<std::pair<std::string, json>> features = {
      {"quantization_config", {{"quant_method", "gptq"}, {"bits", 4}}},
      {"sliding_window", 4096},
      {"attention_chunk_size", 8192},
      {"layer_types", {"full_attention", "sliding_attention"}},
      {"partial_rotary_factor", 0.5},
      {"rope_parameters", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}}}};
  for (const auto& [key, value] : features) {
    json config = good();
    config[key] = value;
    const std::string name = key == "rope_parameters" ? "partial_rotary_factor" : key;
    EXPECT_NE(message_of(config).find(name + ": "), std::string::npos) << key;
  }
}

TEST(ModelConfigTest, AcceptsFeaturesThatAreOff) {
  json config = good();
  config["quantization_config"] = nullptr;
  config["sliding_window"] = 4096;
  config["use_sliding_window"] = false;
  config["layer_types"] = {"full_attention", "full_attention"};
  config["partial_rotary_factor"] = 1.0;
  config["pretraining_tp"] = 2;  // the same product in slices
  EXPECT_NO_THROW(parse_model_config(config, "config.json"));
}

TEST(ModelConfigTest, HlaRoundTrip) {
  ModelConfig config = parse_model_config(good(), "config.json");
  HlaLayerConfig layer;
  layer.fast_frequencies = 2;
  layer.k_ranks = {3, 1};
  layer.kv_rank = 10;
  HlaLayerConfig other = layer;
  other.k_ranks = {4, 0};
  other.kv_rank = 6;
  config.hla = HlaConfig{HlaRope::kLatent, 1.0, {layer, other}};
  const json text = hla_config_json(config);
  EXPECT_EQ(text["model_type"], "hla");
  const ModelConfig again = parse_model_config(text, "config.json");
  ASSERT_TRUE(again.hla);
  EXPECT_EQ(again.hla->layers[0].k_ranks, layer.k_ranks);
  EXPECT_EQ(again.cache_floats(0), 18);
  EXPECT_EQ(again.cache_floats(1), 14);
  EXPECT_EQ(again.cache_bytes_per_token(2), 64);
  EXPECT_EQ(again.base_cache_bytes_per_token(2), 2 * 2 * 4 * 8 * 2);

  EXPECT_FALSE(text["hla"].contains("latent_bias"));
  for (const bool attention_bias : {false, true}) {
    json biased = text;
    biased["attention_bias"] = attention_bias;
    const auto parse = [&] { return parse_model_config(biased, "config.json"); };
    EXPECT_EQ(parse().latent_bias(), attention_bias);
    EXPECT_EQ(parse().output_bias(), attention_bias);
    biased["hla"]["latent_bias"] = !attention_bias;
    EXPECT_EQ(parse().latent_bias(), !attention_bias);
    EXPECT_EQ(parse().output_bias(), attention_bias);
    biased["hla"]["output_bias"] = !attention_bias;
    EXPECT_EQ(parse().output_bias(), !attention_bias);
    EXPECT_EQ(hla_config_json(parse()), biased);
  }

  json damaged = text;
  damaged["hla"]["output_bias"] = "yes";
  EXPECT_NE(message_of(damaged).find("output_bias"), std::string::npos);
  damaged = text;
  damaged["hla"]["layers"][1]["k_ranks"] = {5, 0};  // more than K
  EXPECT_NE(message_of(damaged).find("layers[1].k_ranks"), std::string::npos);
  damaged = text;
  damaged["hla"]["layers"].erase(0);
  EXPECT_NE(message_of(damaged).find("array of 2 layers"), std::string::npos);
  damaged = text;
  damaged["hla"]["format_version"] = 9;
  damaged["hla"]["rope"] = "spiral";
  EXPECT_NE(message_of(damaged).find("spiral"), std::string::npos);
  EXPECT_NE(message_of(damaged).find("format_version"), std::string::npos);
}

}  // namespace
}  // namespace hla
