// The subcommands of `hla`. Each add_… registers one; its callback parses, validates, makes one
// library call and prints.
#pragma once

#include <CLI/CLI.hpp>

namespace hla::tools {

void add_bench(CLI::App& app);
void add_convert(CLI::App& app);
void add_finetune(CLI::App& app);
void add_generate(CLI::App& app);
void add_info(CLI::App& app);
void add_ppl(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_transfer(CLI::App& app);

}  // namespace hla::tools
