# Writes OUTPUT, which holds the Python files of FOLDER: `hla convert` puts them beside the weights and
# must not need a data directory for it.
file(GLOB paths "${FOLDER}/*.py")
set(entries "")
foreach(path IN LISTS paths)
  get_filename_component(name "${path}" NAME)
  file(READ "${path}" text)
  string(APPEND entries "    {\"${name}\", R\"_PY_(${text})_PY_\"},\n")
endforeach()
file(WRITE ${OUTPUT} "#include \"hla/factorize/transformers_files.h\"

namespace hla {

const std::vector<EmbeddedFile>& transformers_files() {
  static const std::vector<EmbeddedFile> files = {
${entries}  };
  return files;
}

}  // namespace hla
")
