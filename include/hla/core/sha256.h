// SHA-256 (FIPS 180-4) of texts, so that a result can say what exactly it was measured on.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

struct evp_md_ctx_st;  // OpenSSL's EVP_MD_CTX

namespace hla {

// Of what comes bit by bit.
class Sha256 {
 public:
  Sha256();
  void add(std::string_view data);
  // 64 lower-case digits. Nothing can be added after it.
  std::string hex();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
};

std::string sha256_hex(std::string_view data);  // of all of it, 64 lower-case digits
// Of a file's bytes. Throws kRuntime where it cannot be read.
std::string sha256_of_file(const std::filesystem::path& file);

}  // namespace hla
