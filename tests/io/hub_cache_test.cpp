#include "hla/io/hub_cache.h"

#include <chrono>

#include "test_util.h"

namespace hla {
namespace {

using testing::EnvironmentVariable;
using testing::TempDir;
using testing::write_file;

TEST(HubCacheTest, SnapshotsOfDatasets) {
  const TempDir folder;
  const EnvironmentVariable cache("HF_HUB_CACHE", folder.path().string());
  const auto repo = folder / "datasets--org--name";
  EXPECT_TRUE(cached_hub_snapshots(HubRepo::kDataset, "org/name").empty());
  for (const char* hash : {"aaa", "bbb", "ccc"}) {
    std::filesystem::create_directories(repo / "snapshots" / hash);
  }
  const auto now = std::filesystem::file_time_type::clock::now();
  std::filesystem::last_write_time(repo / "snapshots" / "aaa", now - std::chrono::hours(3));
  std::filesystem::last_write_time(repo / "snapshots" / "bbb", now - std::chrono::hours(1));
  std::filesystem::last_write_time(repo / "snapshots" / "ccc", now - std::chrono::hours(2));
  const auto hashes = [] {
    std::string names;
    for (const auto& path : cached_hub_snapshots(HubRepo::kDataset, "org/name")) {
      names += path.filename().string() + " ";
    }
    return names;
  };
  EXPECT_EQ(hashes(), "bbb ccc aaa ");
  std::filesystem::create_directories(repo / "refs");
  write_file(repo / "refs" / "main", "aaa");
  EXPECT_EQ(hashes(), "aaa bbb ccc ");
  write_file(repo / "refs" / "main", "gone");
  EXPECT_EQ(hashes(), "bbb ccc aaa ");
  std::filesystem::create_directories(folder / "models--org--model");
  EXPECT_EQ(cached_hub_ids(HubRepo::kDataset), std::vector<std::string>{"org/name"});
  EXPECT_EQ(cached_hub_ids(HubRepo::kModel), std::vector<std::string>{"org/model"});
}

// What is missing in a folder that is there is no id to download.
TEST(HubCacheTest, HintsAtWhatIsMissing) {
  const TempDir folder;
  const EnvironmentVariable cache("HF_HUB_CACHE", folder.path().string());
  const auto message_of = [](const std::string& path) {
    return std::string(testing::error_of([&] { resolve_model_path(path); }).what());
  };
  const std::string here = (folder / "latent-50").string();
  EXPECT_NE(message_of(here).find("is there, but nothing of that name in it"), std::string::npos)
      << message_of(here);
  std::filesystem::create_directory(folder / "latent-25");
  EXPECT_NE(message_of(here).find("did you mean " + (folder / "latent-25").string() + "?"),
            std::string::npos)
      << message_of(here);
  EXPECT_NE(message_of("org/latent-50").find("hint: hf download org/latent-50"), std::string::npos)
      << message_of("org/latent-50");
}

TEST(HubCacheTest, RevisionsAreRefsOrHashes) {
  const TempDir folder;
  const EnvironmentVariable cache("HF_HUB_CACHE", folder.path().string());
  const auto repo = folder / "models--org--name";
  for (const char* hash : {"aaa", "bbb", "ccc"}) {
    std::filesystem::create_directories(repo / "snapshots" / hash);
  }
  std::filesystem::create_directories(repo / "refs" / "pr");
  write_file(repo / "refs" / "main", "aaa");
  write_file(repo / "refs" / "v1.0", "bbb\n");
  write_file(repo / "refs" / "pr" / "2", "ccc");
  const auto resolve = [](const std::string& revision) {
    return resolve_model_path("org/name" + revision).filename();
  };
  EXPECT_EQ(resolve(""), "aaa");
  EXPECT_EQ(resolve("@main"), "aaa");
  EXPECT_EQ(resolve("@v1.0"), "bbb");
  EXPECT_EQ(resolve("@pr/2"), "ccc");
  EXPECT_EQ(resolve("@ccc"), "ccc");
  const auto message_of = [&](const std::string& revision) {
    return std::string(testing::error_of([&] { resolve(revision); }).what());
  };
  EXPECT_NE(message_of("@v2").find("no revision \"v2\""), std::string::npos) << message_of("@v2");
  for (const char* outside : {"@..", "@../../..", "@pr/../main", "@/etc"}) {
    EXPECT_NE(message_of(outside).find("is not a revision"), std::string::npos)
        << message_of(outside);
  }
}

TEST(HubCacheTest, FolderComesOfTheFirstVariableThatIsSet) {
  const EnvironmentVariable home("HOME", "/home/someone");
  const EnvironmentVariable xdg("XDG_CACHE_HOME", "");  // counts as unset
  const EnvironmentVariable hf_home("HF_HOME", "");
  const EnvironmentVariable old("HUGGINGFACE_HUB_CACHE", "");
  const EnvironmentVariable hub("HF_HUB_CACHE", "");
  EXPECT_EQ(hub_cache_folder(), "/home/someone/.cache/huggingface/hub");
  const EnvironmentVariable with_xdg("XDG_CACHE_HOME", "/x");
  EXPECT_EQ(hub_cache_folder(), "/x/huggingface/hub");
  const EnvironmentVariable with_home("HF_HOME", "/h");
  EXPECT_EQ(hub_cache_folder(), "/h/hub");
  const EnvironmentVariable with_old("HUGGINGFACE_HUB_CACHE", "/o");
  EXPECT_EQ(hub_cache_folder(), "/o");
  const EnvironmentVariable with_hub("HF_HUB_CACHE", "/c");
  EXPECT_EQ(hub_cache_folder(), "/c");
}

// The folder that huggingface_hub keeps, given as a path: at any place, with or without a slash.
TEST(HubCacheTest, ARepositorysFolderIsItsSnapshot) {
  const TempDir folder;
  const auto repo = folder / "models--org--name";
  const auto resolve = [&](const std::string& ending) {
    return resolve_model_path(repo.string() + ending);
  };
  std::filesystem::create_directory(repo);
  EXPECT_EQ(resolve(""), repo);  // no folder of a cache, whatever its name
  std::filesystem::create_directory(repo / "snapshots");
  const std::string message = testing::error_of([&] { resolve(""); }).what();
  EXPECT_NE(message.find("no snapshot in"), std::string::npos) << message;
  EXPECT_NE(message.find("hint: hf download org/name"), std::string::npos) << message;
  std::filesystem::create_directories(repo / "snapshots" / "aaa");
  std::filesystem::create_directories(repo / "snapshots" / "bbb");
  const auto now = std::filesystem::file_time_type::clock::now();
  std::filesystem::last_write_time(repo / "snapshots" / "aaa", now - std::chrono::hours(1));
  EXPECT_EQ(resolve("/").filename(), "bbb");
  std::filesystem::create_directory(repo / "refs");
  write_file(repo / "refs" / "main", "aaa");
  EXPECT_EQ(resolve(""), repo / "snapshots" / "aaa");
  EXPECT_EQ(resolve("/"), repo / "snapshots" / "aaa");
  EXPECT_EQ(resolve("/snapshots/bbb").filename(), "bbb");
}

}  // namespace
}  // namespace hla
