// Fibers: a stack and a place to continue. Started by ucontext, switched by setjmp and longjmp, which make no system
// call.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a corrupted one
#include <sys/mman.h>
#include <ucontext.h>

#include <csetjmp>
#include <new>
#include <utility>

namespace linlora::emulator {

class Stack {
 public:
  static constexpr size_t kBytes = 128 << 10, kGuard = 4096;

  Stack() {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_, kGuard, PROT_NONE);  // overflow faults instead of running into another stack
  }
  Stack(Stack&& other) noexcept : base_(std::exchange(other.base_, nullptr)) {}
  Stack& operator=(Stack&& other) noexcept {
    std::swap(base_, other.base_);
    return *this;
  }
  ~Stack() {
    if (base_ != nullptr) munmap(base_, kBytes);
  }
  char* base() const { return base_; }

 private:
  char* base_;
};

class Fiber {
 public:
  explicit Fiber(Stack stack) : stack_(std::move(stack)) {}

  // Runs `entry` from its beginning, then from where it last left; returns when it leaves.
  void resume(void (*entry)()) {
    if (_setjmp(outside_) != 0) return;
    if (started_) _longjmp(inside_, 1);
    started_ = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack_.base();
    start.uc_stack.ss_size = Stack::kBytes;
    start.uc_link = nullptr;  // entry never returns: its last act is to leave
    makecontext(&start, entry, 0);
    setcontext(&start);
  }

  // Called by the fiber itself.
  void leave() {
    if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
  }

  Stack take_stack() { return std::move(stack_); }

 private:
  Stack stack_;
  jmp_buf outside_, inside_;
  bool started_ = false;
};

}  // namespace linlora::emulator
