// Clusters on the emulated machine. A cluster is one of its blocks: the warps of CTA 0, those of CTA 1, and one more
// that plays the asynchronous engine (TMA). So vector clocks and shadow memory cover both CTAs, and the engine.
//
// Shared memory has the addresses of hardware: those below 2^24 mean the thread's own CTA, above it in_cta names a CTA.
#pragma once

#include <deque>
#include <map>
#include <unordered_map>
#include <utility>

#include "ptx.h"

#define __cluster_dims__(...)

namespace linlora::emulator {

struct Clusters {
  int launched = 1;                       // clusters of a launch, if there are tiles enough
  int threads = 0;                        // of a CTA
  uint32_t shared_bytes = 0, stride = 0;  // of a CTA, and from CTA 0's shared memory to CTA 1's
  static Clusters& current() {
    static thread_local Clusters clusters;
    return clusters;
  }
};

inline int cta_of_thread() { return static_cast<int>(threadIdx.x) / Clusters::current().threads; }

// Where the machine has what the thread calls `address`.
inline uint32_t in_machine(uint32_t address, uint32_t bytes) {
  const Clusters& clusters = Clusters::current();
  const uint32_t named = address >> 24, offset = address & 0xFFFFFF;
  if (offset < kSharedBase || offset + bytes > kSharedBase + clusters.shared_bytes || named > 2) {
    fail("%u bytes at shared address %#x are outside of the CTA's %u bytes", bytes, address, clusters.shared_bytes);
  }
  return offset + (named == 0 ? cta_of_thread() : named - 1) * clusters.stride;
}

// What the asynchronous engine has to do, in any order.
struct Engine {
  std::deque<std::function<void()>> queue;
  int finished = 0;  // threads of the cluster

  void run() {
    const int threads = 2 * Clusters::current().threads;
    for (;;) {
      wait_until([&] { return !queue.empty() || finished == threads; }, "asynchronous copies");
      if (queue.empty()) return;
      while (lucky() && lucky()) yield();
      size_t choice = 0;
      while (choice + 1 < queue.size() && lucky()) ++choice;
      const std::function<void()> copy = queue[choice];
      queue.erase(queue.begin() + choice);
      copy();
    }
  }
};

// ---- what threads have written, and TMA must not read before a fence between the proxies

// Addresses of words -> the number of the writer's fence; kUnfenced before it.
class GenericWrites {
 public:
  static constexpr int64_t kUnfenced = INT64_MAX;

  // Of all clusters: global memory.
  static GenericWrites& global() {
    static thread_local GenericWrites writes;
    return writes;
  }

  void write(uintptr_t address, size_t bytes, std::vector<uintptr_t>& of_thread) {
    for (size_t word = 0; word < bytes; word += 4) {
      fences_[address + word] = kUnfenced;
      of_thread.push_back(address + word);
    }
  }

  // By the writer, or by the reader: returns the number of the fence.
  int64_t fence(std::vector<uintptr_t>& of_thread) {
    ++last_;
    for (uintptr_t word : of_thread) fences_[word] = last_;
    of_thread.clear();
    return last_;
  }

  // Is there a fence of the writer, and one of the reader after it?
  void check(uintptr_t address, size_t bytes, int64_t fence_of_reader, const char* what) const {
    if (fences_.empty()) return;
    for (uintptr_t word = address & ~uintptr_t{3}; word < address + bytes; word += 4) {
      const auto found = fences_.find(word);
      if (found == fences_.end()) continue;
      if (found->second == kUnfenced) fail("%s reads what a thread wrote without a fence.proxy.async after it", what);
      if (found->second >= fence_of_reader) {
        fail("%s reads what a thread wrote, without a fence.proxy.async of its own after the writer's", what);
      }
    }
  }

  void clear() {
    fences_.clear();
    last_ = 0;
  }

 private:
  std::unordered_map<uintptr_t, int64_t> fences_;
  int64_t last_ = 0;
};

struct ThreadWrites {
  std::vector<uintptr_t> global, shared;
  int64_t last_fence = 0;  // between the proxies of global memory
};

template <class Kernel>
bool run_clusters(int clusters, int threads, size_t shared_bytes, const Kernel& kernel) {
  Clusters& shape = Clusters::current();
  shape.threads = threads;
  shape.shared_bytes = static_cast<uint32_t>(shared_bytes);
  shape.stride = static_cast<uint32_t>((shared_bytes + 1023) / 1024 * 1024);
  GenericWrites::global().clear();
  return run(dim3{static_cast<unsigned>(clusters)}, dim3{static_cast<unsigned>(2 * threads + kWarpSize)},
             2 * shape.stride, [&kernel, threads] {
               Engine& engine = block_state<Engine>();
               if (static_cast<int>(threadIdx.x) < 2 * threads) {
                 kernel();
                 ++engine.finished;
               } else if (static_cast<int>(threadIdx.x) == 2 * threads) {
                 engine.run();
               }
             });
}

}  // namespace linlora::emulator
