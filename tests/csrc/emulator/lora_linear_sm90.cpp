// The entries of the emulated lora_linear_sm90, for ctypes.
#include "lora_linear_sm90.h"

#include <cstring>
#include <functional>
#include <queue>

#include "plan_sm90.cuh"
#include "swizzle.cuh"
#include "wgmma_sm90.cuh"

using linlora::LoraLinear;
namespace emulator = linlora::emulator;

extern "C" {

const char* lora_linear_sm90_obstacle(const LoraLinear* problem) {
  return linlora::lora_linear_sm90_obstacle(*problem);
}
int64_t lora_linear_sm90_counters(const LoraLinear* problem) { return linlora::lora_linear_sm90_counters(*problem); }
int64_t lora_linear_sm90_scratch(const LoraLinear* problem) { return linlora::lora_linear_sm90_scratch(*problem); }

// A launch of up to `clusters` clusters, of which `resident` run at a time. Null, or what went wrong.
const char* emulate_lora_linear_sm90_in(const LoraLinear* problem, uint32_t* counters, void* scratch, int clusters,
                                        int resident, unsigned seed) {
  emulator::Clusters::current().launched = clusters;
  return emulator::emulate(*problem, resident, seed, [&] {
    emulator::Session& session = emulator::Session::current();
    const int64_t count = lora_linear_sm90_counters(problem), bytes = lora_linear_sm90_scratch(problem);
    session.allocate({"counters", reinterpret_cast<char*>(counters), 1, count, count, 1, 4, true});
    session.allocate({"scratch", static_cast<char*>(scratch), 1, bytes, bytes, 1, 1, true});
    const cudaError_t error = linlora::lora_linear_sm90(*problem, {counters, scratch}, nullptr);
    if (error == cudaSuccess &&
        std::any_of(counters, counters + count, [](uint32_t counter) { return counter != 0; })) {
      session.error = "the launch leaves counters that are not zero";
    }
    return error;
  });
}

// The same in a workspace of its own, on a cluster for every two multiprocessors.
const char* emulate_lora_linear_sm90(const LoraLinear* problem, int multiprocessors, unsigned seed) {
  if (const char* obstacle = lora_linear_sm90_obstacle(problem)) return obstacle;
  struct alignas(128) Line {
    unsigned char bytes[128];
  };
  std::vector<uint32_t> counters(lora_linear_sm90_counters(problem));
  std::vector<Line> scratch(lora_linear_sm90_scratch(problem) / sizeof(Line) + 1);
  std::memset(static_cast<void*>(scratch.data()), 0xFF, scratch.size() * sizeof(Line));  // NaN
  const int clusters = std::max(1, multiprocessors / 2);
  return emulate_lora_linear_sm90_in(problem, counters.data(), scratch.data(), clusters, clusters, seed);
}

// ---- how a problem is divided, for tests of the division itself

struct PlanSummary {
  int32_t block_n, rank_block, tiles, pack_tiles, cluster_rows, shrink_tiles, output_tiles, rows_of_cta, units;
  int32_t pack_writers, pack_readers, row_writers, row_readers, p_columns, k_stride;
};

void plan_lora_linear_sm90(const LoraLinear* problem, int clusters, PlanSummary* summary) {
  const auto plan = linlora::sm90::plan_of(*problem, clusters);
  *summary = {plan.block_n,
              plan.rank_block,
              plan.tiles(),
              plan.pack_tiles,
              plan.cluster_rows,
              plan.shrink_tiles,
              plan.output_tiles,
              plan.rows_of_cta(),
              static_cast<int32_t>(plan.units()),
              static_cast<int32_t>(plan.pack_writers()),
              static_cast<int32_t>(plan.pack_readers()),
              static_cast<int32_t>(plan.row_writers()),
              static_cast<int32_t>(plan.row_readers()),
              plan.p_columns(),
              plan.k_stride()};
}

// The tile of a ticket: kind (0 pack, 1 shrink, 2 output, 3 none), row, column; then stream and row of the halves of x
// that CTA 0 and CTA 1 read, and the first rank or the column tile.
void tile_lora_linear_sm90(const LoraLinear* problem, int clusters, int ticket, int32_t* tile) {
  const auto plan = linlora::sm90::plan_of(*problem, clusters);
  const auto place = plan.tile(ticket);
  *tile++ = place.kind, *tile++ = place.row, *tile++ = place.column;
  for (int cta = 0; cta < 2; ++cta) {
    for (int half = 0; half < 2; ++half) {
      const auto rows = place.kind == linlora::sm90::Tile::kShrink ? plan.shrink_half(place, cta, half)
                                                                   : plan.output_half(place, cta, half);
      *tile++ = rows.stream, *tile++ = rows.row;
    }
  }
  *tile = place.kind == linlora::sm90::Tile::kShrink ? plan.first_rank(place) : plan.i_n(place);
}

// The clocks after which the last of `clusters` is done with output tiles of `block_n` columns, as Clocks has them: by
// the plan's own formula, and tile by tile, each to the cluster that is free first, with the waits for flags. `work`:
// those of all tiles together.
void makespan_lora_linear_sm90(const LoraLinear* problem, int clusters, int block_n, int64_t* formula,
                               int64_t* simulated, int64_t* work) {
  namespace sm90 = linlora::sm90;
  const sm90::Plan plan = sm90::with_columns(sm90::plan_of(*problem, clusters), block_n);
  const sm90::Clocks clocks(plan);
  constexpr int64_t kPack = 4000;
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> free;
  for (int i = 0; i < clusters; ++i) free.push(0);
  std::vector<int64_t> shrunk(plan.cluster_rows);
  int64_t packed = 0;
  *formula = sm90::makespan(plan, clusters), *simulated = 0, *work = 0;
  for (int ticket = 0; ticket < plan.tiles(); ++ticket) {
    const sm90::Tile tile = plan.tile(ticket);
    const int64_t start = free.top(), along_p = plan.p_steps() * clocks.step;
    int64_t end = start + kPack;
    if (tile.kind == sm90::Tile::kShrink) end = std::max(start, packed) + clocks.shrink;
    if (tile.kind == sm90::Tile::kOutput) end = std::max(start + clocks.output - along_p, shrunk[tile.row]) + along_p;
    if (tile.kind == sm90::Tile::kPack) packed = std::max(packed, end);
    if (tile.kind == sm90::Tile::kShrink) shrunk[tile.row] = std::max(shrunk[tile.row], end);
    *work += tile.kind == sm90::Tile::kPack ? kPack : tile.kind == sm90::Tile::kShrink ? clocks.shrink : clocks.output;
    *simulated = std::max(*simulated, end);
    free.pop();
    free.push(end);
  }
}

void unit_lora_linear_sm90(const LoraLinear* problem, int64_t index, int32_t* unit) {
  const auto place = linlora::sm90::unit_of(linlora::sm90::plan_of(*problem, 1), index);
  unit[0] = place.shrink, unit[1] = place.row, unit[2] = place.column;
}

uint64_t operand_sm90(uint32_t address, int slice, bool n_major) {
  using namespace linlora::sm90;
  return n_major ? operand<NMajor>(address, slice) : operand<KMajor>(address, slice);
}

// Where an output lies in a box on its way to TMA, and where TMA looks for it.
void box_offsets_sm90(int row, int column, uint32_t* offsets) {
  offsets[0] = linlora::SharedTile<64, 64>::offset(row, column);
  offsets[1] = emulator::in_box(row, 2 * column);
}

}  // extern "C"
