// Version of the program, stamped at build time (cmake/stamp_version.cmake).
#pragma once

namespace hla {

const char* version();             // "0.1.0"
const char* version_commit();      // "1a2b3c4d5e6f", "…-dirty" or "unknown"
const char* version_build_type();  // "Release"

}  // namespace hla
