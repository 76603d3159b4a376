# Arrow C++ from the PyPI wheel `pyarrow`, as the target hla_arrow; HLA_HAVE_ARROW says whether it is
# there. Optional: a build without it cannot read Parquet files.
set(HLA_ARROW_DIR "" CACHE PATH "Folder of the pyarrow wheel (…/site-packages/pyarrow)")
set(HLA_WITH_PARQUET AUTO CACHE STRING "Read Parquet files: AUTO (where pyarrow is there), ON, OFF")
set_property(CACHE HLA_WITH_PARQUET PROPERTY STRINGS AUTO ON OFF)

set(HLA_HAVE_ARROW OFF)
if(HLA_WITH_PARQUET)  # AUTO is true as well
  if(NOT HLA_ARROW_DIR)
    # The environment that torch is in.
    get_filename_component(HLA_ARROW_DIR "${HLA_TORCH_DIR}/../pyarrow" ABSOLUTE)
  endif()
  # The wheel has no plain .so names to link.
  file(GLOB arrow_library "${HLA_ARROW_DIR}/libarrow.so.*")
  file(GLOB parquet_library "${HLA_ARROW_DIR}/libparquet.so.*")
  list(LENGTH arrow_library arrow_count)
  list(LENGTH parquet_library parquet_count)
  if(arrow_count EQUAL 1 AND parquet_count EQUAL 1
     AND EXISTS "${HLA_ARROW_DIR}/include/parquet/file_reader.h")
    set(HLA_HAVE_ARROW ON)
    file(STRINGS "${HLA_ARROW_DIR}/include/arrow/util/config.h" version_line
      REGEX "define ARROW_VERSION_STRING")
    string(REGEX MATCH "[0-9][0-9.]*" version "${version_line}")
    message(STATUS "Parquet: Arrow C++ ${version} of ${HLA_ARROW_DIR}")
    add_library(hla_arrow INTERFACE)
    target_compile_options(hla_arrow INTERFACE "SHELL:-idirafter \"${HLA_ARROW_DIR}/include\"")
    target_link_options(hla_arrow INTERFACE "LINKER:-rpath,${HLA_ARROW_DIR}")
    target_link_libraries(hla_arrow INTERFACE "${parquet_library}" "${arrow_library}")
  elseif(HLA_WITH_PARQUET STREQUAL "AUTO")
    message(STATUS "Parquet: not supported by this build, no pyarrow wheel at ${HLA_ARROW_DIR} "
      "(scripts/setup.sh installs it; or pass -DHLA_ARROW_DIR=…/site-packages/pyarrow)")
  else()
    message(FATAL_ERROR "HLA_WITH_PARQUET=${HLA_WITH_PARQUET}, but ${HLA_ARROW_DIR} does not hold "
      "one libarrow.so.*, one libparquet.so.* and include/parquet: run scripts/setup.sh, or pass "
      "-DHLA_ARROW_DIR=…/site-packages/pyarrow")
  endif()
else()
  message(STATUS "Parquet: not supported by this build, HLA_WITH_PARQUET=${HLA_WITH_PARQUET}")
endif()
