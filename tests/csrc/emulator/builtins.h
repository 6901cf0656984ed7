// CUDA's built-in functions: barriers, shuffles, votes, atomics.
#pragma once

#include "machine.h"

inline void __syncthreads() { linlora::emulator::barrier(0, static_cast<int>(blockDim.x * blockDim.y * blockDim.z)); }

namespace linlora::emulator {

inline void full_mask(unsigned mask) {
  if (mask != 0xFFFFFFFFu) fail("mask %08x: only whole warps are emulated", mask);
}

// What the lane `source` brought, for every lane.
template <class Value>
Value shuffle(unsigned mask, Value value, int source, const char* what) {
  full_mask(mask);
  struct Lane {
    Value mine, theirs;
    int source;
  } lane{value, value, source};
  collective(what, lane, [](Lane* const* lanes) {
    for (int i = 0; i < kWarpSize; ++i) lanes[i]->theirs = lanes[lanes[i]->source]->mine;
  });
  return lane.theirs;
}

inline int lane_index() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize);
}

}  // namespace linlora::emulator

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { linlora::emulator::shuffle(mask, 0, 0, "__syncwarp"); }

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
  return linlora::emulator::shuffle(mask, value, source % linlora::emulator::kWarpSize, "__shfl_sync");
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  return linlora::emulator::shuffle(mask, value, linlora::emulator::lane_index() ^ lanes, "__shfl_xor_sync");
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, int lanes) {
  const int lane = linlora::emulator::lane_index(), source = lane + lanes;
  return linlora::emulator::shuffle(mask, value, source < linlora::emulator::kWarpSize ? source : lane,
                                    "__shfl_down_sync");
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  linlora::emulator::full_mask(mask);
  struct Lane {
    bool vote;
    unsigned votes;
  } lane{vote, 0};
  linlora::emulator::collective("__ballot_sync", lane, [](Lane* const* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < linlora::emulator::kWarpSize; ++i) votes |= unsigned{lanes[i]->vote} << i;
    for (int i = 0; i < linlora::emulator::kWarpSize; ++i) lanes[i]->votes = votes;
  });
  return lane.votes;
}

inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xFFFFFFFFu; }

template <class Value>
Value atomicAdd(Value* address, Value value) {
  linlora::emulator::yield();
  linlora::emulator::check_global(address, sizeof(Value), linlora::emulator::Access::kWrite);
  const Value before = *address;
  *address = before + value;
  linlora::emulator::yield();
  return before;
}

template <class Value>
Value atomicExch(Value* address, Value value) {
  linlora::emulator::yield();
  linlora::emulator::check_global(address, sizeof(Value), linlora::emulator::Access::kWrite);
  const Value before = *address;
  *address = value;
  linlora::emulator::yield();
  return before;
}

// All of global memory is sequentially consistent here: a missing fence does not show.
inline void __threadfence() { linlora::emulator::yield(); }
