// The README.md of a converted folder.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace hla {

// Markdown for people who find the folder: what it is made of, how, its sizes and errors by layer.
// `report` is the content of hla_report.json.
std::string model_card(const nlohmann::json& report);

}  // namespace hla
