// The emulated machine: runs a kernel, compiled by the host's C++ compiler, as fibers on one thread of the CPU.
//
// Every CUDA thread is a fiber, `multiprocessors` blocks are resident at a time. A fiber runs until it waits; then the
// machine goes on with another warp: in turn (seed 0), or under random priorities that now and then change (any other
// seed), in which one warp or block runs as far ahead of the others as synchronization lets it. A launch fails, with a
// message that says where, when all fibers wait (deadlock), when lanes of a warp meet at different collective
// instructions, on any access outside of a tensor or of shared memory, and on a race in shared memory (clocks.h).
//
// To add an emulated primitive, write a function with the name and parameters of its device twin, out of these parts:
//   * what all lanes of a warp do together (mma, ldmatrix, shuffle):   collective("name", mine, compute)
//   * whatever waits for something to become true:                     wait_until(predicate, "what", number)
//   * atomics and flags:                                               yield() before and after the plain C++ access
//   * shared memory, by 32-bit address:                                shared_read, shared_write (checked pointers)
//   * shared memory, asynchronously: from issue to completion          begin_/end_shared_write, begin_/end_shared_read
//   * global memory:                                                   check_global(pointer, bytes, Access) first
//   * ordering, for the race detector:                                 release(clock) where a warp signals,
//                                                                      acquire(clock) where another has seen it
//   * state of a primitive: thread_state<T>(), warp_state<T>(), block_state<T>() (a T of its own for each, made when
//     first asked for), e.g. the copies in flight of a thread, the mbarriers of a block
//   * the count of bank conflicts:                                     count_access(address, bytes)
//   * anything that the PTX ISA calls undefined:                       fail("what was wrong", ...)
// emulator/ptx.h is the example to follow. An asynchronous effect should happen as late as the ISA allows, or as early:
// lucky() tosses a coin for this under a random schedule and says no at seed 0.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "language.h"

namespace linlora::emulator {

constexpr int kWarpSize = 32;
// Where dynamic shared memory begins in the shared window; aligned so that swizzles of addresses work out.
constexpr uint32_t kSharedBase = 1024;

// One tensor of global memory; `check_global` accepts the elements of it and nothing else.
struct Allocation {
  std::string name;
  char* data;
  int64_t rows, columns, row_stride, column_stride;  // strides in elements
  int64_t element_bytes;
  bool writable;
};

// How and on what the launches of its lifetime run; one at a time. `error` is the first failure, empty if there is
// none.
class Session {
 public:
  Session(int multiprocessors, unsigned seed);
  ~Session();
  Session(const Session&) = delete;

  void allocate(Allocation allocation);
  static Session& current();

  const int multiprocessors;
  const unsigned seed;
  std::vector<Allocation> allocations;
  std::string error;
};

// What the last launch was, for tests to look at.
struct Record {
  int64_t blocks, threads, shared_bytes, bank_conflicts;
};
extern "C" const Record* emulated_launch();

// Runs `kernel` in every thread of the grid. False when it failed: Session::error says how.
bool run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// ---- what primitives are made of; all of it is called by a running fiber

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void yield();
bool lucky();

struct Wait {
  bool (*over)(const Wait*);
  const char* what;
  int64_t number;
};

void wait(const Wait* condition);

template <class Predicate>
void wait_until(Predicate predicate, const char* what, int64_t number = 0) {
  struct Condition : Wait {
    Predicate predicate;
  };
  Condition condition{{[](const Wait* self) { return static_cast<const Condition*>(self)->predicate(); }, what, number},
                      predicate};
  if (!predicate()) wait(&condition);
}

void meet(const char* what, void* mine, const std::function<void(void* const*)>& compute);

// Every lane of the warp comes with its argument; the last to come computes for all of them.
template <class Argument, class Compute>
void collective(const char* what, Argument& mine, Compute compute) {
  meet(what, &mine, [&](void* const* lanes) { compute(reinterpret_cast<Argument* const*>(lanes)); });
}

void barrier(int id, int threads);         // bar.sync
void barrier_arrive(int id, int threads);  // bar.arrive

const void* shared_read(uint32_t address, size_t bytes);
void* shared_write(uint32_t address, size_t bytes);
void* begin_shared_write(uint32_t address, size_t bytes);
void end_shared_write(uint32_t address, size_t bytes);
const void* begin_shared_read(uint32_t address, size_t bytes);
void end_shared_read(uint32_t address, size_t bytes);

// Reports an access of this lane, or of eight rows of a matrix, to the count of bank conflicts.
void count_access(uint32_t address, uint32_t bytes);
void count_rows(const std::vector<uint32_t>& addresses);

enum class Access { kRead, kWrite };
void check_global(const void* address, size_t bytes, Access access);

void release(Clock& clock);
void acquire(const Clock& clock);

using Slots = std::vector<std::shared_ptr<void>>;
Slots& thread_slots();
Slots& warp_slots();
Slots& block_slots();
int next_slot();

template <class State>
State& state_in(Slots& slots) {
  static const size_t slot = next_slot();
  if (slots.size() <= slot) slots.resize(slot + 1);
  if (!slots[slot]) slots[slot] = std::make_shared<State>();
  return *static_cast<State*>(slots[slot].get());
}

template <class State>
State& thread_state() {
  return state_in<State>(thread_slots());
}

template <class State>
State& warp_state() {
  return state_in<State>(warp_slots());
}

template <class State>
State& block_state() {
  return state_in<State>(block_slots());
}

}  // namespace linlora::emulator
