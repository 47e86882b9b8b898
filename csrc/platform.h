// What a kernel body needs to compile both for a CPU loop and for a CUDA launch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

// For loops over arrays that must live in registers on a GPU; host compilers decide for themselves.
#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace somnium {

// Scalars and CPU lane vectors (lanes.h) share the bodies: these are the few operations whose spelling differs.
template <class Real>
struct Lane {
  using Int = int32_t;
  using Index = uint32_t;
  static constexpr int count = 1;
};

template <class To, class From>
HOST_DEVICE To convert(From value) {
  return static_cast<To>(value);
}

}  // namespace somnium
