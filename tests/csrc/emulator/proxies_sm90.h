// What threads write and TMA reads. Between the two lie a fence between the proxies by the writer, one by the reader,
// and, in global memory, a flag that says so.
#pragma once

#include <map>
#include <unordered_map>

#include "cluster_sm90.h"

namespace linlora::emulator {

// What the clusters have told one another through flags in global memory: of each cluster a clock.
using Publications = std::map<unsigned, Clock>;

inline std::map<const uint32_t*, Publications>& publications() {
  static thread_local std::map<const uint32_t*, Publications> of_flags;
  return of_flags;
}

inline void learn(Publications& mine, const Publications& theirs) {
  for (const auto& [cluster, clock] : theirs) mine[cluster].learn(clock);
}

// With the flag goes what the warp knows, and what its cluster has learned of others.
inline void publish(const uint32_t* flag) {
  auto& known = block_state<Publications>();
  known[blockIdx.x].learn(knowledge());
  learn(publications()[flag], known);
}

inline void learn_from(const uint32_t* flag) { learn(block_state<Publications>(), publications()[flag]); }

class GenericWrites {
 public:
  // Of all clusters: global memory.
  static GenericWrites& global() {
    static thread_local GenericWrites writes;
    return writes;
  }

  void write(uintptr_t address, size_t bytes, std::vector<uintptr_t>& of_thread) {
    const int warp = warp_of_cluster();
    const uint32_t time = knowledge().times[warp];
    for (size_t word = 0; word < bytes; word += 4) {
      writes_[address + word] = {kUnfenced, blockIdx.x, warp, time};
      of_thread.push_back(address + word);
    }
  }

  // By the writer, or by the reader: returns the number of the fence.
  int64_t fence(std::vector<uintptr_t>& of_thread) {
    ++last_;
    for (uintptr_t word : of_thread) writes_[word].fence = last_;
    of_thread.clear();
    return last_;
  }

  // Before TMA reads from shared memory, whose order the race detector watches.
  void check_fence(uintptr_t address, size_t bytes) const {
    for_writes(address, bytes, [](const Write& write) { check_writer(write); });
  }

  // Before TMA reads from global memory.
  void check(uintptr_t address, size_t bytes, int64_t fence_of_reader) const {
    if (writes_.empty()) return;
    const Clock own = knowledge();
    auto& published = block_state<Publications>();
    for_writes(address, bytes, [&](const Write& write) {
      const bool known = published[write.cluster].times[write.warp] >= write.time ||
                         (write.cluster == blockIdx.x && own.times[write.warp] >= write.time);
      if (!known) fail("TMA reads what warp %d of cluster %u wrote and no flag has told of", write.warp, write.cluster);
      check_writer(write);
      if (write.fence >= fence_of_reader) {
        fail("TMA reads what a thread wrote, without a fence.proxy.async of the reader after the writer's");
      }
    });
  }

  void clear() { writes_.clear(); }

 private:
  static constexpr int64_t kUnfenced = INT64_MAX;

  struct Write {
    int64_t fence;  // the number of the writer's
    unsigned cluster;
    int warp;
    uint32_t time;
  };

  static void check_writer(const Write& write) {
    if (write.fence == kUnfenced) fail("TMA reads what a thread wrote without a fence.proxy.async after it");
  }

  template <class Visit>
  void for_writes(uintptr_t address, size_t bytes, Visit visit) const {
    for (uintptr_t word = address & ~uintptr_t{3}; word < address + bytes; word += 4) {
      const auto found = writes_.find(word);
      if (found != writes_.end()) visit(found->second);
    }
  }

  std::unordered_map<uintptr_t, Write> writes_;  // by word
  int64_t last_ = 0;
};

// Words that the thread has written and not fenced, and the number of its last fence.
struct ThreadWrites {
  std::vector<uintptr_t> global, shared;
  int64_t last_fence = 0;
};

}  // namespace linlora::emulator
