// Standard input.
#pragma once

#include <string>

namespace hla {

// All of it, to its end. Throws when the process is interrupted meanwhile (core/interrupt.h), and
// kRuntime with the system's reason where it cannot be read.
std::string read_standard_input();

}  // namespace hla
