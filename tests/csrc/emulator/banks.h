// Bank conflicts: shared memory serves 128 bytes at a time, one 4-byte word from each of its 32 banks.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace linlora::emulator {

// The extra passes that lanes which access `bytes` each, at these addresses, take together.
inline int64_t bank_conflicts(const std::vector<uint32_t>& addresses, uint32_t bytes) {
  const size_t together = std::min<size_t>(addresses.size(), 128 / std::max(bytes, 4u));
  int64_t conflicts = 0;
  for (size_t first = 0; first < addresses.size(); first += together) {
    std::array<std::array<uint32_t, 32>, 32> words;  // of each bank; lanes that share a word are served at once
    std::array<int, 32> passes{};
    for (size_t lane = first; lane < first + together; ++lane) {
      for (uint32_t byte = 0; byte < bytes; byte += 4) {
        const uint32_t word = (addresses[lane] + byte) / 4, bank = word % 32;
        const auto end = words[bank].begin() + passes[bank];
        if (std::find(words[bank].begin(), end, word) == end) words[bank][passes[bank]++] = word;
      }
    }
    conflicts += *std::max_element(passes.begin(), passes.end()) - 1;
  }
  return conflicts;
}

// The accesses of each lane of a warp since its lanes last met: the i-th of all of them are one instruction. Where
// lanes went different ways nothing is counted.
class BankLog {
 public:
  void add(int lane, uint32_t address, uint32_t bytes) { lanes_[lane].push_back({address, bytes}); }

  int64_t count_and_clear() {
    int64_t conflicts = 0;
    const size_t instructions = lanes_[0].size();
    if (std::all_of(lanes_.begin(), lanes_.end(), [=](const auto& lane) { return lane.size() == instructions; })) {
      std::vector<uint32_t> addresses(lanes_.size());
      for (size_t i = 0; i < instructions; ++i) {
        for (size_t lane = 0; lane < lanes_.size(); ++lane) addresses[lane] = lanes_[lane][i].address;
        conflicts += bank_conflicts(addresses, lanes_[0][i].bytes);
      }
    }
    for (auto& lane : lanes_) lane.clear();
    return conflicts;
  }

 private:
  struct Access {
    uint32_t address, bytes;
  };
  std::array<std::vector<Access>, 32> lanes_;
};

}  // namespace linlora::emulator
