// Clusters on the emulated machine. A cluster is one of its blocks: the warps of CTA 0, those of CTA 1, and one more
// that plays the asynchronous engine (TMA). So vector clocks and shadow memory cover both CTAs, and the engine.
//
// Shared memory has the addresses of hardware: those below 2^24 mean the thread's own CTA, above it in_cta names a CTA.
#pragma once

#include <deque>
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

inline int warp_of_cluster() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// What the thread's warp knows; the warp's own time is that of what it did last.
inline Clock knowledge() {
  Clock clock;
  release(clock);
  return clock;
}

// A CTA's shared memory goes when its last thread does: not before all that the other CTA does to it.
struct Exits {
  int exited[2] = {};  // threads
  Clock reached[2];    // by the warps of the other CTA

  void reach(int cta) {
    if (exited[cta] == Clusters::current().threads)
      fail("reaches into the shared memory of CTA %d, which is gone", cta);
    const int warp = warp_of_cluster();
    reached[cta].times[warp] = knowledge().times[warp];
  }

  void exit() {
    const int cta = cta_of_thread();
    if (++exited[cta] < Clusters::current().threads) return;
    const Clock known = knowledge();
    for (int warp = 0; warp < kMaxWarps; ++warp) {
      if (reached[cta].times[warp] > known.times[warp]) {
        fail("exits while warp %d of the cluster may still reach into its shared memory", warp);
      }
    }
  }
};

// Where the machine has what the thread calls `address`.
inline uint32_t in_machine(uint32_t address, uint32_t bytes) {
  const Clusters& clusters = Clusters::current();
  const uint32_t named = address >> 24, offset = address & 0xFFFFFF;
  if (offset < kSharedBase || offset + bytes > kSharedBase + clusters.shared_bytes || named > 2) {
    fail("%u bytes at shared address %#x are outside of the CTA's %u bytes", bytes, address, clusters.shared_bytes);
  }
  const int own = cta_of_thread(), cta = named == 0 ? own : static_cast<int>(named) - 1;
  if (cta != own) block_state<Exits>().reach(cta);
  return offset + cta * clusters.stride;
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

template <class Kernel>
bool run_clusters(int clusters, int threads, size_t shared_bytes, const Kernel& kernel) {
  Clusters& shape = Clusters::current();
  shape.threads = threads;
  shape.shared_bytes = static_cast<uint32_t>(shared_bytes);
  shape.stride = static_cast<uint32_t>((shared_bytes + 1023) / 1024 * 1024);
  return run(dim3{static_cast<unsigned>(clusters)}, dim3{static_cast<unsigned>(2 * threads + kWarpSize)},
             2 * shape.stride, [&kernel, threads] {
               Engine& engine = block_state<Engine>();
               if (static_cast<int>(threadIdx.x) < 2 * threads) {
                 kernel();
                 block_state<Exits>().exit();
                 ++engine.finished;
               } else if (static_cast<int>(threadIdx.x) == 2 * threads) {
                 engine.run();
               }
             });
}

}  // namespace linlora::emulator
