#include "hla/text/corpus.h"

#include <fnmatch.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "hla/core/data_dir.h"
#include "hla/core/error.h"
#include "hla/core/interrupt.h"
#include "hla/core/join.h"
#include "hla/core/log.h"
#include "hla/core/nearest.h"
#include "hla/core/sha256.h"
#include "hla/io/folder.h"
#include "hla/io/hub_cache.h"
#include "hla/io/json_file.h"
#include "hla/io/mapped_file.h"
#include "hla/io/parquet.h"
#include "hla/text/unicode.h"

namespace hla {
namespace {

namespace fs = std::filesystem;

enum class Format { kText, kJsonl, kParquet };

Format format_of(const fs::path& file) {
  std::string extension = file.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (extension == ".parquet") return Format::kParquet;
  if (extension == ".jsonl" || extension == ".ndjson") return Format::kJsonl;
  return Format::kText;
}

const char* format_name(Format format) {
  switch (format) {
    case Format::kJsonl:
      return "JSONL";
    case Format::kParquet:
      return "Parquet";
    default:
      return "text";
  }
}

// Rows as they are read: documents, which are passed on, unless all of them are lines of a text,
// which is when it is known to end. The lines of WikiText are told from documents of one line each
// by empty ones and headings, of which it has some among the first.
class Rows {
 public:
  Rows(std::optional<int64_t> max_documents, const CorpusPart& part)
      : max_(max_documents), part_(part) {}

  // Returns false when no more are wanted.
  bool add(std::string_view row) {
    if (are_lines_ && (row.empty() || row.find('\n') == row.size() - 1)) {
      is_wikitext_ = is_wikitext_ || row.empty() || row.starts_with(" = ");
      lines_.emplace_back(row);
      // Lines of a text are not documents to count.
      return is_wikitext_ || lines_.size() < kLinesToTell || pass_lines();
    }
    return add_document(row);
  }

  bool add_document(std::string_view document) { return pass_lines() && pass(document); }

  // After the last one.
  bool finish() {
    if (!is_wikitext_) return pass_lines();
    const auto is_filled = [](const std::string& line) { return !line.empty(); };
    if (!std::any_of(lines_.begin(), lines_.end(), is_filled)) return more_;
    std::string text;
    for (const std::string& line : lines_) text += line.empty() ? " \n" : line;
    return part_(Corpus::Kind::kText, text);
  }

 private:
  static constexpr size_t kLinesToTell = 1000;

  // They are documents.
  bool pass_lines() {
    are_lines_ = false;
    for (const std::string& line : std::exchange(lines_, {})) {
      if (!pass(line)) return false;
    }
    return more_;
  }

  bool pass(std::string_view document) {
    more_ = more_ && part_(Corpus::Kind::kDocuments, document) && (!max_ || ++count_ < *max_);
    return more_;
  }

  std::optional<int64_t> max_;
  const CorpusPart& part_;
  std::vector<std::string> lines_;
  bool are_lines_ = true;  // so far
  bool is_wikitext_ = false;
  bool more_ = true;
  int64_t count_ = 0;
};

bool read_parquet(const fs::path& file, const std::string& field, Rows& rows) {
  int64_t number = 0;
  return for_each_parquet_text(file, field, [&](std::string_view row) {
    ++number;
    if (const size_t valid = valid_utf8_prefix(row); valid != row.size()) {
      throw_bad_input(file.string() + ": row " + std::to_string(number) + ": not UTF-8 at byte " +
                      std::to_string(valid) + " of column \"" + field + "\"");
    }
    return rows.add(row);
  });
}

bool read_jsonl(const fs::path& file, const std::string& field, Rows& rows) {
  const auto content = MappedFile::open(file);
  const std::string_view text = content->text();
  JsonOrigin origin;
  // Pages that have been read count as this process's memory until they are given back.
  constexpr size_t kHeldBytes = 64 << 20;
  size_t released = 0;
  for (; origin.byte < text.size(); ++origin.line) {
    throw_if_interrupted();
    if (origin.byte - released > kHeldBytes) {
      content->release_pages();
      released = origin.byte;
    }
    const size_t end = std::min(text.find('\n', origin.byte), text.size());
    const std::string_view line = text.substr(origin.byte, end - origin.byte);
    if (line.find_first_not_of(" \t\r") != std::string_view::npos) {
      const nlohmann::json object = parse_json(line, file.string(), {}, origin);
      const std::string where = file.string() + ":" + std::to_string(origin.line) + ": ";
      if (!object.is_object()) {
        throw_bad_input(where + "expected an object, got " + json_excerpt(object));
      }
      const auto found = object.find(field);
      if (found == object.end()) {
        std::vector<std::string> keys;
        for (const auto& item : object.items()) keys.push_back(json_excerpt(item.key()));
        throw_bad_input(where + "no field " + json_excerpt(field) +
                        "; there are: " + (keys.empty() ? "none" : join_some(keys)));
      }
      if (!found->is_string()) {
        throw_bad_input(where + "field " + json_excerpt(field) + ": expected a string, got " +
                        json_excerpt(*found));
      }
      if (!rows.add(found->get_ref<const std::string&>())) return false;
    }
    origin.byte = end + 1;
  }
  return true;
}

std::string read_text(const fs::path& file) {
  const auto content = MappedFile::open(file);
  const std::string_view text = content->text();
  const size_t valid = valid_utf8_prefix(text);
  if (valid != text.size()) {
    const auto line =
        1 + std::count(text.begin(), text.begin() + static_cast<ptrdiff_t>(valid), '\n');
    std::string message = file.string() +
                          ": expected UTF-8 text, got an invalid sequence at byte " +
                          std::to_string(valid) + " (line " + std::to_string(line) + ")";
    if (text.starts_with("PAR1")) message += "\n  hint: a Parquet file's name must end in .parquet";
    if (text.starts_with("\x1f\x8b") || text.starts_with("\x28\xb5\x2f\xfd")) {
      message += "\n  hint: the file is compressed, unpack it first";
    }
    throw_bad_input(message);
  }
  return std::string(text);
}

// Files of one format, in the order in which they are read.
struct Source {
  std::vector<fs::path> files;
  std::string name;
  std::string field = "text";
  bool text_documents = false;  // a plain text is a document, not the whole
  std::optional<int64_t> max_documents = {};
  std::optional<int64_t> default_documents = {};  // where all are in memory
  std::string separator = "\n\n";
};

// Files that were begun, and whether more was wanted.
struct Streamed {
  size_t files = 0;
  bool more = true;
};

Streamed stream_files(const Source& source, const CorpusPart& part) {
  if (source.max_documents && *source.max_documents < 1) {
    throw_usage("expected a number of documents of at least 1, got " +
                std::to_string(*source.max_documents));
  }
  bool any = false;
  const CorpusPart pass = [&](Corpus::Kind kind, std::string_view text) {
    throw_if_interrupted();
    any |= !text.empty();
    return part(kind, text);
  };
  const Format format = format_of(source.files.front());
  Streamed result;
  if (format == Format::kText && !source.text_documents) {
    result.files = 1;
    result.more = pass(Corpus::Kind::kText, read_text(source.files.front()));
  } else {
    Rows rows(source.max_documents, pass);
    for (; result.more && result.files < source.files.size(); ++result.files) {
      const fs::path& file = source.files[result.files];
      switch (format) {
        case Format::kParquet:
          result.more = read_parquet(file, source.field, rows);
          break;
        case Format::kJsonl:
          result.more = read_jsonl(file, source.field, rows);
          break;
        case Format::kText:
          result.more = rows.add_document(read_text(file));
          break;
      }
    }
    result.more = rows.finish();
  }
  if (!any) throw_bad_input(source.name + ": the text is empty");
  return result;
}

Corpus read_files(const Source& source) {
  Corpus corpus;
  corpus.name = source.name;
  corpus.format = format_name(format_of(source.files.front()));
  corpus.separator = source.separator;
  const Streamed read = stream_files(source, [&](Corpus::Kind kind, std::string_view part) {
    corpus.kind = kind;
    if (kind == Corpus::Kind::kText) {
      corpus.text = part;
    } else {
      corpus.documents.emplace_back(part);
    }
    return true;
  });
  corpus.source = source.files.front().string();
  if (read.files > 1) corpus.source += " (+" + std::to_string(read.files - 1) + " more)";
  corpus.sha256 = sha256_hex(corpus.kind == Corpus::Kind::kText ? corpus.text : corpus.raw());
  return corpus;
}

const std::array<std::string, 3> kSplits = {"train", "validation", "test"};

// The name of a split as the Hub spells it; empty for anything else.
std::string canonical_split(const std::string& split) {
  if (split == "valid" || split == "val") return "validation";
  return std::find(kSplits.begin(), kSplits.end(), split) != kSplits.end() ? split : "";
}

// The files of a folder that read_corpus takes.
std::vector<fs::path> files_of_folder(const fs::path& folder) {
  std::map<Format, std::vector<fs::path>> files;
  std::set<std::string> splits;
  std::error_code unread;
  const std::vector<std::string> names = names_in(folder, unread);
  if (unread) throw_bad_input(folder.string() + ": cannot read: " + unread.message());
  for (const std::string& name : names) {
    const fs::path file = folder / name;
    std::error_code error;
    const Format format = format_of(file);
    if (format == Format::kText && file.extension() != ".txt") continue;
    if (!fs::is_regular_file(file, error)) continue;
    files[format].push_back(file);
    const std::string split = canonical_split(name.substr(0, name.find_first_of("-._")));
    if (!split.empty()) splits.insert(split);
  }
  if (files.empty()) {
    throw_bad_input(folder.string() + ": no .parquet, .jsonl, .ndjson or .txt file in this folder" +
                    (names.empty() ? ", it is empty" : "; there are: " + join_some(names)));
  }
  if (splits.size() > 1) {
    throw_bad_input(folder.string() + ": files of several splits (" +
                    join_some({splits.begin(), splits.end()}) + ")\n  hint: name one file");
  }
  for (const Format format : {Format::kParquet, Format::kJsonl, Format::kText}) {
    if (files.count(format) == 0) continue;
    if (files.size() > 1) {
      log_warning(folder.string() + ": has files of several formats; only those like " +
                  files[format].front().filename().string() + " are read");
    }
    return files[format];
  }
  return {};
}

struct Dataset {
  std::string name;
  std::vector<std::string> splits;
  // Ids on the Hub, best first. `mirrors`: any cached id of the same name, whoever owns it, too.
  std::vector<std::string> repos;
  bool mirrors = false;
  // Files of a snapshot, the first pattern that matches any. In both lists {split} stands for
  // train, validation or test, {short} for train, valid or test; * matches within a path part.
  std::vector<std::string> hub_files;
  // Files under data/.
  std::vector<std::string> local_files;
  std::string field = "text";
  // Documents read where the caller sets no limit: a file may have millions.
  std::optional<int64_t> default_documents = {};
  std::string download;  // arguments of `hf download --repo-type dataset`
};

// `config`: the dataset's folder in the repository Salesforce/wikitext.
Dataset wikitext(const std::string& name, const std::string& config,
                 std::vector<std::string> local_files) {
  Dataset dataset;
  dataset.name = name;
  dataset.splits = {"train", "validation", "test"};
  dataset.repos = {"Salesforce/wikitext", "wikitext"};
  // The second is the layout of the Hub's own conversion, refs/convert/parquet.
  dataset.hub_files = {config + "/{split}-*.parquet", config + "/{split}/*.parquet"};
  dataset.local_files = std::move(local_files);
  dataset.download = "Salesforce/wikitext --include \"" + config + "/*\"";
  return dataset;
}

const std::vector<Dataset>& datasets() {
  static const std::vector<Dataset> all = [] {
    std::vector<Dataset> list;
    list.push_back(
        wikitext("wikitext-2-raw", "wikitext-2-raw-v1", {"wikitext-2/wiki.{short}.raw"}));
    list.push_back(wikitext("wikitext-2", "wikitext-2-v1", {"wikitext-2/wiki.{short}.tokens"}));
    list.push_back(
        wikitext("wikitext-103-raw", "wikitext-103-raw-v1", {"wikitext-103/wiki.{short}.raw"}));
    list.push_back(
        wikitext("wikitext-103", "wikitext-103-v1", {"wikitext-103/wiki.{short}.tokens"}));
    // WikiText-2 (v1) with `unk` for `<unk>`, the default calibration text; only with the program.
    Dataset unk;
    unk.name = "wikitext-2-unk";
    unk.splits = {"validation"};
    unk.local_files = {"wikitext-2/wiki.{short}.txt"};
    list.push_back(unk);
    // The repository itself holds a script; its branch refs/convert/parquet, and mirrors, hold
    // Parquet.
    Dataset ptb;
    ptb.name = "ptb";
    ptb.splits = {"train", "validation", "test"};
    ptb.repos = {"ptb-text-only/ptb_text_only", "ptb_text_only"};
    ptb.mirrors = true;
    ptb.hub_files = {"penn_treebank/{split}/*.parquet",
                     "penn_treebank/{split}-*.parquet",
                     "penn_treebank/*-{split}.parquet",
                     "data/{split}-*.parquet",
                     "{split}-*.parquet",
                     "{split}.parquet"};
    ptb.field = "sentence";
    ptb.download = "ptb-text-only/ptb_text_only --revision refs/convert/parquet";
    list.push_back(ptb);
    Dataset fineweb;
    fineweb.name = "fineweb";
    fineweb.splits = {"train"};
    fineweb.repos = {"HuggingFaceFW/fineweb"};
    fineweb.default_documents = 1000;
    fineweb.hub_files = {"sample/10BT/*.parquet", "sample/100BT/*.parquet",
                         "sample/350BT/*.parquet", "data/*/*.parquet"};
    fineweb.download = "HuggingFaceFW/fineweb --include \"sample/10BT/000_00000.parquet\"";
    list.push_back(fineweb);
    for (Dataset& dataset : list) {
      for (const char* extension : {".parquet", ".jsonl"}) {
        dataset.local_files.push_back(dataset.name + "/{split}*" + extension);
      }
    }
    return list;
  }();
  return all;
}

std::string fill_in(std::string pattern, const std::string& split) {
  const std::string short_split = split == "validation" ? "valid" : split;
  for (const auto& [key, value] :
       {std::pair<std::string, std::string>{"{split}", split}, {"{short}", short_split}}) {
    for (size_t at = pattern.find(key); at != std::string::npos; at = pattern.find(key)) {
      pattern.replace(at, key.size(), value);
    }
  }
  return pattern;
}

// Files under `folder` that match a relative pattern, sorted. A link without a target is none.
std::vector<fs::path> find_matching(const fs::path& folder, const fs::path& pattern) {
  std::vector<fs::path> found = {folder};
  for (const fs::path& part : pattern) {
    std::vector<fs::path> next;
    for (const fs::path& parent : found) {
      std::error_code error;
      for (fs::directory_iterator it(parent, error), end; !error && it != end;
           it.increment(error)) {
        const std::string name = it->path().filename().string();
        if (::fnmatch(part.c_str(), name.c_str(), FNM_PERIOD) == 0) next.push_back(it->path());
      }
    }
    found = std::move(next);
  }
  std::error_code error;
  std::erase_if(found, [&](const fs::path& path) { return !fs::is_regular_file(path, error); });
  std::sort(found.begin(), found.end());
  return found;
}

// The number after "-of-" in "train-00001-of-00002.parquet"; 0 if there is none.
size_t shard_count(const fs::path& file) {
  const std::string stem = file.stem().string();
  const size_t of = stem.rfind("-of-");
  if (of == std::string::npos) return 0;
  const std::string digits = stem.substr(of + 4);
  if (digits.empty() || digits.size() > 6 ||
      !std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isdigit(c); })) {
    return 0;
  }
  return std::stoul(digits);
}

// Some relative paths of files in a folder, for messages.
std::vector<std::string> files_below(const fs::path& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end;
       it.increment(error)) {
    std::error_code type_error;
    if (it->is_regular_file(type_error)) {
      names.push_back(it->path().lexically_relative(folder).string());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

// Where a dataset may be, and what was there.
struct Search {
  std::vector<fs::path> files;
  std::vector<std::string> places;
};

Search find_dataset(const Dataset& dataset, const std::string& split) {
  Search search;
  for (const fs::path& folder : data_folders()) {
    for (const std::string& pattern : dataset.local_files) {
      const std::string filled = fill_in(pattern, split);
      search.files = find_matching(folder, filled);
      if (!search.files.empty()) return search;
      search.places.push_back((folder / filled).string() + ": not there");
    }
  }
  const std::vector<std::string> cached = cached_hub_ids(HubRepo::kDataset);
  std::vector<std::string> repos = dataset.repos;
  if (dataset.mirrors) {
    const auto base_name = [](const std::string& id) { return id.substr(id.find('/') + 1); };
    for (const std::string& id : cached) {
      if (base_name(id) == base_name(dataset.repos.front()) &&
          std::find(repos.begin(), repos.end(), id) == repos.end()) {
        repos.push_back(id);
      }
    }
  }
  if (!repos.empty() && hub_cache_folder().empty()) {
    search.places.push_back("no Hugging Face cache: HF_HOME and HOME are unset");
    return search;
  }
  for (const std::string& repo : repos) {
    const std::vector<fs::path> snapshots = cached_hub_snapshots(HubRepo::kDataset, repo);
    if (snapshots.empty()) {
      search.places.push_back(cached_hub_folder(HubRepo::kDataset, repo).string() + ": not there");
    }
    for (const fs::path& snapshot : snapshots) {
      std::vector<std::string> patterns;
      for (const std::string& pattern : dataset.hub_files) {
        patterns.push_back(fill_in(pattern, split));
        search.files = find_matching(snapshot, patterns.back());
        if (!search.files.empty()) return search;
      }
      const std::vector<std::string> there = files_below(snapshot);
      search.places.push_back(snapshot.string() + ": no " + join_some(patterns) +
                              "; there are: " + (there.empty() ? "no files" : join_some(there)));
    }
  }
  if (!repos.empty() && !cached.empty()) {
    search.places.push_back("datasets in " + hub_cache_folder().string() + ": " +
                            join_some(cached));
  }
  return search;
}

Source source_of_path(const fs::path& path, const CorpusOptions& options) {
  Source source;
  std::error_code error;
  if (!fs::exists(path, error) && !error) {
    const std::string name = path.string();
    const std::string like = nearest_name(name.substr(0, name.find(':')), dataset_names());
    throw_bad_input(name + ": no such file or folder" +
                    (like.empty() ? "" : "\n  hint: did you mean the dataset " + like + "?"));
  }
  source.text_documents = fs::is_directory(path, error);
  if (!source.text_documents && path.extension() == ".json") {
    throw_bad_input(
        path.string() +
        ": expected a text, .jsonl or .parquet, got .json\n  hint: name it .jsonl if it "
        "has an object a line, or .txt to read it as it is");
  }
  source.files = source.text_documents ? files_of_folder(path) : std::vector<fs::path>{path};
  source.name = path.string();
  source.field = options.text_field;
  source.max_documents = options.max_documents;
  return source;
}

Source source_of_dataset(const std::string& name, const std::string& split,
                         const CorpusOptions& options) {
  const auto found = std::find_if(datasets().begin(), datasets().end(),
                                  [&](const Dataset& known) { return known.name == name; });
  if (found == datasets().end()) {
    throw_usage("unknown dataset \"" + name + "\"; known are: " + join_some(dataset_names()) +
                "\n  hint: a file or folder can be read as it is");
  }
  const Dataset& dataset = *found;
  if (split.empty() && options.needs_split && dataset.splits.size() > 1) {
    throw_usage("dataset " + name + ": expected a split, as " + name + ":" +
                dataset.splits.front() + "; there are: " + join_some(dataset.splits));
  }
  const std::string wanted = split.empty() ? dataset.splits.back() : canonical_split(split);
  if (std::find(dataset.splits.begin(), dataset.splits.end(), wanted) == dataset.splits.end()) {
    throw_usage("dataset " + name + ": no split \"" + split +
                "\"; there are: " + join_some(dataset.splits));
  }
  Source source;
  source.name = name + ", split " + wanted;
  const std::string hint = dataset.download.empty()
                               ? "\n  hint: set HLA_DATA_DIR to the data/ folder of the repository"
                               : "\n  hint: hf download --repo-type dataset " + dataset.download;
  Search search = find_dataset(dataset, wanted);
  if (search.files.empty()) {
    std::string message = "dataset " + source.name + ": not found";
    for (const std::string& place : search.places) message += "\n  - " + place;
    throw_bad_input(message + hint);
  }
  const size_t shards = shard_count(search.files.front());
  if (shards > 0 && shards != search.files.size()) {
    throw_bad_input("dataset " + source.name + ": expected " + std::to_string(shards) +
                    " files like " + search.files.front().string() + ", got " +
                    std::to_string(search.files.size()) + hint);
  }
  source.files = std::move(search.files);
  source.field =
      options.text_field == CorpusOptions().text_field ? dataset.field : options.text_field;
  source.max_documents = options.max_documents;
  source.default_documents = dataset.default_documents;
  if (name == "ptb" && wanted == "test") source.separator = " ";
  return source;
}

// The dataset and split that "DATASET:SPLIT" or "DATASET" names.
std::optional<std::pair<std::string, std::string>> dataset_of(const std::string& name) {
  const size_t colon = std::min(name.find(':'), name.size());
  const std::string dataset = name.substr(0, colon);
  const auto& known = dataset_names();
  if (std::find(known.begin(), known.end(), dataset) == known.end()) return std::nullopt;
  return std::pair{dataset, colon < name.size() ? name.substr(colon + 1) : ""};
}

}  // namespace

std::string Corpus::joined() const {
  return kind == Kind::kText ? join_hf_rows(text) : join(documents, separator);
}

std::string Corpus::raw() const { return kind == Kind::kText ? text : join(documents, separator); }

std::vector<WikiPage> Corpus::pages() const {
  if (kind == Kind::kText) return wikitext_pages(text);
  std::vector<WikiPage> result;
  result.reserve(documents.size());
  for (const std::string& document : documents) result.push_back({document, document});
  return result;
}

Corpus read_corpus(const fs::path& file, const CorpusOptions& options) {
  return read_files(source_of_path(file, options));
}

Corpus load_dataset(const std::string& name, const std::string& split,
                    const CorpusOptions& options) {
  Source source = source_of_dataset(name, split, options);
  if (!source.max_documents) source.max_documents = source.default_documents;
  Corpus corpus = read_files(source);
  if (corpus.kind == Corpus::Kind::kDocuments && source.max_documents) {
    corpus.name += ", first " + std::to_string(*source.max_documents) + " documents";
  }
  return corpus;
}

Corpus open_corpus(const std::string& name, const CorpusOptions& options) {
  if (const auto dataset = dataset_of(name)) {
    return load_dataset(dataset->first, dataset->second, options);
  }
  return read_corpus(name, options);
}

bool stream_corpus(const std::string& name, const CorpusOptions& options, const CorpusPart& part) {
  const auto dataset = dataset_of(name);
  return stream_files(dataset ? source_of_dataset(dataset->first, dataset->second, options)
                              : source_of_path(name, options),
                      part)
      .more;
}

std::vector<fs::path> corpus_files(const std::string& name) {
  const auto dataset = dataset_of(name);
  if (!dataset) return {name};
  return source_of_dataset(dataset->first, dataset->second, {}).files;
}

const std::vector<std::string>& dataset_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> list;
    for (const Dataset& dataset : datasets()) list.push_back(dataset.name);
    return list;
  }();
  return names;
}

}  // namespace hla
