// Shared memory of a CTA of lora_linear_sm90, and who waits for whom in it.
//
//   stages     A (2 x 64 rows) and B (kBlockN rows) of 64 elements of K. The producer fills, the consumers empty them.
//              Of shrink tiles, whose B is small, two blocks of K where there is room: A, A, B, B.
//              Half of B comes from either CTA of the cluster, so a stage is free when the consumers of both have left
//              it.
//   tickets    the next tiles. CTA 0 draws them for both, one ahead.
//   staging    two boxes of 64 x 64 outputs for each warpgroup, on their way to TMA
#pragma once

#include "wgmma_sm90.cuh"

namespace linlora::sm90 {

constexpr int kWarpsOfConsumers = 8;
constexpr uint32_t kRowBytes = 128;  // of a stage: 64 elements, the width of the swizzle
constexpr uint32_t kBoxBytes = 64 * kRowBytes;
constexpr uint32_t kHalfBytes = kBoxBytes, kABytes = 2 * kHalfBytes;

template <int kBlockN>
struct Shared {
  static constexpr uint32_t kStageBytes = kABytes + kBlockN * kRowBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes, kTickets = 2;
  static constexpr uint32_t kStaging = kStages * kStageBytes, kBarriers = kStaging + 4 * kBoxBytes,
                            kTicket = kBarriers + 8 * (2 * kStages + 2 * kTickets), kBytes = kTicket + 4 * kTickets;
  static_assert(kBytes <= 232448, "what a CTA of Hopper has");

  uint32_t base;

  __device__ uint32_t a(int stage, int block = 0) const { return base + stage * kStageBytes + block * kABytes; }
  __device__ uint32_t b(int stage) const { return a(stage) + kABytes; }
  __device__ uint32_t staging(int half, int chunk) const {
    return base + kStaging + (2 * half + chunk % 2) * kBoxBytes;
  }
  __device__ uint32_t full(int stage) const { return base + kBarriers + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ uint32_t ticket_full(int slot) const { return full(2 * kStages + slot); }
  __device__ uint32_t ticket_empty(int slot) const { return full(2 * kStages + kTickets + slot); }
  __device__ uint32_t ticket(int slot) const { return base + kTicket + 4 * slot; }

  // By one thread, before a cluster_sync.
  __device__ void init_barriers() const {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), 1);  // the producer announces; TMA of both CTAs brings
      mbarrier_init(empty(stage), 2 * kWarpsOfConsumers);
    }
    for (int slot = 0; slot < kTickets; ++slot) {
      mbarrier_init(ticket_full(slot), 1);
      mbarrier_init(ticket_empty(slot), 2 * kWarpsOfConsumers + 1);  // of CTA 0: all who read, the other producer too
    }
    mbarrier_init_fence();
  }
};

// Goes round a ring of kSize; the parity is that of the phase that is being waited for.
template <int kSize>
struct Cursor {
  int place = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++place == kSize) {
      place = 0;
      parity ^= 1;
    }
  }
};

template <int kBlockN>
struct Tickets {
  Shared<kBlockN> shared;
  Cursor<Shared<kBlockN>::kTickets> cursor;

  // CTA 0's producer.
  __device__ void write(int ticket) {
    mbarrier_wait(shared.ticket_empty(cursor.place), cursor.parity ^ 1);
    for (int cta = 0; cta < 2; ++cta) {
      const uint32_t full = in_cta(shared.ticket_full(cursor.place), cta);
      mbarrier_arrive_expect(full, sizeof ticket);
      send(in_cta(shared.ticket(cursor.place), cta), ticket, full);
    }
    cursor.advance();
  }

  // Everybody else, who then counts itself with `read`: a warp once.
  __device__ int wait() {
    mbarrier_wait_cluster(shared.ticket_full(cursor.place), cursor.parity);
    return load_own(shared.ticket(cursor.place));
  }
  __device__ void read() {
    mbarrier_arrive(in_cta(shared.ticket_empty(cursor.place), 0));
    cursor.advance();
  }
};

}  // namespace linlora::sm90
