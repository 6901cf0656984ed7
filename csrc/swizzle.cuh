// Tiles of 16-bit elements in shared memory: where an element lies, such that no access meets a bank twice.
#pragma once

#include "device.cuh"

namespace linlora {

// Rows follow one another; within a row the 16-byte chunks are permuted, by an exclusive or with the number of the
// 128-byte line. Eight rows of one column of chunks (what ldmatrix reads at a time, and what the rows of an mma
// fragment write) then lie in eight different sixteenths of 128 bytes: in all 32 banks once.
//
//   64-byte rows, chunks 0-3:   row 0   0 1 2 3    row 1   0 1 2 3     line 0
//                               row 2   1 0 3 2    row 3   1 0 3 2     line 1
//                               row 4   2 3 0 1    row 5   2 3 0 1     line 2 …
template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kRowBytes = 2 * kColumns, kChunks = kRowBytes / 16;
  static constexpr uint32_t kBytes = kRows * kRowBytes;
  static constexpr int kRowsPerLine = kRowBytes < 128 ? 128 / kRowBytes : 1;
  static constexpr int kPermuted = kChunks < 8 ? kChunks : 8;
  static constexpr int kPeriod = kRowsPerLine * kPermuted;  // rows after which the permutation is the same again
  static_assert(kRowBytes >= 16 && (kRowBytes & (kRowBytes - 1)) == 0, "a row is a power of two of chunks");
  static_assert(kBytes % 128 == 0, "tiles follow one another and begin at a line");

  __host__ __device__ static constexpr uint32_t offset(int row, int column) {
    const int chunk = column / 8 ^ row / kRowsPerLine % kPermuted;
    return static_cast<uint32_t>(row * kRowBytes + chunk * 16 + column % 8 * 2);
  }

  // From the address of an element to that of another: `rows` further on, a multiple of kPeriod, and `columns`, powers
  // of two of at least 8 that are not in its column yet (an exclusive or then adds them).
  __host__ __device__ static constexpr uint32_t move(uint32_t address, int rows, int columns) {
    return (address ^ static_cast<uint32_t>(2 * columns)) + static_cast<uint32_t>(rows * kRowBytes);
  }
};

}  // namespace linlora
