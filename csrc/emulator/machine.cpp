#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <random>

#include "banks.h"
#include "fiber.h"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace linlora::emulator {
namespace {

constexpr int64_t kMostPolls = 100000;

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
      : session_(session),
        grid_(grid),
        block_(block),
        shared_bytes_(shared_bytes),
        kernel_(kernel),
        random_(session.seed) {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) not_started_.push_back({x, y, z});
      }
    }
    if (session.seed != 0) std::shuffle(not_started_.begin(), not_started_.end(), random_);
  }

  void run();

  Session& session_;
  dim3 grid_, block_;
  size_t shared_bytes_;
  const std::function<void()>& kernel_;
  std::mt19937 random_;
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

thread_local Session* session = nullptr;
thread_local Machine* machine = nullptr;
thread_local Record record{};
thread_local std::vector<Stack> spare_stacks;

Stack a_stack() {
  if (spare_stacks.empty()) return Stack();
  Stack stack = std::move(spare_stacks.back());
  spare_stacks.pop_back();
  return stack;
}

void thread_entry() {
  machine->kernel_();
  if (machine->warp->meeting.arrived != 0) fail("a lane exits while others wait at %s", machine->warp->meeting.what);
  machine->lane->state = Lane::kDone;
  machine->lane->fiber.leave();
}

std::string at(const Warp& warp) {
  const uint3 block = warp.block->index;
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), warp %d", block.x, block.y, block.z, warp.index);
  return text;
}

void Machine::start_blocks() {
  const int threads = block_.x * block_.y * block_.z;
  while (!not_started_.empty() && static_cast<int>(resident_.size()) < session_.multiprocessors) {
    auto block = std::make_unique<Block>(shared_bytes_, threads / kWarpSize);
    block->index = not_started_.front();
    not_started_.pop_front();
    for (int i_warp = 0; i_warp < threads / kWarpSize; ++i_warp) {
      auto started = std::make_unique<Warp>();
      started->block = block.get();
      started->index = i_warp;
      started->clock.times[i_warp] = 1;
      started->lanes.reserve(kWarpSize);
      for (int i_lane = 0; i_lane < kWarpSize; ++i_lane) {
        const unsigned thread = i_warp * kWarpSize + i_lane;
        started->lanes.emplace_back(a_stack());
        started->lanes.back().index = {thread % block_.x, thread / block_.x % block_.y, thread / (block_.x * block_.y)};
      }
      const size_t place = session_.seed == 0 ? order_.size() : random_() % (order_.size() + 1);
      order_.insert(order_.begin() + place, started.get());
      block->warps.push_back(std::move(started));
    }
    resident_.push_back(std::move(block));
  }
}

Warp* Machine::choose() {
  for (Warp* each : order_) {
    if (each->can_run()) return each;
  }
  return nullptr;
}

// In turn: who ran goes last. At random: it keeps its place, but for one turn in 16. Who only looked at a flag goes
// last.
void Machine::reorder(Warp* ran) {
  polls_ = polled ? polls_ + 1 : 0;
  if (polls_ == kMostPolls) session_.error = "livelock: " + at(*ran) + " and others only look at flags";
  const bool last = session_.seed == 0 || polled;
  polled = false;
  if (!last && random_() % 16 != 0) return;
  order_.erase(std::find(order_.begin(), order_.end(), ran));
  order_.insert(last ? order_.end() : order_.begin() + random_() % (order_.size() + 1), ran);
}

void Machine::take_turn(Warp& next) {
  warp = &next;
  blockIdx = next.block->index;
  for (Lane& each : next.lanes) {
    if (each.state != Lane::kReady) continue;
    lane = &each;
    threadIdx = each.index;
    each.fiber.resume(thread_entry);
    if (!session_.error.empty()) return;
  }
}

void Machine::retire(Block& block) {
  order_.erase(std::remove_if(order_.begin(), order_.end(), [&](Warp* each) { return each->block == &block; }),
               order_.end());
  for (auto& each : block.warps) {
    for (Lane& done : each->lanes) spare_stacks.push_back(done.fiber.take_stack());
  }
  resident_.erase(std::find_if(resident_.begin(), resident_.end(), [&](auto& each) { return each.get() == &block; }));
}

std::string Machine::deadlock() const {
  std::string message = "deadlock:";
  for (const auto& block : resident_) {
    for (const auto& each : block->warps) {
      for (size_t i = 0; i < each->lanes.size();) {
        const Lane& first = each->lanes[i];
        auto same = [&](const Lane& other) {
          return other.state == first.state &&
                 (first.state != Lane::kWaiting || (other.condition->what == first.condition->what &&
                                                    other.condition->number == first.condition->number));
        };
        size_t end = i;
        while (end < each->lanes.size() && same(each->lanes[end])) ++end;
        if (first.state != Lane::kDone) {
          message += "\n  " + at(*each) + ", lanes " + std::to_string(i) + "-" + std::to_string(end - 1) + " wait for ";
          message += first.state == Lane::kMeeting
                         ? std::string("the warp at ") + each->meeting.what
                         : std::string(first.condition->what) + " " + std::to_string(first.condition->number);
        }
        i = end;
      }
    }
  }
  return message;
}

void Machine::run() {
  blockDim = block_;
  gridDim = grid_;
  for (start_blocks(); !resident_.empty(); start_blocks()) {
    Warp* next = choose();
    if (next == nullptr) {
      session_.error = deadlock();
      return;
    }
    take_turn(*next);
    reorder(next);
    if (!session_.error.empty()) return;
    Block& block = *next->block;
    if (next->done() && std::all_of(block.warps.begin(), block.warps.end(), [](auto& each) { return each->done(); })) {
      retire(block);
    }
  }
}

void check_race(const char* race, const char* access, uint32_t address, size_t bytes) {
  if (race != nullptr) fail("%s of %zu bytes of shared memory at %u races with %s", access, bytes, address, race);
}

unsigned char* shared(uint32_t address, size_t bytes, const char* access) {
  if (address < kSharedBase || address + bytes > machine->warp->block->memory.size()) {
    fail("%s of %zu bytes at shared address %u: the block has %zu bytes from %u on", access, bytes, address,
         machine->shared_bytes_, kSharedBase);
  }
  return machine->warp->block->memory.data() + address;
}

void arrive(Barrier& barrier, int id, int threads) {
  if (threads <= 0 || threads % kWarpSize != 0) fail("barrier %d for %d threads: not a multiple of 32", id, threads);
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) fail("barrier %d for %d threads and for %d", id, barrier.expected, threads);
  release(barrier.gathered);
  if (++barrier.arrived == threads) {
    barrier.published.learn(barrier.gathered);
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

Barrier& barrier_of(int id) {
  if (id < 0 || id >= 16) fail("barrier %d: there are 0 to 15", id);
  return machine->warp->block->barriers[id];
}

}  // namespace

Session::Session(int multiprocessors, unsigned seed) : multiprocessors(multiprocessors), seed(seed) { session = this; }
Session::~Session() { session = nullptr; }
Session& Session::current() { return *session; }
void Session::allocate(Allocation allocation) { allocations.push_back(std::move(allocation)); }

bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block.x * block.y * block.z % kWarpSize != 0) {
    session->error = "a block of " + std::to_string(block.x * block.y * block.z) + " threads is not a number of warps";
    return false;
  }
  record = {int64_t{grid.x} * grid.y * grid.z, int64_t{block.x} * block.y * block.z, static_cast<int64_t>(shared_bytes),
            0};
  Machine launched(*session, grid, block, shared_bytes, kernel);
  machine = &launched;
  launched.run();
  machine = nullptr;
  return session->error.empty();
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine->session_.error =
      at(*machine->warp) + ", lane " + std::to_string(machine->lane - machine->warp->lanes.data()) + ": " + text;
  machine->lane->fiber.leave();
  __builtin_unreachable();
}

void yield() {
  machine->polled = true;
  machine->lane->fiber.leave();
}

bool lucky() { return machine->session_.seed != 0 && machine->random_() % 2 == 0; }

void wait(const Wait* condition) {
  machine->lane->condition = condition;
  machine->lane->state = Lane::kWaiting;
  machine->lane->fiber.leave();
}

void meet(const char* what, void* mine, const std::function<void(void* const*)>& compute) {
  Warp& warp = *machine->warp;
  Meeting& meeting = warp.meeting;
  if (meeting.arrived != 0 && meeting.what != what) fail("is at %s, other lanes of its warp at %s", what, meeting.what);
  meeting.what = what;
  meeting.arguments[machine->lane - warp.lanes.data()] = mine;
  if (++meeting.arrived < kWarpSize) {
    machine->lane->state = Lane::kMeeting;
    machine->lane->fiber.leave();
    return;
  }
  compute(meeting.arguments);
  record.bank_conflicts += warp.accesses.count_and_clear();
  meeting.arrived = 0;
  for (Lane& each : warp.lanes) each.state = Lane::kReady;
}

void barrier(int id, int threads) {
  Barrier& barrier = barrier_of(id);
  const int64_t generation = barrier.generation;
  arrive(barrier, id, threads);
  wait_until([&barrier, generation] { return barrier.generation != generation; }, "barrier", id);
  acquire(barrier.published);
}

void barrier_arrive(int id, int threads) { arrive(barrier_of(id), id, threads); }

const void* shared_read(uint32_t address, size_t bytes) {
  const void* memory = shared(address, bytes, "read");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.read(address - kSharedBase, bytes, warp.index, warp.clock), "a read", address, bytes);
  return memory;
}

void* shared_write(uint32_t address, size_t bytes) {
  void* memory = shared(address, bytes, "write");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.write(address - kSharedBase, bytes, warp.index, warp.clock), "a write", address, bytes);
  return memory;
}

void* begin_shared_write(uint32_t address, size_t bytes) {
  void* memory = shared(address, bytes, "asynchronous write");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.begin_write(address - kSharedBase, bytes, warp.clock), "an asynchronous write", address,
             bytes);
  return memory;
}

void end_shared_write(uint32_t address, size_t bytes) {
  Warp& warp = *machine->warp;
  warp.block->shadow.end_write(address - kSharedBase, bytes, warp.index, warp.clock);
}

const void* begin_shared_read(uint32_t address, size_t bytes) {
  const void* memory = shared(address, bytes, "asynchronous read");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.begin_read(address - kSharedBase, bytes, warp.clock), "an asynchronous read", address,
             bytes);
  return memory;
}

void end_shared_read(uint32_t address, size_t bytes) {
  Warp& warp = *machine->warp;
  warp.block->shadow.end_read(address - kSharedBase, bytes, warp.index, warp.clock);
}

void count_access(uint32_t address, uint32_t bytes) {
  machine->warp->accesses.add(static_cast<int>(machine->lane - machine->warp->lanes.data()), address, bytes);
}

void count_rows(const std::vector<uint32_t>& addresses) { record.bank_conflicts += bank_conflicts(addresses, 16); }

extern "C" const Record* emulated_launch() { return &record; }

void check_global(const void* address, size_t bytes, Access access) {
  for (const Allocation& tensor : session->allocations) {
    auto contains = [&](const char* byte) {
      if (byte < tensor.data) return false;
      const int64_t element = (byte - tensor.data) / tensor.element_bytes;
      // The stride of a dimension of one element means nothing.
      const bool rows_outer = tensor.columns == 1 || (tensor.rows > 1 && tensor.row_stride >= tensor.column_stride);
      const int64_t outer_stride = rows_outer ? tensor.row_stride : tensor.column_stride,
                    inner_stride = rows_outer ? tensor.column_stride : tensor.row_stride,
                    outer = outer_stride == 0 ? 0 : element / outer_stride, rest = element - outer * outer_stride,
                    inner = inner_stride == 0 ? 0 : rest / inner_stride;
      return rest == inner * inner_stride && outer < (rows_outer ? tensor.rows : tensor.columns) &&
             inner < (rows_outer ? tensor.columns : tensor.rows);
    };
    const char* first = static_cast<const char*>(address);
    if (!contains(first) || !contains(first + bytes - 1)) continue;
    if (access == Access::kWrite && !tensor.writable) fail("writes to %s, an input", tensor.name.c_str());
    return;
  }
  for (const Allocation& tensor : session->allocations) {
    const int64_t offset = (static_cast<const char*>(address) - tensor.data) / tensor.element_bytes;
    const int64_t last = (tensor.rows - 1) * tensor.row_stride + (tensor.columns - 1) * tensor.column_stride;
    if (-4096 < offset && offset < last + 4096) {
      fail("%zu bytes at element %lld are outside of %s (%lld, %lld)", bytes, static_cast<long long>(offset),
           tensor.name.c_str(), static_cast<long long>(tensor.rows), static_cast<long long>(tensor.columns));
    }
  }
  fail("%zu bytes at %p lie in no tensor", bytes, address);
}

void release(Clock& clock) {
  Warp& warp = *machine->warp;
  clock.learn(warp.clock);
  ++warp.clock.times[warp.index];
}

void acquire(const Clock& clock) { machine->warp->clock.learn(clock); }

Slots& thread_slots() { return machine->lane->slots; }
Slots& warp_slots() { return machine->warp->slots; }
Slots& block_slots() { return machine->warp->block->slots; }
int next_slot() {
  static int slots = 0;
  return slots++;
}

}  // namespace linlora::emulator
