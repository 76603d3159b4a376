#include "hla/factorize/transformers_files.h"

#include <nlohmann/json.hpp>

#include "hla/io/atomic_file.h"
#include "hla/io/json_file.h"
#include "hla/model/save.h"

namespace hla {
namespace {

void write_transformers_files(const std::filesystem::path& folder, nlohmann::json& config) {
  for (const EmbeddedFile& embedded : transformers_files()) {
    AtomicFile file(folder / embedded.name, /*force=*/false);
    file.write(embedded.text);
    file.commit();
  }
  config["auto_map"] = {{"AutoConfig", "configuration_hla.HlaConfig"},
                        {"AutoModel", "modeling_hla.HlaModel"},
                        {"AutoModelForCausalLM", "modeling_hla.HlaForCausalLM"}};
}

}  // namespace

void write_model_files(const Checkpoint& origin, nlohmann::json config,
                       const std::filesystem::path& folder) {
  copy_side_files(origin, folder);
  if (config.value("model_type", "") == "hla") write_transformers_files(folder, config);
  write_json_file(folder / "config.json", config, /*force=*/false);
}

}  // namespace hla
