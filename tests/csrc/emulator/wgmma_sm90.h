// wgmma on the host. Operands are read through their descriptors as late as the wait that ends the product, and from
// its issue until then nobody may write them, nor touch the accumulators, which hold NaN meanwhile.
#pragma once

#include <array>

#include "ptx_sm90.h"

namespace linlora {
namespace emulator {

// An operand as a descriptor names it: element (row, k) of a slice of 16 along K.
struct Operand {
  uint32_t address, leading, stride;
  bool by_rows_of_k;  // N-major

  Operand(uint64_t descriptor, bool n_major) : by_rows_of_k(n_major) {
    address = static_cast<uint32_t>(descriptor & 0x3FFF) * 16;
    leading = static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) * 16;
    stride = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) * 16;
    if (descriptor >> 62 != 1) fail("a descriptor of swizzle %d: 1 (128 bytes) is emulated", int(descriptor >> 62));
    if ((descriptor >> 49 & 7) != 0) fail("a descriptor with a base offset: atoms at 1024 bytes are emulated");
  }

  uint32_t at(int row, int k) const {
    const uint32_t place = by_rows_of_k ? row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                                        : row / 8 * stride + row % 8 * 128 + k * 2;
    return swizzled(address + place);
  }

  // Each 16 bytes of `rows` rows, in the machine.
  template <class Visit>
  void for_units(int rows, Visit visit) const {
    for (int row = 0; row < rows; row += by_rows_of_k ? 8 : 1) {
      for (int k = 0; k < 16; k += by_rows_of_k ? 1 : 8) visit(in_machine(at(row, k), 16));
    }
  }

  template <class Element>
  void read(int rows, const char* memory, float* elements) const {
    for (int row = 0; row < rows; ++row) {
      for (int k = 0; k < 16; ++k) {
        uint16_t bits;
        std::memcpy(&bits, memory + in_machine(at(row, k), 2), 2);
        elements[row * 16 + k] = widen<Element>(bits);
      }
    }
  }
};

// A product of a warpgroup. Its operands are read once, for all threads.
struct WarpgroupProduct {
  Operand a, b;
  int n;
  void (*read)(WarpgroupProduct&);
  const char* memory;  // of the machine's block
  std::vector<float> a_elements, b_elements;

  template <class Element>
  static void read_as(WarpgroupProduct& product) {
    product.a_elements.resize(64 * 16);
    product.b_elements.resize(product.n * 16);
    product.a.template read<Element>(64, product.memory, product.a_elements.data());
    product.b.template read<Element>(product.n, product.memory, product.b_elements.data());
  }
  void need() {
    if (a_elements.empty()) read(*this);
  }
};

struct Warpgroup {
  std::deque<std::shared_ptr<WarpgroupProduct>> products;
  std::array<size_t, 4> issued{};  // by its warps
};
using Warpgroups = std::map<int, Warpgroup>;

// Accumulators of products in flight; the thread's own are poisoned.
struct Accumulators {
  std::vector<float> values;
  int products = 0;
};

struct ThreadProduct {
  float* d;
  std::shared_ptr<WarpgroupProduct> product;
};

struct ThreadProducts {
  bool fenced = false;
  size_t issued = 0;
  std::vector<ThreadProduct> open;
  std::deque<std::vector<ThreadProduct>> groups;
  std::map<float*, Accumulators> accumulators;
};

inline Warpgroup& my_warpgroup() { return block_state<Warpgroups>()[static_cast<int>(threadIdx.x) / 128]; }

inline void issue(float* d, int n, const Operand& a, const Operand& b, void (*read)(WarpgroupProduct&)) {
  auto& mine = thread_state<ThreadProducts>();
  Warpgroup& warpgroup = my_warpgroup();
  if (!mine.fenced) fail("wgmma without a wgmma.fence since its accumulators could be touched");
  if (mine.issued == warpgroup.products.size()) {
    const uint32_t place = in_machine(a.at(0, 0), 16);
    const char* memory = static_cast<const char*>(shared_read(place, 16)) - place;
    warpgroup.products.push_back(std::make_shared<WarpgroupProduct>(WarpgroupProduct{a, b, n, read, memory, {}, {}}));
    if (lucky()) warpgroup.products.back()->need();
  }
  const auto product = warpgroup.products[mine.issued++];
  if (lane_index() == 0) {
    ++warpgroup.issued[threadIdx.x / kWarpSize % 4];
    auto begin = [](uint32_t place) { begin_shared_read(place, 16); };
    a.for_units(64, begin);
    b.for_units(n, begin);
  }
  Accumulators& accumulators = mine.accumulators[d];
  if (accumulators.products++ == 0) {
    accumulators.values.assign(d, d + n / 2);
    std::fill(d, d + n / 2, NAN);
  }
  mine.open.push_back({d, product});
}

inline void finish(const ThreadProduct& issued) {
  WarpgroupProduct& product = *issued.product;
  product.need();
  auto& all = thread_state<ThreadProducts>().accumulators;
  Accumulators& accumulators = all[issued.d];
  const int lane = lane_index(), first_row = static_cast<int>(threadIdx.x) / kWarpSize % 4 * 16 + lane / 4;
  for (int i = 0; i < product.n / 2; ++i) {
    const float* a = &product.a_elements[(first_row + i / 2 % 2 * 8) * 16];
    const float* b = &product.b_elements[(i / 4 * 8 + lane % 4 * 2 + i % 2) * 16];
    float sum = accumulators.values[i];
    for (int k = 0; k < 16; ++k) sum += a[k] * b[k];
    accumulators.values[i] = sum;
  }
  if (lane == 0) {
    auto end = [](uint32_t place) { end_shared_read(place, 16); };
    product.a.for_units(64, end);
    product.b.for_units(product.n, end);
  }
  if (--accumulators.products == 0) {
    std::copy(accumulators.values.begin(), accumulators.values.end(), issued.d);
    all.erase(issued.d);
  }
}

inline void finish_groups(size_t left) {
  auto& mine = thread_state<ThreadProducts>();
  Warpgroup& warpgroup = my_warpgroup();
  wait_until([&] { return *std::min_element(warpgroup.issued.begin(), warpgroup.issued.end()) >= mine.issued; },
             "the warpgroup at wgmma", static_cast<int64_t>(mine.issued));
  for (; mine.groups.size() > left; mine.groups.pop_front()) {
    for (const ThreadProduct& product : mine.groups.front()) finish(product);
  }
  mine.fenced = false;
}

}  // namespace emulator

namespace sm90 {

inline void wgmma_fence() { emulator::thread_state<emulator::ThreadProducts>().fenced = true; }

inline void wgmma_commit() {
  auto& mine = emulator::thread_state<emulator::ThreadProducts>();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int kGroupsLeft>
void wgmma_wait() {
  emulator::finish_groups(kGroupsLeft);
}

template <int kAccumulators>
void pin(float (&)[kAccumulators]) {}

template <class Element, class Major, int kAccumulators>
void wgmma(float (&d)[kAccumulators], uint64_t a, uint64_t b) {
  emulator::issue(d, 2 * kAccumulators, emulator::Operand(a, false),
                  emulator::Operand(b, std::is_same_v<Major, NMajor>), emulator::WarpgroupProduct::read_as<Element>);
}

}  // namespace sm90
}  // namespace linlora
