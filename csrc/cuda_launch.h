// Grid size and error text for the launchers in the .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace somnium {

constexpr int threads_per_block = 256;

// Blocks for a grid-stride loop over `count` items: enough to fill any device, never more than the grid's limit.
inline unsigned blocks_for(int64_t count) {
  const int64_t blocks = (count + threads_per_block - 1) / threads_per_block;
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
}

// nullptr, or why the last launch failed.
inline const char* launch_error() {
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

#ifdef __CUDACC__
// Visits this thread's items of [0, count); 64-bit, so that no scene is too large.
#define SOMNIUM_FOR_EACH(item, count)                                                              \
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < (count); \
       item += static_cast<int64_t>(gridDim.x) * blockDim.x)
#endif

}  // namespace somnium
