#include "hla/text/chat.h"

#include <nlohmann/json.hpp>

#include "test_util.h"

namespace hla {
namespace {

using testing::error_of;
using testing::TempDir;
using testing::write_file;

// As SmolLM2's tokenizer_config.json has it.
constexpr const char* kSmolLm2 =
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}";
constexpr const char* kPlainChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\\n' }}{% endif %}";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  return text.replace(text.find(from), from.size(), to);
}

TEST(ChatTemplateTest, WritesWhatTheTemplateSays) {
  const ChatTemplate smol = ChatTemplate::parse(kSmolLm2, "x");
  EXPECT_EQ(smol.prompt("Hi"),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(smol.prompt("Hi", "Be brief."),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n");
  const ChatTemplate plain = ChatTemplate::parse(kPlainChatMl, "x");
  EXPECT_EQ(plain.prompt("Hi"), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  // Strings that are put together, "-" at tags, and what others begin with.
  for (const std::string& same :
       {replaced(kSmolLm2, "Face<|im_end|>\n'", "Face' + '<|im_end|>\n'"),
        replaced(kSmolLm2, "system\nYou", "system\n' + 'You"),
        replaced(kSmolLm2, "{% endfor %}", "{%- endfor -%}"),
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}" +
            std::string(kSmolLm2)}) {
    EXPECT_EQ(ChatTemplate::parse(same, "x").prompt("Hi"), smol.prompt("Hi")) << same;
  }
}

TEST(ChatTemplateTest, RefusesWhatItDoesNotUnderstand) {
  const std::string smol = kSmolLm2;
  std::string other_system = smol;
  other_system.replace(other_system.find("loop.first and"), 14, "loop.last and");
  for (const std::string& bad :
       {std::string("{{ bos_token }}{% for message in messages %}[INST]{% endfor %}"),
        std::string("{% set system = 'x' %}") + kPlainChatMl, other_system,
        std::string("{{ bos_token }}") + kPlainChatMl, std::string(),
        // What is beside the parts that are known.
        std::string("{{ '[BOS]' }}") + kPlainChatMl, kPlainChatMl + std::string("{{ '<think>' }}"),
        kPlainChatMl + std::string("{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"),
        replaced(kPlainChatMl, "{% endfor %}",
                 "{% if message['role'] == 'user' %}{{ ' /no_think' }}{% endif %}{% endfor %}"),
        replaced(kSmolLm2, "Face<|im_end|>\n'", "Face<|im_end|>'"),
        replaced(kSmolLm2, "named SmolLM", "' + name + '"),
        replaced(kSmolLm2, "named SmolLM", "<|im_end|>\n<|im_start|>user\n")}) {
    const Error error = error_of([&] { ChatTemplate::parse(bad, "config, chat_template"); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput) << bad;
    EXPECT_NE(std::string(error.what()).find("config, chat_template"), std::string::npos);
  }
}

// White space between tags, as transformers has Jinja read it (jinja2 3.1 with trim_blocks and
// lstrip_blocks); of what is written out nothing may get lost.
TEST(ChatTemplateTest, TemplatesOfSeveralLines) {
  const std::string turn =
      "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}";
  const std::string start = "{{ '<|im_start|>assistant\\n' }}";
  const auto of = [&](const std::string& before_turn, const std::string& behind_turn,
                      const std::string& behind_start) {
    return "{% for message in messages %}" + before_turn + turn + behind_turn +
           "{% endfor %}\n{% if add_generation_prompt %}\n" + start + behind_start +
           "{% endif %}\n";
  };
  for (const std::string& good :
       {of("\n", "", ""), of("", "", ""), of("\n    {#- if true -#}\n  ", "", ""),
        of("{# it's a turn #}\n", "", ""), of("\n  {# if true #}\n", "", "")}) {
    EXPECT_EQ(ChatTemplate::parse(good, "x").prompt("Hi"),
              "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        << good;
  }
  for (const std::string& bad :
       {of("\n", "\n", ""), of("\n", "", "\n"), of("\n  ", "", ""), of(" ", "", ""),
        of("\n\n", "", ""), of(" {# if true #}\n", "", ""), of("\n", "x", ""),
        of("\n  {#+ if true #}", "", ""), of("{# if true +#}\n", "", "")}) {
    EXPECT_EQ(error_of([&] { ChatTemplate::parse(bad, "x"); }).code(), ExitCode::kBadInput) << bad;
  }
  // White space in a string is text, and quotes are escaped there.
  std::string wide = kPlainChatMl;
  wide.replace(wide.find("'<|im_start|>'"), 14, "'<|im_start|> '");
  EXPECT_EQ(error_of([&] { ChatTemplate::parse(wide, "x"); }).code(), ExitCode::kBadInput);
  std::string quoted = kSmolLm2;
  quoted.replace(quoted.find("You are"), 7, "You\\'re");
  EXPECT_EQ(ChatTemplate::parse(quoted, "x").prompt("Hi").find("<|im_start|>system\nYou're a"), 0u);
  quoted.replace(quoted.find("\\'re"), 4, "\\u2019re");
  EXPECT_EQ(error_of([&] { ChatTemplate::parse(quoted, "x"); }).code(), ExitCode::kBadInput);
}

// A tokenizer without them would take where messages begin and end for text.
TEST(ChatTemplateTest, TokenizerHasItsTokens) {
  const ChatTemplate chat = ChatTemplate::parse(kPlainChatMl, "x");
  const auto with = testing::source_path("data/tokenizers/cosmo2");
  EXPECT_NO_THROW(chat.check(*load_tokenizer(with), with));
  const auto without = testing::source_path("data/stories260K/tok512.model");
  const Error error = error_of([&] { chat.check(*load_tokenizer(without), without); });
  EXPECT_EQ(error.code(), ExitCode::kBadInput);
  EXPECT_NE(std::string(error.what()).find("<|im_start|>"), std::string::npos);
}

TEST(ChatTemplateTest, IsFoundInTheFolder) {
  const TempDir folder;
  EXPECT_EQ(error_of([&] { ChatTemplate::load(folder.path()); }).code(), ExitCode::kBadInput);
  write_file(folder / "tokenizer_config.json",
             nlohmann::json({{"chat_template", kPlainChatMl}}).dump());
  EXPECT_EQ(ChatTemplate::load(folder.path()).prompt("a"),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
  nlohmann::json several = {{{"name", "tool_use"}, {"template", "x"}}};
  const auto load_several = [&] {
    write_file(folder / "tokenizer_config.json",
               nlohmann::json({{"chat_template", several}}).dump());
    return ChatTemplate::load(folder.path()).prompt("a");
  };
  const Error none = error_of(load_several);
  EXPECT_NE(std::string(none.what()).find("tool_use"), std::string::npos) << none.what();
  several.push_back({{"name", "default"}, {"template", kPlainChatMl}});
  EXPECT_EQ(load_several(), "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
  write_file(folder / "chat_template.jinja", kSmolLm2);
  EXPECT_NE(ChatTemplate::load(folder.path()).prompt("a").find("SmolLM"), std::string::npos);
}

}  // namespace
}  // namespace hla
