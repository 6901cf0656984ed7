// The primitives of ptx.cuh on the host, after the PTX ISA.
#pragma once

#include <cstring>
#include <deque>
#include <vector>

#include "builtins.h"

namespace linlora {

inline uint32_t shared_memory() { return emulator::kSharedBase; }

template <class Value>
void keep(Value&) {}

// ---- global and shared memory

template <class Value>
Value load_global(const void* address) {
  emulator::check_global(address, sizeof(Value), emulator::Access::kRead);
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Value) != 0) emulator::fail("misaligned load_global");
  Value value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <class Value>
void store_global(void* address, Value value) {
  emulator::check_global(address, sizeof(Value), emulator::Access::kWrite);
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Value) != 0) emulator::fail("misaligned store_global");
  std::memcpy(address, &value, sizeof value);
}

template <class Value>
Value load_shared(uint32_t address) {
  if (address % sizeof(Value) != 0) emulator::fail("misaligned load_shared at %u", address);
  emulator::count_access(address, sizeof(Value));
  Value value;
  std::memcpy(&value, emulator::shared_read(address, sizeof value), sizeof value);
  return value;
}

template <class Value>
void store_shared(uint32_t address, Value value) {
  if (address % sizeof(Value) != 0) emulator::fail("misaligned store_shared at %u", address);
  emulator::count_access(address, sizeof(Value));
  std::memcpy(emulator::shared_write(address, sizeof value), &value, sizeof value);
}

// ---- flags in global memory

inline uint32_t load_acquire(const uint32_t* address) {
  emulator::yield();
  return load_global<uint32_t>(address);
}

inline void store_release(uint32_t* address, uint32_t value) {
  emulator::yield();
  store_global(address, value);
  emulator::yield();
}

inline void wait_at_least(const uint32_t* flag, uint32_t value) {
  emulator::check_global(flag, sizeof *flag, emulator::Access::kRead);
  emulator::wait_until([=] { return *static_cast<const volatile uint32_t*>(flag) >= value; }, "a flag to reach", value);
}

// ---- asynchronous copies: they land when they are waited for, or (by chance) at once

namespace emulator {

struct Copy {
  uint32_t destination;
  const void* source;  // null: zeros
  void* memory;        // of the destination

  void land() const {
    if (source == nullptr) {
      std::memset(memory, 0, 16);
    } else {
      std::memcpy(memory, source, 16);
    }
  }
};

struct CopyGroups {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

inline void wait_copies(size_t groups_left) {
  auto& committed = thread_state<CopyGroups>().committed;
  for (; committed.size() > groups_left; committed.pop_front()) {
    for (const Copy& copy : committed.front()) {
      copy.land();
      end_shared_write(copy.destination, 16);
    }
  }
}

}  // namespace emulator

inline void cp_async(uint32_t destination, const void* source, bool exists) {
  if (destination % 16 != 0) emulator::fail("cp.async to shared address %u: not a multiple of 16", destination);
  if (exists) {
    emulator::check_global(source, 16, emulator::Access::kRead);
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) emulator::fail("cp.async from a misaligned address");
  }
  emulator::count_access(destination, 16);
  const emulator::Copy copy{destination, exists ? source : nullptr, emulator::begin_shared_write(destination, 16)};
  if (emulator::lucky()) copy.land();
  emulator::thread_state<emulator::CopyGroups>().open.push_back(copy);
}

inline void cp_async_commit() {
  auto& groups = emulator::thread_state<emulator::CopyGroups>();
  groups.committed.push_back(std::move(groups.open));
  groups.open.clear();
}

template <int kGroupsLeft>
void cp_async_wait() {
  emulator::wait_copies(kGroupsLeft);
}

// ---- numbers

template <class Type>
float widen(uint16_t bits);

template <>
inline float widen<__half>(uint16_t bits) {
  return __half2float({bits});
}

template <>
inline float widen<__nv_bfloat16>(uint16_t bits) {
  return __bfloat162float({bits});
}

template <class Type>
uint32_t pack(float low, float high);

template <>
inline uint32_t pack<__half>(float low, float high) {
  return __float2half_rn(low).bits | uint32_t{__float2half_rn(high).bits} << 16;
}

template <>
inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}

// ---- matrices in registers

namespace emulator {

struct MatrixLoad {
  uint32_t address;
  uint32_t* registers;
};

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 bring the addresses of the rows of matrix i. Lane l gets
// elements (l / 4, 2 (l % 4)) and the next, of the transposes (2 (l % 4), l / 4) and the row below.
inline void ldmatrix(uint32_t (&registers)[4], uint32_t address, bool transposed) {
  if (address % 16 != 0) fail("ldmatrix at shared address %u: not a multiple of 16", address);
  MatrixLoad load{address, registers};
  auto compute = [transposed](MatrixLoad* const* lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      std::vector<uint32_t> rows(8);
      for (int row = 0; row < 8; ++row) rows[row] = lanes[8 * matrix + row]->address;
      count_rows(rows);
      for (int row = 0; row < 8; ++row) {
        std::memcpy(elements[row], shared_read(rows[row], 16), 16);
      }
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? elements[j][i] : elements[i][j],
                       high = transposed ? elements[j + 1][i] : elements[i][j + 1];
        lanes[lane]->registers[matrix] = low | high << 16;
      }
    }
  };
  collective(transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4", load, compute);
}

template <class Type>
struct MatrixProduct {
  float* d;
  const uint32_t* a;
  uint32_t b[2];

  // d (16, 8) += a (16, 16) b (16, 8)
  static void compute(MatrixProduct* const* lanes) {
    auto half = [](uint32_t pair, int which) { return widen<Type>(static_cast<uint16_t>(pair >> 16 * which)); };
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      for (int which = 0; which < 2; ++which) {
        for (int r = 0; r < 4; ++r) a[i + r % 2 * 8][j + r / 2 * 8 + which] = half(lanes[lane]->a[r], which);
        for (int r = 0; r < 2; ++r) b[j + r * 8 + which][i] = half(lanes[lane]->b[r], which);
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        float sum = lanes[lane]->d[r];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[lane]->d[r] = sum;
      }
    }
  }
};

}  // namespace emulator

inline void ldmatrix(uint32_t (&registers)[4], uint32_t address) { emulator::ldmatrix(registers, address, false); }
inline void ldmatrix_transposed(uint32_t (&registers)[4], uint32_t address) {
  emulator::ldmatrix(registers, address, true);
}

template <class Type>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::MatrixProduct<Type> product{d, a, {b0, b1}};
  emulator::collective("mma.m16n8k16", product, emulator::MatrixProduct<Type>::compute);
}

}  // namespace linlora
