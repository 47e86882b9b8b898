// The CUDA launch for any operator: one thread per item.
#include "cuda_launch.h"
#include "kernel.h"

namespace somnium::raymarching {

template <class Body>
__global__ void run_items(const __grid_constant__ Body body) {
  SOMNIUM_FOR_EACH(i, body.items) body(i);
}

template <class Body>
const char* run_cuda(const Body& body, void* stream) {
  if (body.items == 0) return nullptr;
  run_items<<<blocks_for(body.items), threads_per_block, 0, static_cast<cudaStream_t>(stream)>>>(body);
  return launch_error();
}

#define SOMNIUM_CUDA(...) template const char* run_cuda(const __VA_ARGS__&, void*);
SOMNIUM_RAYMARCHING_ALL(SOMNIUM_CUDA)

}  // namespace somnium::raymarching
