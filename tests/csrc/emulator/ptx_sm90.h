// The primitives of ptx_sm90.cuh on the host, after the PTX ISA.
#pragma once

#include "proxies_sm90.h"

namespace linlora {
namespace emulator {

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet there; TMA may be ahead of the announcement
  int64_t phase = 0;  // phases that are over
  Clock gathered, published;

  void settle() {
    if (pending != 0 || bytes != 0) return;
    published.learn(gathered);
    pending = count;
    ++phase;
  }

  void arrive() {
    if (pending == 0) fail("more than %d arrivals at an mbarrier", count);
    release(gathered);
    --pending;
    settle();
  }

  void complete(int64_t arrived) {
    release(gathered);
    bytes -= arrived;
    settle();
  }
};

using Mbarriers = std::map<uint32_t, Mbarrier>;

inline Mbarrier& mbarrier_at(uint32_t address) {
  const uint32_t place = in_machine(address, 8);
  auto& barriers = block_state<Mbarriers>();
  const auto found = barriers.find(place);
  if (found == barriers.end()) fail("no mbarrier has been initialised at %#x", address);
  shared_read(place, 8);  // ordered after the initialisation
  return found->second;
}

struct StoreGroup {
  int reading = 0;
  Clock clock;
};

struct StoreGroups {
  std::shared_ptr<StoreGroup> open = std::make_shared<StoreGroup>();
  std::deque<std::shared_ptr<StoreGroup>> committed;
};

// The rows of a box that lie in the tensor, as (row of the box, first byte in the tensor, first byte in the row,
// bytes).
template <class Visit>
void for_rows(const sm90::TensorMap& map, int column, int row, int layer, Visit visit) {
  const auto& shape = map.shape;
  const int64_t first = std::max<int64_t>(column, 0), end = std::min<int64_t>(column + 64, shape.columns);
  if (first >= end || layer < 0 || layer >= static_cast<int64_t>(shape.layers)) return;
  for (int64_t i = 0; i < map.box_rows(); ++i) {
    if (row + i < 0 || row + i >= static_cast<int64_t>(shape.rows)) continue;
    const int64_t element = layer * shape.layer_stride + (row + i) * shape.row_stride + first;
    visit(i, static_cast<char*>(shape.data) + 2 * element, 2 * (first - column), 2 * (end - first));
  }
}

// Byte `byte` of row `row` of a box: the 16-byte units of 128 bytes are exchanged by bits 7 to 9 of the address.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
inline uint32_t in_box(int64_t row, int64_t byte) { return swizzled(static_cast<uint32_t>(row * 128 + byte)); }

inline void check_box(uint32_t address) {
  // The pattern is one of addresses; boxes at multiples of 1024 bytes begin at its beginning.
  if (address % 1024 != 0) fail("a box of TMA at %#x: not at a multiple of 1024 bytes", address);
}

inline void load_box(uint32_t destination, const sm90::TensorMap& map, uint32_t barrier, int column, int row, int layer,
                     int first_cta, int last_cta) {
  check_box(destination);
  const uint32_t bytes = static_cast<uint32_t>(map.box_rows()) * 128;
  auto data = std::make_shared<std::vector<char>>(bytes, 0);
  auto read = [data, map, column, row, layer] {
    for_rows(map, column, row, layer, [&](int64_t i, const char* source, int64_t first, int64_t count) {
      for (int64_t byte = 0; byte < count; byte += 2) std::memcpy(&(*data)[in_box(i, first + byte)], source + byte, 2);
    });
  };
  for_rows(map, column, row, layer, [](int64_t, const char* source, int64_t, int64_t count) {
    check_global(source, count, Access::kRead);
    const int64_t last_fence = thread_state<ThreadWrites>().last_fence;
    GenericWrites::global().check(reinterpret_cast<uintptr_t>(source), count, last_fence);
  });
  const bool early = lucky();
  if (early) read();
  for (int cta = first_cta; cta <= last_cta; ++cta) {
    const uint32_t tag = static_cast<uint32_t>(cta + 1) << 24, place = in_machine(destination | tag, bytes);
    void* memory = begin_shared_write(place, bytes);
    Mbarrier& announced = mbarrier_at(barrier | tag);
    Clock issued;
    release(issued);
    block_state<Engine>().queue.push_back([=, &announced] {
      acquire(issued);
      if (!early) read();
      std::memcpy(memory, data->data(), bytes);
      end_shared_write(place, bytes);
      announced.complete(bytes);
    });
  }
}

}  // namespace emulator

namespace sm90 {

inline cudaError_t cluster_count(int& count) {
  count = emulator::Clusters::current().launched;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int clusters, int threads, size_t shared_bytes, cudaStream_t,
                            const Arguments&... arguments) {
  auto thread = [&] {
    kernel(arguments...);
    if (!emulator::thread_state<emulator::StoreGroups>().committed.empty()) {
      emulator::fail("exits without waiting for its stores: TMA may still read its shared memory");
    }
  };
  emulator::GenericWrites::global().clear();
  emulator::publications().clear();
  return emulator::run_clusters(clusters, threads, shared_bytes, thread) ? cudaSuccess : cudaErrorLaunchFailure;
}

inline int thread_of_cta() { return static_cast<int>(threadIdx.x) % emulator::Clusters::current().threads; }
inline int cta_of_cluster() { return emulator::cta_of_thread(); }
inline int clusters() { return static_cast<int>(gridDim.x); }
inline void cluster_sync() {
  constexpr int kId = 15;
  emulator::barrier(kId, 2 * emulator::Clusters::current().threads);
}
inline uint32_t in_cta(uint32_t address, int cta) { return address | static_cast<uint32_t>(cta + 1) << 24; }

inline int load_own(uint32_t address) {
  int value;
  std::memcpy(&value, emulator::shared_read(emulator::in_machine(address, 4), 4), 4);
  return value;
}

inline void mbarrier_init(uint32_t barrier, int count) {
  const uint32_t place = emulator::in_machine(barrier, 8);
  emulator::shared_write(place, 8);
  emulator::Mbarrier& made = emulator::block_state<emulator::Mbarriers>()[place];
  made.count = made.pending = count;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint32_t barrier) { emulator::mbarrier_at(barrier).arrive(); }
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  emulator::Mbarrier& announced = emulator::mbarrier_at(barrier);
  announced.bytes += bytes;
  announced.arrive();
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::Mbarrier& awaited = emulator::mbarrier_at(barrier);
  emulator::wait_until([&awaited, parity] { return (awaited.phase & 1) != parity; }, "mbarrier at", barrier);
  emulator::acquire(awaited.published);
}

inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }

inline void send(uint32_t address, int value, uint32_t barrier) {
  const uint32_t place = emulator::in_machine(address, 4);
  void* memory = emulator::begin_shared_write(place, 4);
  emulator::Mbarrier& announced = emulator::mbarrier_at(barrier);
  emulator::Clock issued;
  emulator::release(issued);
  emulator::block_state<emulator::Engine>().queue.push_back([=, &announced] {
    emulator::acquire(issued);
    std::memcpy(memory, &value, 4);
    emulator::end_shared_write(place, 4);
    announced.complete(4);
  });
}

inline void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int column, int row) {
  if (map->dimensions != 2) emulator::fail("a load of 2 dimensions by a map of %d", map->dimensions);
  const int cta = emulator::cta_of_thread();
  emulator::load_box(destination, *map, barrier, column, row, 0, cta, cta);
}

inline void tma_load_both(uint32_t destination, const TensorMap* map, uint32_t barrier, int column, int row,
                          int layer = 0) {
  if (map->dimensions != 3) emulator::fail("a load of 3 dimensions by a map of %d", map->dimensions);
  emulator::load_box(destination, *map, barrier, column, row, layer, 0, 1);
}

inline void tma_store(const TensorMap* map, uint32_t source, int column, int row) {
  emulator::check_box(source);
  const uint32_t bytes = static_cast<uint32_t>(map->box_rows()) * 128, place = emulator::in_machine(source, bytes);
  emulator::block_state<emulator::GenericWrites>().check_fence(place, bytes);
  emulator::for_rows(*map, column, row, 0, [](int64_t, const char* destination, int64_t, int64_t count) {
    emulator::check_global(destination, count, emulator::Access::kWrite);
  });
  const char* memory = static_cast<const char*>(emulator::begin_shared_read(place, bytes));
  auto group = emulator::thread_state<emulator::StoreGroups>().open;
  ++group->reading;
  emulator::Clock issued;
  emulator::release(issued);
  emulator::block_state<emulator::Engine>().queue.push_back([=, map = *map] {
    emulator::acquire(issued);
    emulator::for_rows(map, column, row, 0, [&](int64_t i, char* destination, int64_t first, int64_t count) {
      for (int64_t byte = 0; byte < count; byte += 2) {
        std::memcpy(destination + byte, memory + emulator::in_box(i, first + byte), 2);
      }
    });
    emulator::end_shared_read(place, bytes);
    emulator::release(group->clock);
    --group->reading;
  });
}

inline void tma_store_commit() {
  auto& groups = emulator::thread_state<emulator::StoreGroups>();
  groups.committed.push_back(std::exchange(groups.open, std::make_shared<emulator::StoreGroup>()));
}

template <int kGroupsLeft>
void tma_store_wait_read() {
  auto& committed = emulator::thread_state<emulator::StoreGroups>().committed;
  for (; committed.size() > kGroupsLeft; committed.pop_front()) {
    const std::shared_ptr<emulator::StoreGroup> group = committed.front();
    emulator::wait_until([&group] { return group->reading == 0; }, "stores of TMA");
    emulator::acquire(group->clock);
  }
}

inline void fence_async_shared() {
  emulator::block_state<emulator::GenericWrites>().fence(emulator::thread_state<emulator::ThreadWrites>().shared);
}
inline void fence_async_global() {
  auto& writes = emulator::thread_state<emulator::ThreadWrites>();
  writes.last_fence = emulator::GenericWrites::global().fence(writes.global);
}

template <class Value>
void store_for_tma(void* address, Value value) {
  store_global(address, value);
  emulator::GenericWrites::global().write(reinterpret_cast<uintptr_t>(address), sizeof value,
                                          emulator::thread_state<emulator::ThreadWrites>().global);
}

inline void count_release(uint32_t* flag) {
  emulator::publish(flag);
  atomicAdd(flag, 1u);
}
inline void wait_count(const uint32_t* flag, uint32_t writers) {
  wait_at_least(flag, writers);
  emulator::learn_from(flag);
}
inline uint32_t count(uint32_t* counter) { return atomicAdd(counter, 1u); }
inline void reset(uint32_t* counter) { atomicExch(counter, 0u); }

inline void stmatrix(uint32_t address, const uint32_t (&registers)[4]) {
  if (address % 16 != 0) emulator::fail("stmatrix at shared address %#x: not a multiple of 16", address);
  struct Lane {
    uint32_t place;
    const uint32_t* registers;
  } lane{emulator::in_machine(address, 16), registers};
  emulator::collective("stmatrix.x4", lane, [](Lane* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int row = 0; row < 8; ++row) {
        uint32_t elements[4];
        for (int pair = 0; pair < 4; ++pair) elements[pair] = lanes[4 * row + pair]->registers[matrix];
        std::memcpy(emulator::shared_write(lanes[8 * matrix + row]->place, 16), elements, 16);
      }
    }
  });
  emulator::block_state<emulator::GenericWrites>().write(lane.place, 16,
                                                         emulator::thread_state<emulator::ThreadWrites>().shared);
}

inline void named_barrier(int id, int threads) {
  if (id < 1 || id > 6) emulator::fail("named barrier %d: 1 to 6 are emulated", id);
  emulator::barrier(id + 8 * emulator::cta_of_thread(), threads);
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

}  // namespace sm90
}  // namespace linlora
