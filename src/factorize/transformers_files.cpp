#include "hla/factorize/transformers_files.h"

#include <nlohmann/json.hpp>

#include "hla/io/atomic_file.h"

namespace hla {

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

}  // namespace hla
