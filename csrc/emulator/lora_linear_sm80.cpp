#include "../lora_linear_sm80.h"

#include "launch.h"

// Null when all went well, else what went wrong; the text lasts until the next call.
extern "C" const char* emulate_lora_linear_sm80(const linlora::LoraLinear* problem, int multiprocessors,
                                                unsigned seed) {
  return linlora::emulator::emulate(*problem, multiprocessors, seed,
                                    [&] { return linlora::lora_linear_sm80(*problem, nullptr); });
}
