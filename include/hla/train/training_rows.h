// Rows of token ids to learn from.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hla/io/mapped_file.h"
#include "hla/text/corpus.h"
#include "hla/text/tokenizer.h"

namespace hla {

struct RowsOptions {
  enum class Kind {
    kPacked,  // one stream of all texts, EOS between documents that are not blank, cut into rows
    kPadded,  // a row for every line of a text that is not blank, or every document, cut at
              // `context`; what follows its end is not learnt
    kPaddedUnmasked,  // the same, but EOS is learnt as often as it pads (sodabreak/MHA2HLA)
  };
  Kind kind = Kind::kPacked;
  int64_t context = 1024;                   // ids of a row
  int64_t max_tokens = 0;                   // of the texts; 0: all
  std::optional<int32_t> end_of_text = {};  // the EOS where the tokenizer names none
  bool progress = false;                    // a line on a terminal while so many are read
};
// "packed", "padded", "padded-unmasked"; throws kUsage for another.
RowsOptions::Kind rows_kind_from_string(const std::string& text);

// The ids are on disk, so that texts may be larger than memory.
class TrainingRows {
 public:
  // Passes texts and documents on, one after another, as long as they are wanted.
  using Texts = std::function<void(const CorpusPart&)>;

  // `folder`: where there is room for the ids, 4 bytes each, in a file without a name. Throws
  // kBadInput where there is nothing to predict, an EOS is to be learnt and there is none, or an id
  // is not below `vocab_size`.
  TrainingRows(const Texts& texts, const Tokenizer& tokenizer, int64_t vocab_size,
               const RowsOptions& options, const std::filesystem::path& folder);

  int64_t size() const { return static_cast<int64_t>(rows_.size()); }
  int64_t tokens() const { return tokens_; }  // without padding

  struct Batch {
    at::Tensor ids;     // (B, context) int64
    at::Tensor labels;  // (B, context) int64: the id that follows, or kNoLabel
  };
  static constexpr int64_t kNoLabel = -100;
  Batch batch(const std::vector<int64_t>& rows) const;

 private:
  struct Row {
    int64_t begin;  // in the stream
    int64_t ids;
    int64_t labels;  // known successors
  };

  RowsOptions options_;
  int32_t pad_ = 0;
  int64_t tokens_ = 0;
  std::shared_ptr<const MappedFile> stream_;  // int32
  std::vector<Row> rows_;
};

// 0…count-1 in an order that depends on seed and epoch alone.
std::vector<int64_t> shuffled(int64_t count, uint64_t seed, int64_t epoch);

}  // namespace hla
