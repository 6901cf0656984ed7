#include "machine.h"

#include <cstdarg>
#include <cstdio>

#include "scheduler.h"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace linlora::emulator {

thread_local Machine* machine = nullptr;
thread_local Record record{};

namespace {

constexpr int64_t kMostPolls = 100000;

thread_local Session* current_session = nullptr;
thread_local std::vector<Stack> spare_stacks;

Stack a_stack() {
  if (spare_stacks.empty()) return Stack();
  Stack stack = std::move(spare_stacks.back());
  spare_stacks.pop_back();
  return stack;
}

void thread_entry() {
  machine->kernel();
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

}  // namespace

void Machine::start_blocks() {
  const dim3 shape = block_shape;
  const int threads = shape.x * shape.y * shape.z;
  while (!not_started_.empty() && static_cast<int>(resident_.size()) < session.multiprocessors) {
    auto block = std::make_unique<Block>(shared_bytes, threads / kWarpSize);
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
        started->lanes.back().index = {thread % shape.x, thread / shape.x % shape.y, thread / (shape.x * shape.y)};
      }
      const size_t place = session.seed == 0 ? order_.size() : random() % (order_.size() + 1);
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
  if (polls_ == kMostPolls) session.error = "livelock: " + at(*ran) + " and others only look at flags";
  const bool last = session.seed == 0 || polled;
  polled = false;
  if (!last && random() % 16 != 0) return;
  order_.erase(std::find(order_.begin(), order_.end(), ran));
  order_.insert(last ? order_.end() : order_.begin() + random() % (order_.size() + 1), ran);
}

void Machine::take_turn(Warp& next) {
  warp = &next;
  blockIdx = next.block->index;
  for (Lane& each : next.lanes) {
    if (each.state != Lane::kReady) continue;
    lane = &each;
    threadIdx = each.index;
    each.fiber.resume(thread_entry);
    if (!session.error.empty()) return;
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
  blockDim = block_shape;
  gridDim = grid_shape;
  for (start_blocks(); !resident_.empty(); start_blocks()) {
    Warp* next = choose();
    if (next == nullptr) {
      session.error = deadlock();
      return;
    }
    take_turn(*next);
    reorder(next);
    if (!session.error.empty()) return;
    Block& block = *next->block;
    if (next->done() && std::all_of(block.warps.begin(), block.warps.end(), [](auto& each) { return each->done(); })) {
      retire(block);
    }
  }
}

namespace {

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

Session::Session(int multiprocessors, unsigned seed) : multiprocessors(multiprocessors), seed(seed) {
  current_session = this;
}
Session::~Session() { current_session = nullptr; }
Session& Session::current() { return *current_session; }
void Session::allocate(Allocation allocation) { allocations.push_back(std::move(allocation)); }

bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block.x * block.y * block.z % kWarpSize != 0) {
    current_session->error =
        "a block of " + std::to_string(block.x * block.y * block.z) + " threads is not a number of warps";
    return false;
  }
  record = {int64_t{grid.x} * grid.y * grid.z, int64_t{block.x} * block.y * block.z, static_cast<int64_t>(shared_bytes),
            0};
  Machine launched(*current_session, grid, block, shared_bytes, kernel);
  machine = &launched;
  launched.run();
  machine = nullptr;
  return current_session->error.empty();
}

extern "C" const Record* emulated_launch() { return &record; }

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine->session.error =
      at(*machine->warp) + ", lane " + std::to_string(machine->lane - machine->warp->lanes.data()) + ": " + text;
  machine->lane->fiber.leave();
  __builtin_unreachable();
}

void yield() {
  machine->polled = true;
  machine->lane->fiber.leave();
}

bool lucky() { return machine->session.seed != 0 && machine->random() % 2 == 0; }

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
