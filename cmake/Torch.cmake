# LibTorch from the PyPI wheel `torch`, CPU or CUDA, as the target hla_torch.
#
# find_package(Torch) is not used: with a CUDA wheel it demands the CUDA toolkit. The program links
# only libtorch_cpu and libc10, which every wheel has, so that one binary runs with either kind of
# wheel. libtorch_cuda.so is loaded at run time, when a GPU is wanted (src/model/device.cpp).
set(HLA_TORCH_DIR "" CACHE PATH "Folder of the torch wheel (…/site-packages/torch)")
if(NOT HLA_TORCH_DIR)
  set(venv "${CMAKE_CURRENT_SOURCE_DIR}/.venv")
  if(DEFINED ENV{HLA_VENV})
    set(venv "$ENV{HLA_VENV}")
  endif()
  file(GLOB candidates "${venv}/lib/python3*/site-packages/torch")
  list(LENGTH candidates count)
  if(count EQUAL 0)
    message(FATAL_ERROR "no torch wheel under ${venv}: run scripts/setup.sh, or pass -DHLA_TORCH_DIR=…/site-packages/torch")
  endif()
  list(GET candidates 0 HLA_TORCH_DIR)
endif()
if(NOT EXISTS "${HLA_TORCH_DIR}/lib/libtorch_cpu.so")
  message(FATAL_ERROR "HLA_TORCH_DIR=${HLA_TORCH_DIR} has no lib/libtorch_cpu.so")
endif()
file(STRINGS "${HLA_TORCH_DIR}/version.py" version_line REGEX "^__version__ *=")
message(STATUS "LibTorch: ${HLA_TORCH_DIR} (${version_line})")

add_library(hla_torch INTERFACE)
# -idirafter: torch bundles fmt 12, which would otherwise shadow Debian's fmt 9 and break spdlog.
target_compile_options(hla_torch INTERFACE
  "SHELL:-idirafter \"${HLA_TORCH_DIR}/include\""
  "SHELL:-idirafter \"${HLA_TORCH_DIR}/include/torch/csrc/api/include\"")
# at::parallel_for is a template that runs on one thread where it is compiled without OpenMP. The
# library behind it is the one that the wheel brings: a second one would have threads of its own.
target_compile_options(hla_torch INTERFACE -fopenmp)
if(EXISTS "${HLA_TORCH_DIR}/lib/libgomp.so.1")
  target_link_libraries(hla_torch INTERFACE "${HLA_TORCH_DIR}/lib/libgomp.so.1")
else()
  target_link_options(hla_torch INTERFACE -fopenmp)
endif()
target_link_options(hla_torch INTERFACE "LINKER:-rpath,${HLA_TORCH_DIR}/lib")
# libstdc++ comes first: LibTorch exports parts of std::filesystem from the older compiler that
# built the wheel, and the ones that the dynamic linker finds first are used (remove_all crashes).
target_link_libraries(hla_torch INTERFACE
  -Wl,--no-as-needed -lstdc++ -Wl,--as-needed
  "${HLA_TORCH_DIR}/lib/libtorch_cpu.so" "${HLA_TORCH_DIR}/lib/libc10.so")
