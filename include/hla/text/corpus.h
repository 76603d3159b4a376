// Texts to measure perplexity on: files, folders of files, and known datasets.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hla/text/wikitext.h"

namespace hla {

// What perplexity is measured on: one text whose lines are rows (WikiText), or a list of documents.
// All of it is valid UTF-8 and not empty.
struct Corpus {
  enum class Kind { kText, kDocuments };

  Kind kind = Kind::kText;
  std::string name;    // the path, or "wikitext-2-raw, split test"
  std::string source;  // the files it was read from, for the report: "a.parquet (+3 more)"
  std::string format;  // "text", "JSONL", "Parquet"
  // Between documents. PTB's test split has " " here, as get_ptb_new of GPTQ's datautils joins it;
  // its other splits "\n\n", as get_ptb does.
  std::string separator = "\n\n";
  std::string text;                    // kText: the bytes of the raw file
  std::vector<std::string> documents;  // kDocuments
  std::string sha256;                  // of raw()

  // What the protocols gptq and hf-stride tokenize: join_hf_rows(text), or the documents joined.
  std::string joined() const;
  // What llama.cpp reads: the text itself, or the documents joined.
  std::string raw() const;
  // What protocol lm-eval reads: wikitext_pages(text), or each document as it is, not detokenized.
  std::vector<WikiPage> pages() const;
};

struct CorpusOptions {
  // The field of JSONL objects, the column of Parquet files.
  std::string text_field = "text";
  // Stop after so many documents, in the order of the files; the rest is not read. A text (plain,
  // or WikiText rows) is always read whole.
  std::optional<int64_t> max_documents = {};
  // Refuse a dataset of several splits without one, instead of taking its test split: nobody tunes
  // on that by a slip.
  bool needs_split = false;
};

// Reads a file by its extension: .jsonl and .ndjson (an object a line, blank lines skipped),
// .parquet (see io/parquet.h), anything else but .json as plain text. Of a folder, its .parquet
// files are read in the order of their names, else its JSONL files, else its .txt files, each of
// which is a document.
//
// Rows that are the lines of one text, as the HF wikitext dataset has them (every row that is not
// empty ends with its only "\n", and among the first 1000 is an empty one or a heading, " = …"),
// are put together to that text again: an empty row is the line " \n". So the Parquet files of
// WikiText give the bytes of its raw files. All other rows are documents.
//
// Throws kBadInput naming file and line or row: missing, damaged, not UTF-8 (with the byte offset),
// empty, without the field, .json; kUsage for a max_documents below 1; kRuntime for Parquet without
// support for it.
Corpus read_corpus(const std::filesystem::path& file, const CorpusOptions& options = {});

// A known dataset, from the data/ folder that comes with the program or from the local Hugging Face
// cache; the network is never used. Splits: train, validation (also: valid, val), test. The
// dataset's own field is read where options.text_field is the default. An empty split means test,
// or the only one there is. Of fineweb the first 1000 documents are read where options say nothing.
// Throws kUsage for an unknown dataset or split; kBadInput, saying where it looked, what is there
// and how to download it, where it is not found or shards of it are missing; and as read_corpus.
Corpus load_dataset(const std::string& dataset, const std::string& split,
                    const CorpusOptions& options = {});

// Names that load_dataset takes, for help and messages.
const std::vector<std::string>& dataset_names();

// The files that `name` is read from, as by open_corpus: those of a dataset, else itself. Throws as
// that.
std::vector<std::filesystem::path> corpus_files(const std::string& name);

// "DATASET:SPLIT" or "DATASET" as load_dataset, anything else as read_corpus.
Corpus open_corpus(const std::string& name, const CorpusOptions& options = {});

// Takes a text as in its file, or the next document; returns whether it wants more.
using CorpusPart = std::function<bool(Corpus::Kind kind, std::string_view part)>;

// Passes on what open_corpus would read, as it is read: of documents one at a time is in memory; a
// text is one part. What comes after the part that returned false is not looked at. Of datasets all
// documents are read where options say nothing. Returns whether more was wanted. Throws as
// open_corpus.
bool stream_corpus(const std::string& name, const CorpusOptions& options, const CorpusPart& part);

}  // namespace hla
