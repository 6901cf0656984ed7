// A stand-in for libcuda.so.1: what Triton's launcher asks of the driver, for its host side to run without a GPU.
//
// Nothing is executed. A launch is counted, and refused where the real driver would refuse it: a tensor map outside
// the limits of cuTensorMapEncodeTiled, or encoded by a thread without a context; a grid, a block or shared memory
// that the device does not have. Every call that is refused says why in cuGetErrorString's place, `stub_refusal`.
// Tests read the counts through ctypes.
//
// Build: gcc -shared -fPIC -I<folder of cuda.h> -o libcuda.so.1 stub_driver.c
#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK return CUDA_SUCCESS
enum { SHARED_LIMIT = 232448, SHARED_STATIC_LIMIT = 49152 };

static __thread CUcontext context;
static struct function {
  int shared;
} functions[4096];
static int n_functions;

long stub_launches, stub_tensor_maps, stub_bound_contexts;
char stub_refusal[256];

static CUresult refuse(CUresult code, const char *format, unsigned long long a, unsigned long long b) {
  snprintf(stub_refusal, sizeof stub_refusal, format, a, b);
  return code;
}

CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; OK; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_LIMIT; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  OK;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = stub_refusal[0] ? stub_refusal : "no refusal was noted";
  OK;
}

CUresult cuCtxGetCurrent(CUcontext *current) { *current = context; OK; }
CUresult cuCtxSetCurrent(CUcontext given) {
  context = given;
  stub_bound_contexts++;
  OK;
}
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return context ? CUDA_SUCCESS : refuse(CUDA_ERROR_INVALID_CONTEXT, "the thread has no context", 0, 0);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *primary, CUdevice device) { *primary = (CUcontext)0x1; OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t size) { OK; }
CUresult cuCtxGetLimit(size_t *size, CUlimit limit) { *size = 0; OK; }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)0x2; OK; }
CUresult cuModuleUnload(CUmodule module) { OK; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)&functions[n_functions++ % 4096];
  OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;  // an old driver
  if (value > SHARED_LIMIT)
    return refuse(CUDA_ERROR_INVALID_VALUE, "%llu bytes of shared memory, there are %llu", value, SHARED_LIMIT);
  ((struct function *)function)->shared = value;
  OK;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK; }

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;  // all memory is the device's
  OK;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; OK; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) { *count = 66; OK; }

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const int swizzled[] = {0, 32, 64, 128};
  int bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1
      : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ? 4 : 2;
  if (!context) return refuse(CUDA_ERROR_INVALID_CONTEXT, "a tensor map is encoded by a thread without a context", 0, 0);
  if (rank < 1 || rank > 5) return refuse(CUDA_ERROR_INVALID_VALUE, "rank %llu of a tensor map", rank, 0);
  if ((uintptr_t)address % 16) return refuse(CUDA_ERROR_INVALID_VALUE, "address %llx of a tensor map", (uintptr_t)address, 0);
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] == 0 || sizes[i] > 1ull << 32)
      return refuse(CUDA_ERROR_INVALID_VALUE, "size %llu of dimension %llu", sizes[i], i);
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40 || strides[i] < sizes[i] * (i ? 1 : bytes)))
      return refuse(CUDA_ERROR_INVALID_VALUE, "stride %llu of dimension %llu", strides[i], i + 1);
    if (box[i] == 0 || box[i] > 256) return refuse(CUDA_ERROR_INVALID_VALUE, "box %llu of dimension %llu", box[i], i);
    if (steps[i] < 1 || steps[i] > 8) return refuse(CUDA_ERROR_INVALID_VALUE, "step %llu of dimension %llu", steps[i], i);
  }
  if (box[0] * bytes % 16 || (swizzle && box[0] * bytes > swizzled[swizzle]))
    return refuse(CUDA_ERROR_INVALID_VALUE, "a box of %llu bytes, swizzled by %llu", box[0] * bytes, swizzled[swizzle]);
  stub_tensor_maps++;
  OK;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  int shared = ((struct function *)function)->shared;
  if (!context) return refuse(CUDA_ERROR_INVALID_CONTEXT, "a launch by a thread without a context", 0, 0);
  if (!config->gridDimX || config->gridDimX > INT32_MAX || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "a grid of %llu, %llu", config->gridDimX, config->gridDimY);
  if (config->blockDimX > 1024) return refuse(CUDA_ERROR_INVALID_VALUE, "%llu threads", config->blockDimX, 0);
  if (config->sharedMemBytes > (shared ? shared : SHARED_STATIC_LIMIT))
    return refuse(CUDA_ERROR_INVALID_VALUE, "%llu bytes of shared memory, %llu were asked for", config->sharedMemBytes, shared);
  stub_launches++;
  OK;
}
