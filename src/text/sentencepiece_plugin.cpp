// libhla_sentencepiece.so: see sentencepiece_plugin.h.
#include "sentencepiece_plugin.h"

#include <sentencepiece_processor.h>

#include <exception>
#include <memory>

namespace {

std::string error_of(const sentencepiece::util::Status& status) {
  return status.ok() ? "" : status.ToString();
}

class Model : public hla::SentencePieceModel {
 public:
  std::string load(std::string_view bytes) {
    const auto status = processor_.LoadFromSerializedProto({bytes.data(), bytes.size()});
    if (status.ok() && processor_.GetPieceSize() <= 0) return "no pieces";
    return error_of(status);
  }
  std::string encode(std::string_view text, std::vector<int>& ids) const override {
    return error_of(processor_.Encode({text.data(), text.size()}, &ids));
  }
  std::string decode(const std::vector<int>& ids, std::string& text) const override {
    return error_of(processor_.Decode(ids, &text));
  }
  int piece_size() const override { return processor_.GetPieceSize(); }
  int piece_to_id(std::string_view piece) const override {
    return processor_.PieceToId({piece.data(), piece.size()});
  }
  std::string id_to_piece(int id) const override { return processor_.IdToPiece(id); }
  bool is_control(int id) const override { return processor_.IsControl(id); }
  bool is_unknown(int id) const override { return processor_.IsUnknown(id); }
  bool is_byte(int id) const override { return processor_.IsByte(id); }
  int bos_id() const override { return processor_.bos_id(); }
  int eos_id() const override { return processor_.eos_id(); }

 private:
  sentencepiece::SentencePieceProcessor processor_;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) hla::SentencePieceModel* hla_sentencepiece_load(
    const char* data, size_t size, std::string* error) {
  try {
    auto model = std::make_unique<Model>();
    *error = model->load({data, size});
    if (error->empty()) return model.release();
  } catch (const std::exception& exception) {
    *error = exception.what();
  }
  return nullptr;
}
