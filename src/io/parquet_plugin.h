// The C interface between src/io/parquet.cpp and the library libhla_parquet.so, which alone links
// Arrow. No exception passes through it in either direction.
#pragma once

#include <cstddef>

extern "C" {

struct HlaParquetCallbacks {
  void* context;
  // One value; false stops the reading.
  bool (*row)(void* context, const char* data, size_t size);
  // What is wrong with the file, without its path. Called at most once, at the end.
  void (*fail)(void* context, const char* message);
};

enum HlaParquetStatus { kHlaParquetDone = 0, kHlaParquetStopped = 1, kHlaParquetFailed = 2 };

int hla_parquet_read(const char* path, const char* column, const HlaParquetCallbacks* callbacks);
}

// Changes with the interface; the name of a symbol, so that a stale library is noticed.
#define HLA_PARQUET_SYMBOL "hla_parquet_read"
