"""The CUDA kernels of linlora, one shared object that `linlora` finds and loads: linlora_cuda.so, with build.json."""
