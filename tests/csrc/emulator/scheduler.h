// What a launch consists of while it runs, and who runs next; of the machine's own sources only.
#pragma once

#include <algorithm>
#include <deque>
#include <random>

#include "banks.h"
#include "fiber.h"
#include "machine.h"

namespace linlora::emulator {

struct Block;

struct Lane {
  explicit Lane(Stack stack) : fiber(std::move(stack)) {}
  Fiber fiber;
  enum { kReady, kWaiting, kMeeting, kDone } state = kReady;
  const Wait* condition = nullptr;
  uint3 index{};
  Slots slots;
};

// Where the lanes of a warp meet for a collective instruction.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  void* arguments[kWarpSize];
};

struct Warp {
  Block* block;
  int index;
  std::vector<Lane> lanes;
  Meeting meeting;
  Clock clock;
  BankLog accesses;
  Slots slots;

  bool can_run() {
    bool some = false;
    for (Lane& lane : lanes) {
      if (lane.state == Lane::kWaiting && lane.condition->over(lane.condition)) lane.state = Lane::kReady;
      some |= lane.state == Lane::kReady;
    }
    return some;
  }
  bool done() const {
    return std::all_of(lanes.begin(), lanes.end(), [](const Lane& lane) { return lane.state == Lane::kDone; });
  }
};

struct Barrier {
  int expected = 0, arrived = 0;
  int64_t generation = 0;
  Clock gathered, published;
};

struct Block {
  Block(size_t shared_bytes, int warps) : memory(shared_bytes + kSharedBase, 0xFF), shadow(shared_bytes, warps) {}
  uint3 index{};
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<unsigned char> memory;  // poisoned: all ones are a NaN in every type
  Shadow shadow;
  Barrier barriers[16];
  Slots slots;
};

class Machine {
 public:
  Machine(Session& session, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel)
      : session(session),
        grid_shape(grid),
        block_shape(block),
        shared_bytes(shared_bytes),
        kernel(kernel),
        random(session.seed) {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) not_started_.push_back({x, y, z});
      }
    }
    if (session.seed != 0) std::shuffle(not_started_.begin(), not_started_.end(), random);
  }

  void run();

  Session& session;
  dim3 grid_shape, block_shape;
  size_t shared_bytes;
  const std::function<void()>& kernel;
  std::mt19937 random;
  Warp* warp = nullptr;  // whose turn it is
  Lane* lane = nullptr;
  bool polled = false;  // some lane yielded in this turn

 private:
  void start_blocks();
  Warp* choose();
  void take_turn(Warp& next);
  void reorder(Warp* ran);
  void retire(Block& block);
  std::string deadlock() const;

  std::deque<uint3> not_started_;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<Warp*> order_;  // the first that can run, runs
  int64_t polls_ = 0;         // turns in a row that ended in a yield
};

extern thread_local Machine* machine;  // that runs now
extern thread_local Record record;     // of its launch

}  // namespace linlora::emulator
