// libhla_sentencepiece.so: the sentencepiece library with nothing of LibTorch in sight. Both have a
// FLAGS_minloglevel, of 32 and of 4 bytes: where they share one, sentencepiece writes over what
// lies behind LibTorch's. They share protobuf's names, too. (Not so with AddressSanitizer, which
// does not let a library find its own symbols first.)
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace hla {

// A SentencePiece model; names are the library's. Texts that come back as an error are empty where
// there was none.
class SentencePieceModel {
 public:
  virtual ~SentencePieceModel() = default;
  virtual std::string encode(std::string_view text, std::vector<int>& ids) const = 0;
  virtual std::string decode(const std::vector<int>& ids, std::string& text) const = 0;
  virtual int piece_size() const = 0;
  virtual int piece_to_id(std::string_view piece) const = 0;
  virtual std::string id_to_piece(int id) const = 0;
  virtual bool is_control(int id) const = 0;
  virtual bool is_unknown(int id) const = 0;
  virtual bool is_byte(int id) const = 0;
  virtual int bos_id() const = 0;  // -1: none
  virtual int eos_id() const = 0;
};

}  // namespace hla

#define HLA_SENTENCEPIECE_SYMBOL "hla_sentencepiece_load"

// A model from the bytes of its file, to be deleted; null with `error` where they are not one.
extern "C" hla::SentencePieceModel* hla_sentencepiece_load(const char* data, size_t size,
                                                           std::string* error);
