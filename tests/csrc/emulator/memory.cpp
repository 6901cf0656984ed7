// Shared and global memory: every access is checked before it happens.
#include "scheduler.h"

namespace linlora::emulator {
namespace {

void check_race(const char* race, const char* access, uint32_t address, size_t bytes) {
  if (race != nullptr) fail("%s of %zu bytes of shared memory at %u races with %s", access, bytes, address, race);
}

unsigned char* shared(uint32_t address, size_t bytes, const char* access) {
  if (address < kSharedBase || address + bytes > machine->warp->block->memory.size()) {
    fail("%s of %zu bytes at shared address %u: the block has %zu bytes from %u on", access, bytes, address,
         machine->shared_bytes, kSharedBase);
  }
  return machine->warp->block->memory.data() + address;
}

}  // namespace

const void* shared_read(uint32_t address, size_t bytes) {
  const void* memory = shared(address, bytes, "read");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.read(address - kSharedBase, bytes, warp.index, warp.clock), "a read", address, bytes);
  return memory;
}

void* shared_write(uint32_t address, size_t bytes) {
  void* memory = shared(address, bytes, "write");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.write(address - kSharedBase, bytes, warp.index, warp.clock), "a write", address, bytes);
  return memory;
}

void* begin_shared_write(uint32_t address, size_t bytes) {
  void* memory = shared(address, bytes, "asynchronous write");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.begin_write(address - kSharedBase, bytes, warp.clock), "an asynchronous write", address,
             bytes);
  return memory;
}

void end_shared_write(uint32_t address, size_t bytes) {
  Warp& warp = *machine->warp;
  warp.block->shadow.end_write(address - kSharedBase, bytes, warp.index, warp.clock);
}

const void* begin_shared_read(uint32_t address, size_t bytes) {
  const void* memory = shared(address, bytes, "asynchronous read");
  Warp& warp = *machine->warp;
  check_race(warp.block->shadow.begin_read(address - kSharedBase, bytes, warp.clock), "an asynchronous read", address,
             bytes);
  return memory;
}

void end_shared_read(uint32_t address, size_t bytes) {
  Warp& warp = *machine->warp;
  warp.block->shadow.end_read(address - kSharedBase, bytes, warp.index, warp.clock);
}

void count_access(uint32_t address, uint32_t bytes) {
  machine->warp->accesses.add(static_cast<int>(machine->lane - machine->warp->lanes.data()), address, bytes);
}

void count_rows(const std::vector<uint32_t>& addresses) { record.bank_conflicts += bank_conflicts(addresses, 16); }

void check_global(const void* address, size_t bytes, Access access) {
  for (const Allocation& tensor : machine->session.allocations) {
    auto contains = [&](const char* byte) {
      if (byte < tensor.data) return false;
      const int64_t element = (byte - tensor.data) / tensor.element_bytes;
      // The stride of a dimension of one element means nothing.
      const bool rows_outer = tensor.columns == 1 || (tensor.rows > 1 && tensor.row_stride >= tensor.column_stride);
      const int64_t outer_stride = rows_outer ? tensor.row_stride : tensor.column_stride,
                    inner_stride = rows_outer ? tensor.column_stride : tensor.row_stride,
                    outer = outer_stride == 0 ? 0 : element / outer_stride, rest = element - outer * outer_stride,
                    inner = inner_stride == 0 ? 0 : rest / inner_stride;
      return rest == inner * inner_stride && outer < (rows_outer ? tensor.rows : tensor.columns) &&
             inner < (rows_outer ? tensor.columns : tensor.rows);
    };
    const char* first = static_cast<const char*>(address);
    if (!contains(first) || !contains(first + bytes - 1)) continue;
    if (access == Access::kWrite && !tensor.writable) fail("writes to %s, an input", tensor.name.c_str());
    return;
  }
  for (const Allocation& tensor : machine->session.allocations) {
    const int64_t offset = (static_cast<const char*>(address) - tensor.data) / tensor.element_bytes;
    const int64_t last = (tensor.rows - 1) * tensor.row_stride + (tensor.columns - 1) * tensor.column_stride;
    if (-4096 < offset && offset < last + 4096) {
      fail("%zu bytes at element %lld are outside of %s (%lld, %lld)", bytes, static_cast<long long>(offset),
           tensor.name.c_str(), static_cast<long long>(tensor.rows), static_cast<long long>(tensor.columns));
    }
  }
  fail("%zu bytes at %p lie in no tensor", bytes, address);
}

}  // namespace linlora::emulator
