#include "hla/text/corpus.h"

#include <gmock/gmock.h>

#include "hla/core/sha256.h"
#include "hla/io/parquet.h"
#include "test_util.h"

namespace hla {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using testing::EnvironmentVariable;
using testing::error_of;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::read_file;
using testing::source_path;
using testing::TempDir;
using testing::write_file;

fs::path fixture(const std::string& name) { return source_path("tests/data/text/" + name); }

// The first lines of the WikiText-2 raw test split, as many as wikitext_rows.parquet has.
std::string wiki_head() {
  const std::string head = read_file(source_path("data/wikitext-2/wiki.test.raw")).substr(0, 6000);
  return head.substr(0, head.rfind('\n') + 1);
}

std::string message_of(const fs::path& file, const CorpusOptions& options = {},
                       ExitCode code = ExitCode::kBadInput) {
  const Error error = error_of([&] { read_corpus(file, options); });
  EXPECT_EQ(error.code(), code) << error.what();
  return error.what();
}

TEST(CorpusTest, PlainText) {
  const TempDir folder;
  write_file(folder / "a.txt", " a \n \n b\n");
  const Corpus corpus = read_corpus(folder / "a.txt");
  EXPECT_EQ(corpus.kind, Corpus::Kind::kText);
  EXPECT_EQ(corpus.format, "text");
  EXPECT_EQ(corpus.name, (folder / "a.txt").string());
  EXPECT_EQ(corpus.source, corpus.name);
  EXPECT_EQ(corpus.raw(), " a \n \n b\n");
  EXPECT_EQ(corpus.joined(), " a \n\n\n\n\n b\n");
  EXPECT_EQ(corpus.sha256, sha256_hex(" a \n \n b\n"));
  ASSERT_EQ(corpus.pages().size(), 1u);
  EXPECT_EQ(corpus.pages()[0].original, corpus.text);
  EXPECT_EQ(corpus.pages()[0].text, wikitext_detokenize(corpus.text));
}

TEST(CorpusTest, RefusesBadText) {
  const TempDir folder;
  write_file(folder / "empty.txt", "");
  EXPECT_THAT(message_of(folder / "empty.txt"), HasSubstr("the text is empty"));
  write_file(folder / "latin1.txt", "line\nsecond caf\xe9\n");
  EXPECT_THAT(message_of(folder / "latin1.txt"), HasSubstr("at byte 15 (line 2)"));
  write_file(folder / "packed.gz", "\x1f\x8b\x08\xff");
  EXPECT_THAT(message_of(folder / "packed.gz"), HasSubstr("compressed"));
  EXPECT_THAT(message_of(folder / "missing.txt"), HasSubstr("missing.txt"));
}

TEST(CorpusTest, Jsonl) {
  const TempDir folder;
  const fs::path file = folder / "a.JSONL";
  write_file(file,
             "{\"text\": \"one\\n\\nparagraph\", \"id\": 1}\r\n\n  \n{\"text\": \"two \\u00e9\"}\n"
             "{\"text\": \"\"}\n{\"text\": \"last\"}");
  const Corpus corpus = read_corpus(file);
  EXPECT_EQ(corpus.kind, Corpus::Kind::kDocuments);
  EXPECT_EQ(corpus.format, "JSONL");
  EXPECT_THAT(corpus.documents, ElementsAre("one\n\nparagraph", "two é", "", "last"));
  EXPECT_EQ(corpus.joined(), "one\n\nparagraph\n\ntwo é\n\n\n\nlast");
  EXPECT_EQ(corpus.raw(), corpus.joined());
  EXPECT_EQ(corpus.sha256, sha256_hex(corpus.joined()));
  ASSERT_EQ(corpus.pages().size(), 4u);
  EXPECT_EQ(corpus.pages()[1].original, "two é");
  EXPECT_EQ(corpus.pages()[1].text, "two é");
}

TEST(CorpusTest, JsonlErrorsNameTheLine) {
  const TempDir folder;
  const fs::path file = folder / "a.jsonl";
  const std::string good = "{\"text\": \"fine\"}\n\n";
  write_file(file, good + "{\"text\": \"x\",}\n");
  EXPECT_THAT(message_of(file), HasSubstr("a.jsonl:3:"));
  EXPECT_THAT(message_of(file), HasSubstr("(byte 31)"));
  write_file(file, good + "{\"content\": 1, \"id\": 2}\n");
  EXPECT_THAT(message_of(file),
              HasSubstr("a.jsonl:3: no field \"text\"; there are: \"content\", \"id\""));
  write_file(file, good + "{\"text\": [1]}\n");
  EXPECT_THAT(message_of(file), HasSubstr("a.jsonl:3: field \"text\": expected a string, got [1]"));
  write_file(file, good + "[]\n");
  EXPECT_THAT(message_of(file), HasSubstr("a.jsonl:3: expected an object, got []"));
  write_file(file, good + "{\"text\": \"\xff\"}\n");
  EXPECT_THAT(message_of(file), HasSubstr("a.jsonl:3:"));
  write_file(file, "\n \n");
  EXPECT_THAT(message_of(file), HasSubstr("the text is empty"));
  write_file(file, "{\"text\": \"\"}\n");
  EXPECT_THAT(message_of(file), HasSubstr("the text is empty"));
}

TEST(CorpusTest, JsonlStopsEarly) {
  const TempDir folder;
  const fs::path file = folder / "a.jsonl";
  // What comes after the second document is never looked at.
  write_file(file, "{\"body\": \"one\"}\n{\"body\": \"two\"}\nnot JSON\n");
  CorpusOptions options{"body", 2};
  EXPECT_THAT(read_corpus(file, options).documents, ElementsAre("one", "two"));
  options.max_documents = 3;
  EXPECT_THAT(message_of(file, options), HasSubstr("a.jsonl:3:"));
  options.max_documents = 0;
  message_of(file, options, ExitCode::kUsage);
}

TEST(CorpusTest, WikitextRowsBecomeTheRawText) {
  const TempDir folder;
  const fs::path file = folder / "a.jsonl";
  write_file(file, "{\"text\": \"\"}\n{\"text\": \" = T = \\n\"}\n{\"text\": \"\"}\n");
  const Corpus corpus = read_corpus(file);
  EXPECT_EQ(corpus.kind, Corpus::Kind::kText);
  EXPECT_EQ(corpus.text, " \n = T = \n \n");
  // Lines do not count as documents.
  EXPECT_EQ(read_corpus(file, {"text", 1}).text, corpus.text);
  // One row that is no line makes all of them documents.
  write_file(file, "{\"text\": \"\"}\n{\"text\": \" = T = \\n\"}\n{\"text\": \"a\\nb\\n\"}\n");
  EXPECT_THAT(read_corpus(file).documents, ElementsAre("", " = T = \n", "a\nb\n"));
  EXPECT_THAT(read_corpus(file, {"text", 2}).documents, ElementsAre("", " = T = \n"));
}

// As documents often end.
TEST(CorpusTest, RowsOfOneLineAreDocumentsWithoutASignOfWikitext) {
  const TempDir folder;
  const fs::path file = folder / "a.jsonl";
  const auto rows = [](int count) {
    std::string text;
    for (int i = 0; i < count; ++i) {
      text += "{\"text\": \"row " + std::to_string(i) + "\\n\"}\n";
    }
    return text;
  };
  write_file(file, rows(3));
  EXPECT_THAT(read_corpus(file).documents, ElementsAre("row 0\n", "row 1\n", "row 2\n"));
  EXPECT_THAT(read_corpus(file, {"text", 2}).documents, ElementsAre("row 0\n", "row 1\n"));
  // They are not kept for ever: what comes behind them is not waited for.
  write_file(file, rows(1200) + "not JSON");
  EXPECT_EQ(read_corpus(file, {"text", 1100}).documents.size(), 1100u);
  write_file(file, rows(1200) + "{\"text\": \"\"}\n");
  EXPECT_EQ(read_corpus(file).documents.size(), 1201u);
  write_file(file, rows(900) + "{\"text\": \"\"}\n");
  EXPECT_EQ(read_corpus(file).kind, Corpus::Kind::kText);
}

TEST(CorpusTest, JsonIsNoText) {
  const TempDir folder;
  write_file(folder / "a.json", "[{\"text\": \"one\"}]");
  EXPECT_THAT(message_of(folder / "a.json"), HasSubstr(".jsonl"));
  // Beside others it is a description of them.
  write_file(folder / "b.jsonl", "{\"text\": \"two\"}\n");
  EXPECT_THAT(read_corpus(folder.path()).documents, ElementsAre("two"));
}

TEST(CorpusTest, Parquet) {
  if (!has_parquet_support()) {
    EXPECT_THAT(message_of(fixture("wikitext_rows.parquet"), {}, ExitCode::kRuntime),
                HasSubstr("no Parquet support"));
    GTEST_SKIP() << "built without Parquet support";
  }
  const Corpus wiki = read_corpus(fixture("wikitext_rows.parquet"));
  EXPECT_EQ(wiki.kind, Corpus::Kind::kText);
  EXPECT_EQ(wiki.format, "Parquet");
  EXPECT_EQ(wiki.text, wiki_head());
  EXPECT_EQ(wiki.sha256, sha256_hex(wiki_head()));
  const Corpus documents = read_corpus(fixture("strings_zstd.parquet"), {"large", 3});
  EXPECT_EQ(documents.kind, Corpus::Kind::kDocuments);
  EXPECT_EQ(documents.documents.size(), 3u);
  EXPECT_EQ(read_corpus(fixture("strings_zstd.parquet")).documents.size(), 12u);
  EXPECT_THAT(message_of(fixture("strings_zstd.parquet"), {"body", {}}),
              HasSubstr("there are: id"));
  EXPECT_THAT(message_of(fixture("not_utf8.parquet")), HasSubstr("row 2: not UTF-8 at byte 3"));
}

TEST(CorpusTest, Folders) {
  const TempDir folder;
  EXPECT_THAT(message_of(folder.path()), HasSubstr("it is empty"));
  write_file(folder / "README.md", "x");
  EXPECT_THAT(message_of(folder.path()), HasSubstr("README.md"));
  write_file(folder / "b.txt", "b");
  write_file(folder / "a.txt", "a\n");
  const Corpus texts = read_corpus(folder.path());
  EXPECT_EQ(texts.kind, Corpus::Kind::kDocuments);
  EXPECT_THAT(texts.documents, ElementsAre("a\n", "b"));
  EXPECT_EQ(texts.source, (folder / "a.txt").string() + " (+1 more)");
  EXPECT_THAT(read_corpus(folder.path(), {"text", 1}).documents, ElementsAre("a\n"));
  // Data files go before texts.
  write_file(folder / "2.jsonl", "{\"text\": \"two\"}\n");
  write_file(folder / "1.jsonl", "{\"text\": \"one\"}\n");
  ::testing::internal::CaptureStderr();
  EXPECT_THAT(read_corpus(folder.path()).documents, ElementsAre("one", "two"));
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              HasSubstr("several formats; only those like 1.jsonl are read"));
  const Corpus first = read_corpus(folder.path(), {"text", 1});
  EXPECT_THAT(first.documents, ElementsAre("one"));
  EXPECT_THAT(first.source, Not(HasSubstr("more")));
  // Splits are not to be mixed.
  write_file(folder / "train-0.jsonl", "{\"text\": \"x\"}\n");
  write_file(folder / "test-0.jsonl", "{\"text\": \"y\"}\n");
  EXPECT_THAT(message_of(folder.path()), HasSubstr("several splits (test, train)"));
}

// Parts that were passed on, a text after "text: ", until there were so many; then whether more was
// wanted.
std::vector<std::string> streamed(const std::string& name, size_t most = 100,
                                  const CorpusOptions& options = {}) {
  std::vector<std::string> parts;
  const bool more = stream_corpus(name, options, [&](Corpus::Kind kind, std::string_view part) {
    parts.push_back((kind == Corpus::Kind::kText ? "text: " : "") + std::string(part));
    return parts.size() < most;
  });
  parts.emplace_back(more ? "more" : "enough");
  return parts;
}

TEST(CorpusStreamTest, PassesDocumentsOnAsTheyCome) {
  const TempDir folder;
  write_file(folder / "1.jsonl", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
  write_file(folder / "2.jsonl", "{\"text\": \"three\"}\nnot JSON\n");
  const std::string name = folder.path().string();
  EXPECT_THAT(streamed(name, 1), ElementsAre("one", "enough"));
  EXPECT_THAT(streamed(name, 3), ElementsAre("one", "two", "three", "enough"));
  EXPECT_THAT(streamed(name, 9, {"text", 2}), ElementsAre("one", "two", "enough"));
  std::vector<std::string> seen;
  const Error error = error_of([&] {
    stream_corpus(name, {}, [&](Corpus::Kind, std::string_view part) {
      seen.emplace_back(part);
      return true;
    });
  });
  EXPECT_THAT(error.what(), HasSubstr("2.jsonl:2:"));
  EXPECT_THAT(seen, ElementsAre("one", "two", "three"));
}

TEST(CorpusStreamTest, ATextIsOnePart) {
  const TempDir folder;
  write_file(folder / "a.txt", "b\nc\n");
  EXPECT_THAT(streamed((folder / "a.txt").string()), ElementsAre("text: b\nc\n", "more"));
  EXPECT_THAT(streamed(folder.path().string()), ElementsAre("b\nc\n", "more"));
  const std::string rows = (folder / "rows.jsonl").string();
  write_file(rows, "{\"text\": \"\"}\n{\"text\": \" = T = \\n\"}\n");
  EXPECT_THAT(streamed(rows), ElementsAre("text:  \n = T = \n", "more"));
  // What looked like lines so far were documents.
  write_file(rows, "{\"text\": \" = T = \\n\"}\n{\"text\": \"\"}\n{\"text\": \"a\"}\n");
  EXPECT_THAT(streamed(rows), ElementsAre(" = T = \n", "", "a", "more"));
  EXPECT_THAT(streamed(rows, 1), ElementsAre(" = T = \n", "enough"));
  write_file(rows, "{\"text\": \"\"}\n");
  EXPECT_THAT(error_of([&] { streamed(rows); }).what(), HasSubstr("the text is empty"));
}

TEST(DatasetTest, ComesWithTheProgram) {
  const Corpus test = load_dataset("wikitext-2-raw", "test");
  EXPECT_EQ(test.kind, Corpus::Kind::kText);
  EXPECT_EQ(test.name, "wikitext-2-raw, split test");
  EXPECT_THAT(test.source, HasSubstr("wiki.test.raw"));
  EXPECT_EQ(test.sha256.substr(0, 8), "173c87a5");
  EXPECT_EQ(test.pages().size(), 62u);
  const Corpus unk = load_dataset("wikitext-2-unk", "valid");
  EXPECT_THAT(unk.source, HasSubstr("wiki.valid.txt"));
}

TEST(DatasetTest, UnknownNames) {
  Error error = error_of([] { load_dataset("wikitext2", "test"); });
  EXPECT_EQ(error.code(), ExitCode::kUsage);
  for (const std::string& name : dataset_names()) EXPECT_THAT(error.what(), HasSubstr(name));
  error = error_of([] { load_dataset("fineweb", "test"); });
  EXPECT_EQ(error.code(), ExitCode::kUsage);
  EXPECT_THAT(error.what(), HasSubstr("train"));
  EXPECT_EQ(error_of([] { load_dataset("ptb", "dev"); }).code(), ExitCode::kUsage);
}

TEST(DatasetTest, WithoutASplitItIsTheTestSplitOrTheOnlyOne) {
  EXPECT_THAT(load_dataset("wikitext-2-raw", "").name, HasSubstr("split test"));
  EXPECT_THAT(load_dataset("wikitext-2-unk", "").name, HasSubstr("split validation"));
}

// A cache of its own, and no data/ folder.
class CachedDatasetTest : public ::testing::Test {
 protected:
  // A snapshot file as huggingface_hub leaves it, a link into blobs/.
  void add(const std::string& repo, const std::string& file, const fs::path& source,
           const std::string& hash = "0123abcd") {
    const fs::path root = cache_ / repo;
    const fs::path link = root / "snapshots" / hash / file;
    fs::create_directories(root / "blobs");
    fs::create_directories(link.parent_path());
    std::string blob = file;
    for (char& c : blob) c = c == '/' ? '_' : c;
    fs::copy_file(source, root / "blobs" / blob, fs::copy_options::overwrite_existing);
    fs::create_symlink(root / "blobs" / blob, link);
  }
  static std::string not_found(const std::string& dataset, const std::string& split) {
    const Error error = error_of([&] { load_dataset(dataset, split); });
    EXPECT_EQ(error.code(), ExitCode::kBadInput);
    return error.what();
  }

  TempDir cache_;
  TempDir data_;
  EnvironmentVariable cache_variable_{"HF_HUB_CACHE", cache_.path().string()};
  EnvironmentVariable data_variable_{"HLA_DATA_DIR", data_.path().string()};
};

TEST_F(CachedDatasetTest, NotFoundSaysWhereItLooked) {
  std::string message = not_found("wikitext-2-raw", "val");
  for (const std::string& part :
       {std::string("wikitext-2-raw, split validation: not found"), data_.path().string(),
        (cache_ / "datasets--Salesforce--wikitext").string(),
        std::string("hf download --repo-type dataset Salesforce/wikitext")}) {
    EXPECT_THAT(message, HasSubstr(part));
  }
  // Another configuration, and a link to a blob that is gone.
  add("datasets--Salesforce--wikitext", "wikitext-2-v1/test-00000-of-00001.parquet",
      fixture("wikitext_rows.parquet"));
  add("datasets--Salesforce--wikitext", "wikitext-2-raw-v1/validation-00000-of-00001.parquet",
      fixture("wikitext_rows.parquet"));
  fs::remove(cache_ /
             "datasets--Salesforce--wikitext/blobs/"
             "wikitext-2-raw-v1_validation-00000-of-00001.parquet");
  message = not_found("wikitext-2-raw", "val");
  EXPECT_THAT(message, HasSubstr("there are: wikitext-2-v1/test-00000-of-00001.parquet"));
  EXPECT_THAT(message, HasSubstr("Salesforce/wikitext"));
}

TEST_F(CachedDatasetTest, JsonlBesideTheProgram) {
  fs::create_directories(data_ / "ptb");
  write_file(data_ / "ptb/test.jsonl", "{\"sentence\": \"a b\"}\n{\"sentence\": \"c\"}\n");
  write_file(data_ / "ptb/validation.jsonl", "{\"sentence\": \"a b\"}\n{\"sentence\": \"c\"}\n");
  EXPECT_EQ(load_dataset("ptb", "test").joined(), "a b c");
  EXPECT_EQ(load_dataset("ptb", "test").sha256, sha256_hex("a b c"));
  EXPECT_EQ(load_dataset("ptb", "validation").joined(), "a b\n\nc");
}

TEST_F(CachedDatasetTest, ReadsTheCache) {
  if (!has_parquet_support()) GTEST_SKIP() << "built without Parquet support";
  // The old id of the repository, in a snapshot that is not the newest one.
  add("datasets--wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet",
      fixture("wikitext_rows.parquet"));
  fs::create_directories(cache_ / "datasets--wikitext/snapshots/newer");
  const Corpus wiki = load_dataset("wikitext-2-raw", "test");
  EXPECT_EQ(wiki.text, wiki_head());
  EXPECT_EQ(wiki.format, "Parquet");

  add("datasets--someone--ptb_text_only", "penn_treebank/test/0000.parquet",
      fixture("ptb_sentences.parquet"));
  const Corpus ptb = load_dataset("ptb", "test");
  EXPECT_EQ(ptb.joined(), "a first sentence <unk> no it was n't black monday N years old");

  for (const char* name : {"000_00001.parquet", "000_00000.parquet"}) {
    add("datasets--HuggingFaceFW--fineweb", std::string("sample/10BT/") + name,
        fixture("strings_snappy.parquet"));
  }
  const Corpus fineweb = load_dataset("fineweb", "train", {"text", 13});
  EXPECT_EQ(fineweb.documents.size(), 13u);
  EXPECT_THAT(fineweb.source, HasSubstr("000_00000.parquet (+1 more)"));
  EXPECT_THAT(load_dataset("fineweb", "train", {"text", 12}).source, Not(HasSubstr("more")));
  EXPECT_THAT(load_dataset("fineweb", "").name, HasSubstr("first 1000 documents"));
  EXPECT_EQ(streamed("fineweb").size(), 2 * 12u + 1);
  EXPECT_EQ(streamed("fineweb:train", 13).size(), 13 + 1u);
  EXPECT_EQ(open_corpus("fineweb:train", {"text", 13}).documents, fineweb.documents);
}

TEST_F(CachedDatasetTest, RefusesMissingShards) {
  add("datasets--Salesforce--wikitext", "wikitext-103-raw-v1/train-00001-of-00002.parquet",
      fixture("wikitext_rows.parquet"));
  EXPECT_THAT(not_found("wikitext-103-raw", "train"), HasSubstr("expected 2 files"));
}

}  // namespace
}  // namespace hla
