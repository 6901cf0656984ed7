// Happens-before: vector clocks of the warps of a block, and the shadow of its shared memory that finds races with
// them.
//
// A warp's accesses carry its own time. Releasing (arriving at a barrier) publishes all it knows; acquiring (leaving
// one) learns it. Two accesses to one word, at least one of them a write, race unless the later one's warp has learned
// of the earlier one. This holds for every schedule that takes the same branches, not only for the one that ran. (Lanes
// of one warp are not told apart.)
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace linlora::emulator {

constexpr int kMaxWarps = 32;

struct Clock {
  std::array<uint32_t, kMaxWarps> times{};

  void learn(const Clock& other) {
    for (int warp = 0; warp < kMaxWarps; ++warp) times[warp] = std::max(times[warp], other.times[warp]);
  }
};

// What is known of each 4-byte word of shared memory.
class Shadow {
 public:
  Shadow(size_t bytes, int warps) : warps_(warps), writes_(words(bytes)), reads_(words(bytes) * warps) {}

  // Each returns nullptr, or what the access races with.
  const char* read(size_t offset, size_t bytes, int warp, const Clock& clock) {
    for (size_t word = offset / 4; word < words(offset + bytes); ++word) {
      if (const char* race = unordered_write(word, clock)) return race;
      reads_[word * warps_ + warp] = clock.times[warp];
    }
    return nullptr;
  }

  const char* write(size_t offset, size_t bytes, int warp, const Clock& clock) {
    if (const char* race = may_write(offset, bytes, clock)) return race;
    for (size_t word = offset / 4; word < words(offset + bytes); ++word) writes_[word] = {clock.times[warp], warp, 0};
    return nullptr;
  }

  // An asynchronous write: from its issue to its completion nobody may touch the words.
  const char* begin_write(size_t offset, size_t bytes, const Clock& clock) {
    if (const char* race = may_write(offset, bytes, clock)) return race;
    for (size_t word = offset / 4; word < words(offset + bytes); ++word) ++writes_[word].pending;
    return nullptr;
  }

  // Whoever has learned `time` of `warp` sees the data from now on.
  void end_write(size_t offset, size_t bytes, int warp, const Clock& clock) {
    for (size_t word = offset / 4; word < words(offset + bytes); ++word) {
      writes_[word] = {clock.times[warp], warp, writes_[word].pending - 1};
    }
  }

  // An asynchronous read: from its issue to its completion nobody may write the words.
  const char* begin_read(size_t offset, size_t bytes, const Clock& clock) {
    for (size_t word = offset / 4; word < words(offset + bytes); ++word) {
      if (const char* race = unordered_write(word, clock)) return race;
      ++writes_[word].pending_reads;
    }
    return nullptr;
  }

  void end_read(size_t offset, size_t bytes, int warp, const Clock& clock) {
    for (size_t word = offset / 4; word < words(offset + bytes); ++word) {
      --writes_[word].pending_reads;
      reads_[word * warps_ + warp] = clock.times[warp];
    }
  }

 private:
  struct Write {
    uint32_t time = 0;
    int warp = 0;
    int pending = 0;
    int pending_reads = 0;
  };

  static size_t words(size_t bytes) { return (bytes + 3) / 4; }

  const char* unordered_write(size_t word, const Clock& clock) const {
    if (writes_[word].pending != 0) return "an asynchronous write that was not waited for";
    return writes_[word].time > clock.times[writes_[word].warp] ? "a write of another warp" : nullptr;
  }

  const char* may_write(size_t offset, size_t bytes, const Clock& clock) const {
    for (size_t word = offset / 4; word < words(offset + bytes); ++word) {
      if (const char* race = unordered_write(word, clock)) return race;
      if (writes_[word].pending_reads != 0) return "an asynchronous read that was not waited for";
      for (int warp = 0; warp < warps_; ++warp) {
        if (reads_[word * warps_ + warp] > clock.times[warp]) return "a read of another warp";
      }
    }
    return nullptr;
  }

  int warps_;
  std::vector<Write> writes_;
  std::vector<uint32_t> reads_;
};

}  // namespace linlora::emulator
